"""Feeds the operator library hostile models and inputs. Run in a process of its own: it may not crash.

python fuzz_library.py SEED ROUNDS  ->  prints how many runs gave a result and how many an error
"""

from __future__ import annotations

import sys

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from fastxattn.export.session import session_options

KINDS = {np.float32: TensorProto.FLOAT, np.float16: TensorProto.FLOAT16, np.int32: TensorProto.INT32}
KINDS |= {np.int64: TensorProto.INT64, np.float64: TensorProto.DOUBLE}
NAMES = (
    "query", "key", "value", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "query_index", "key_index",
    "kv_range", "key_bias", "bias",
)  # fmt: skip


def sound(random: np.random.Generator) -> dict[str, np.ndarray]:
    """A correct problem."""
    lengths_q, lengths_k = random.integers(0, 4, 3), random.integers(0, 5, 3)
    rows_q, rows_k = int(lengths_q.sum()), int(lengths_k.sum())
    shapes = {"query": (rows_q, 4, 8), "key": (rows_k, 2, 8), "value": (rows_k, 2, 6)}
    feeds = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    feeds["cu_seqlens_q"] = np.cumsum([0, *lengths_q]).astype(np.int32)
    feeds["cu_seqlens_k"] = np.cumsum([0, *lengths_k]).astype(np.int32)
    optional = {
        "seqused_q": lengths_q.astype(np.int32),
        "seqused_k": lengths_k.astype(np.int32),
        "query_index": np.arange(rows_q, dtype=np.int32),
        "key_index": np.arange(rows_k, dtype=np.int32),
        "kv_range": random.integers(-3, 7, (rows_q, 2)).astype(np.int32),
        "key_bias": random.standard_normal(rows_k).astype(np.float32),
        "bias": random.standard_normal((3, 1, 4, 5)).astype(np.float32),
    }
    return feeds | {name: x for name, x in optional.items() if random.random() < 0.4}


def break_it(feeds: dict[str, np.ndarray], random: np.random.Generator) -> None:
    """One to three faults: wrong ranks, sizes, contents, dtypes, or an input taken away."""
    for _ in range(random.integers(1, 4)):
        name = str(random.choice(list(feeds)))
        x = feeds[name]
        fault = random.integers(0, 7)
        if fault == 0:
            feeds[name] = x.reshape(-1)
        elif fault == 1:
            feeds[name] = x[..., None]
        elif fault == 2:
            feeds[name] = x[:-1] if x.ndim and len(x) else np.zeros((0,) * x.ndim, x.dtype)
        elif fault == 3 and x.dtype == np.int32 and x.size:
            extremes = [-1, 2**31 - 1, -(2**31), 5, 1000]
            x = x.copy()
            x.reshape(-1)[random.integers(0, x.size)] = random.choice(extremes)
            feeds[name] = x
        elif fault == 4:
            feeds[name] = x.astype(random.choice([np.float16, np.int64, np.float64]))
        elif fault == 5:
            feeds[name] = np.concatenate([x, x], axis=-1 if x.ndim else None)
        elif name not in ("query", "key"):
            del feeds[name]
        if name not in feeds and len(feeds) < 4:
            return


def model_for(feeds: dict[str, np.ndarray], random: np.random.Generator) -> bytes:
    names = [name if name in feeds else "" for name in NAMES]
    attributes: dict[str, float | int | str] = {"scale": 0.3, "softcap": float(random.choice([0.0, 2.0, -1.0]))}
    if random.random() < 0.1:
        attributes["scale"] = "wrong" if random.random() < 0.5 else 7
    node = helper.make_node("Attention", names, ["out", "lse"], domain="fastxattn", **attributes)
    kinds = {name: KINDS.get(x.dtype.type, TensorProto.FLOAT) for name, x in feeds.items()}
    inputs = [helper.make_tensor_value_info(n, kinds[n], [f"{n}{i}" for i in range(x.ndim)]) for n, x in feeds.items()]
    first = kinds.get("query", TensorProto.FLOAT)
    outputs = [
        helper.make_value_info("out", helper.make_tensor_type_proto(first, None)),
        helper.make_value_info("lse", helper.make_tensor_type_proto(TensorProto.FLOAT, None)),
    ]
    graph = helper.make_graph([node], "fuzz", inputs, outputs)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("fastxattn", 1)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())


def main(seed: int, rounds: int) -> None:
    random = np.random.default_rng(seed)
    onnxruntime.set_default_logger_severity(4)
    options = session_options(threads=2)
    options.log_severity_level = 4
    ran = refused = 0
    for i in range(rounds):
        feeds = sound(random)
        if i % 4:
            break_it(feeds, random)
        try:
            session = onnxruntime.InferenceSession(
                model_for(feeds, random), options, providers=["CPUExecutionProvider"]
            )
            session.run(None, feeds)
            ran += 1
        except Exception:  # whatever the runtime makes of it, as long as it is an exception
            refused += 1
    print(onnx.__name__, ran, refused)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
