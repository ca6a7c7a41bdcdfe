"""Feeds the operator library hostile models and inputs. Run in a process of its own: it may not crash.

python fuzz_library.py SEED ROUNDS  ->  a line per operator: its name, how many runs succeeded, how many failed
python fuzz_library.py SEED ROUNDS FILE.onnx INPUTS.npz  ->  the same for copies of a file, cut off or changed
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from fastxattn.export.session import session_options
from tests.export.fuzz_problems import OPERATORS, Feeds, Operator

KINDS = {np.float32: TensorProto.FLOAT, np.float16: TensorProto.FLOAT16, np.int32: TensorProto.INT32}
KINDS |= {np.int64: TensorProto.INT64, np.float64: TensorProto.DOUBLE, np.bool_: TensorProto.BOOL}
EXTREMES = (-1, 2**31 - 1, -(2**31), 5, 1000)


def flatten(x: np.ndarray, _: np.random.Generator) -> np.ndarray:
    return x.reshape(-1)


def add_axis(x: np.ndarray, _: np.random.Generator) -> np.ndarray:
    return x[..., None]


def deepen(x: np.ndarray, _: np.random.Generator) -> np.ndarray:
    return x.reshape(*x.shape, *[1] * 9)


def cut_row(x: np.ndarray, _: np.random.Generator) -> np.ndarray:
    return x[:-1] if x.ndim and len(x) else np.zeros((0,) * x.ndim, x.dtype)


def widen(x: np.ndarray, _: np.random.Generator) -> np.ndarray:
    return np.concatenate([x, x], axis=-1 if x.ndim else None)


def empty_but_huge(x: np.ndarray, random: np.random.Generator) -> np.ndarray:
    shape = [int(random.choice([0, 2**31, 2**40])) for _ in x.shape]
    if x.ndim:
        shape[random.integers(0, x.ndim)] = 0
    try:
        return np.zeros(shape, x.dtype)
    except ValueError:  # numpy multiplies the sizes that are not 0
        return np.zeros((0,) * x.ndim, x.dtype)


def change_type(x: np.ndarray, random: np.random.Generator) -> np.ndarray:
    with np.errstate(all="ignore"):
        return x.astype(random.choice([np.float16, np.int64, np.float64, np.int32]))


def spoil(x: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Extreme whole numbers, NaN and infinity. A large `capacity` is honest, and only costs memory."""
    if not x.size:
        return x
    x, place = x.copy(), random.integers(0, x.size)
    if np.issubdtype(x.dtype, np.floating):
        x.reshape(-1)[place] = random.choice([np.nan, np.inf, -np.inf, 1e30])
    elif x.dtype == np.int64:
        x.reshape(-1)[place] = random.choice([-1, 2**31, 2**62, -(2**63)])
    elif x.dtype == np.int32:
        x.reshape(-1)[place] = random.choice(EXTREMES)
    return x


def nan_offsets(x: np.ndarray, _: np.random.Generator) -> np.ndarray:
    return np.full(x.shape, np.nan, np.float32)


FAULTS: tuple[Callable[[np.ndarray, np.random.Generator], np.ndarray], ...] = (
    flatten,
    add_axis,
    deepen,
    cut_row,
    widen,
    empty_but_huge,
    change_type,
    spoil,
    spoil,
    nan_offsets,
)


def break_it(feeds: Feeds, random: np.random.Generator) -> None:
    """One to three faults: wrong ranks, sizes, contents, dtypes, or an input taken away."""
    for _ in range(random.integers(1, 4)):
        name = str(random.choice(list(feeds)))
        fault = random.integers(0, len(FAULTS) + 1)
        if fault < len(FAULTS):
            feeds[name] = FAULTS[fault](feeds[name], random)
        elif len(feeds) > 2:
            del feeds[name]


def model_for(operator: Operator, feeds: Feeds, random: np.random.Generator, sound: bool) -> bytes:
    """One node. Some inputs are constants of the graph; in a broken model the node itself may be broken too."""
    names = [name if name in feeds else "" for name in operator.inputs]
    results = list(operator.outputs)
    attributes: dict[str, float | int | str | list[float]] = dict.fromkeys(operator.attributes, 0.3)
    if not sound:
        for name in operator.attributes:
            if random.random() < 0.1:
                attributes[name] = [-1.0, float("nan"), float("inf"), 7, "wrong", [0.1, 0.2]][random.integers(0, 6)]
        if random.random() < 0.1:
            names = names[: random.integers(0, len(names) + 1)]
        elif random.random() < 0.1:
            names = [*names, names[0]]
        if random.random() < 0.1:
            results = results[: random.integers(0, len(results))] if random.random() < 0.5 else [*results, "more"]
    kinds = {name: KINDS.get(x.dtype.type, TensorProto.FLOAT) for name, x in feeds.items()}
    constants = [n for n, x in feeds.items() if random.random() < 0.2 and x.nbytes < 1 << 16]
    inputs = [
        helper.make_tensor_value_info(n, kinds[n], [f"{n}{i}" for i in range(x.ndim)])
        for n, x in feeds.items()
        if n not in constants
    ]
    first = kinds.get(operator.inputs[0], TensorProto.FLOAT)
    outputs = [
        helper.make_value_info(n, helper.make_tensor_type_proto(kind or first, None))
        for n, kind in operator.outputs.items()
        if n in results
    ]
    node = helper.make_node(operator.name, names, results, domain="fastxattn", **attributes)
    weights = [onnx.numpy_helper.from_array(feeds.pop(n), n) for n in constants]
    graph = helper.make_graph([node], "fuzz", inputs, outputs, initializer=weights)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("fastxattn", 1)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())


def runs(model: bytes, feeds: Feeds, options: onnxruntime.SessionOptions) -> bool:
    """Whether the model returned a result. Anything else has to be an exception, whichever the runtime makes of it."""
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"], enable_fallback=0)
        session.run(None, feeds)
        return True
    except Exception:
        return False


def fuzz_operator(operator: Operator, rounds: int, random: np.random.Generator) -> tuple[int, int]:
    """(results, errors) of sound problems and of broken ones; a sound one that fails ends the run."""
    options = quiet_options()
    ran = 0
    for i in range(rounds):
        feeds, sound = operator.sound(random), i % 4 == 0
        if not sound:
            break_it(feeds, random)
        good = runs(model_for(operator, feeds, random, sound), feeds, options)
        if sound and not good:
            raise SystemExit(f"{operator.name}: a sound problem failed in round {i}")
        ran += good
    return ran, rounds - ran


def fuzz_file(path: Path, inputs: Path, rounds: int, random: np.random.Generator) -> tuple[int, int]:
    """(results, errors) of a file that was cut off, or had one to four bytes of its graph changed."""
    options = quiet_options()
    whole = path.read_bytes()
    with np.load(inputs) as saved:
        feeds = dict(saved)
    if not runs(whole, feeds, options):
        raise SystemExit(f"{path} does not run as it is")
    ran = 0
    for i in range(rounds):
        broken = bytearray(whole)
        if i % 2:
            del broken[random.integers(0, len(whole)) :]
        else:
            for place in random.integers(0, len(whole), random.integers(1, 5)):
                broken[place] = random.integers(0, 256)
        ran += runs(bytes(broken), feeds, options)
    return ran, rounds - ran


def quiet_options() -> onnxruntime.SessionOptions:
    options = session_options(threads=2)
    options.log_severity_level = 4
    return options


def main(seed: int, rounds: int, *files: str) -> None:
    onnxruntime.set_default_logger_severity(4)
    if files:
        path, inputs = map(Path, files)
        print(path.name, *fuzz_file(path, inputs, rounds, np.random.default_rng(seed)))
        return
    for operator in OPERATORS:
        print(operator.name, *fuzz_operator(operator, rounds, np.random.default_rng(seed)), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
