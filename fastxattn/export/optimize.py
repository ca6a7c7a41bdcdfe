"""``optimize``: attention in an ONNX file that someone else exported becomes fastxattn nodes."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from fastxattn.export.files import read
from fastxattn.export.operations import DOMAIN, functions
from fastxattn.export.patterns import Index, find
from fastxattn.export.rewrite import write
from fastxattn.export.session import session_options

PARITY = 1e-4
"""Largest difference allowed between the outputs of the old file and the new one, relative to the largest value."""


EXTERNAL_ABOVE = 1 << 30
"""Bytes of weights that go to a file of their own, ``<name>.data``."""


@dataclass(frozen=True)
class Optimized:
    """What :func:`optimize` did."""

    path: Path | None
    """The file written, or None when there was nothing to rewrite."""
    rewritten: tuple[str, ...]
    left: tuple[str, ...]
    """Attention that stays as it is, with the reason."""
    difference: float
    """Largest difference found between old and new outputs, relative to the largest value."""

    def __str__(self) -> str:
        lines = [f"rewritten: {name}" for name in self.rewritten] + [f"left: {name}" for name in self.left]
        where = f"{self.path}, outputs differ by {self.difference:.1e}" if self.path else "nothing to rewrite"
        return "\n".join([*lines, where])


def optimize(
    path: str | Path,
    out: str | Path | None = None,
    *,
    inputs: Sequence[Mapping[str, np.ndarray]] | None = None,
    overwrite: bool = False,
) -> Optimized:
    """Rewrite attention subgraphs into ``fastxattn::Attention``, check the outputs, and write the new file.

    Recognised: the standard Attention operator, ONNX Runtime's MultiHeadAttention, and softmax between two matrix
    products, with scales, additive and boolean masks, key padding and causality. Masks that hide keys from all queries
    become lengths, so that hidden keys cost nothing. A row that sees no key gives 0, where the original gives NaN
    or the mean of the values. Like an exported file, the new one runs with and without the operator library.

    Args:
        path: an ONNX file of opset 18 to 24 (older ones are converted up first).
        out: the file to write; ``<name>.fastxattn.onnx`` beside it when None.
        inputs: runs to compare old and new on; random ones drawn from the graph's signature when None (rank and type
            are known from it; give inputs yourself where sizes must agree in ways that it does not say).
        overwrite: replace ``out`` if it exists (it may be ``path`` itself).

    Raises:
        FileExistsError: ``out`` exists.
        ValueError: the file is not a valid model or does not run on the inputs, the outputs differ, or the opset
            cannot be handled; nothing is written.
    """
    path = Path(path)
    target = Path(out) if out is not None else path.with_suffix(".fastxattn.onnx")
    for file in (target, target.with_name(target.name + ".data")):
        if file.exists() and not overwrite:
            raise FileExistsError(f"{file} exists; pass overwrite=True to replace it")
    before = read(path, weights=True)
    after = _converted(before)
    index = Index(after)
    rewritten, left = [], []
    for i, match in enumerate(find(index)):
        title = f"{match.kind} at {match.node.name or match.node.output[0]}"
        if match.refused is not None:
            left.append(f"{title}: {match.refused}")
            continue
        try:
            nodes = write(index, match, f"fastxattn_{i}")
        except ValueError as error:
            left.append(f"{title}: {error}")
            continue
        place = next(p for p, n in enumerate(after.graph.node) if match.node.output[0] in n.output)
        del after.graph.node[place]
        for offset, node in enumerate(nodes):
            after.graph.node.insert(place + offset, node)
        rewritten.append(title)
    if not rewritten:
        return Optimized(None, (), tuple(left), 0.0)
    _drop_dead(after.graph)
    version = next(o.version for o in after.opset_import if o.domain in ("", "ai.onnx"))
    if not any(f.domain == DOMAIN and f.name == "Attention" for f in after.functions):
        after.functions.append(functions("loop", version)["Attention"])
    if not any(o.domain == DOMAIN for o in after.opset_import):
        after.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    after.ir_version = max(after.ir_version, 9)
    feeds = list(inputs) if inputs is not None else [random_inputs(before, seed) for seed in range(2)]
    difference = _compare(_runnable(before), path, after, target, feeds)
    return Optimized(target, tuple(rewritten), tuple(left), difference)


def random_inputs(model: onnx.ModelProto, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs of the graph's types and ranks; open axes of one name get one size.

    Integers and booleans whose name holds "mask" are ragged with at least one token in each row; other integers are
    small ids.
    """
    random = np.random.default_rng(seed)
    sizes: dict[str, int] = {}
    weights = {t.name for t in model.graph.initializer}
    feeds: dict[str, np.ndarray] = {}
    for value in model.graph.input:
        if value.name in weights:
            continue
        kind = value.type.tensor_type
        shape = []
        for axis, d in enumerate(kind.shape.dim):
            name = d.dim_param or f"{value.name}_{axis}"
            fresh = 3 if axis == 0 else 5 + len(sizes) + seed
            shape.append(d.dim_value if d.HasField("dim_value") else sizes.setdefault(name, fresh))
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        if np.issubdtype(dtype, np.floating):
            feeds[value.name] = random.standard_normal(shape).astype(dtype)
        elif "mask" in value.name or dtype == np.bool_:
            last = shape[-1] if shape else 1
            lengths = random.integers(1, last + 1, shape[:-1])
            feeds[value.name] = (np.arange(last) < lengths[..., None]).astype(dtype)
        else:
            feeds[value.name] = random.integers(0, 8, shape).astype(dtype)
    return feeds


def _converted(model: onnx.ModelProto) -> onnx.ModelProto:
    version = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if version > 24:
        raise ValueError(f"the file has opset {version}; the latest that can be handled is 24")
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    if version >= 18:
        return copy
    try:
        return onnx.version_converter.convert_version(copy, 18)
    except Exception as error:
        raise ValueError(f"the file has opset {version} and cannot be converted to 18: {error}") from error


def _drop_dead(graph: onnx.GraphProto) -> None:
    """Remove nodes that nothing reads any more, and weights of theirs."""
    while True:
        read = {name for node in graph.node for name in _reads(node)} | {value.name for value in graph.output}
        dead = [node for node in graph.node if not any(name in read for name in node.output if name)]
        if not dead:
            break
        for node in dead:
            graph.node.remove(node)
    kept = [t for t in graph.initializer if t.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _reads(node: onnx.NodeProto) -> set[str]:
    names = set(node.input)
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            for inner in attribute.g.node:
                names |= _reads(inner)
            names |= {value.name for value in attribute.g.output}
    return names


def _runnable(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """The model with the masks that ONNX Runtime's Attention refuses spread over the queries; None: it has none."""
    index = Index(model)
    refused = [
        (match, name)
        for match in find(index)
        for name in (*match.biases, *(mask for mask, _, _ in match.masks))
        if match.kind == "Attention" and match.heads is None and (index.shape(name) or (None,) * 3)[-2] == 1
    ]
    if not refused:
        return None
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for i, (match, name) in enumerate(refused):
        place = next(p for p, n in enumerate(copy.graph.node) if match.node.output[0] in n.output)
        one = onnx.helper.make_node("Constant", [], [f"one_{i}"], value_ints=[1])
        length = onnx.helper.make_node("Shape", [match.query], [f"length_{i}"], start=2, end=3)
        shape = onnx.helper.make_node("Concat", [f"length_{i}", f"one_{i}"], [f"shape_{i}"], axis=0)
        spread = onnx.helper.make_node("Expand", [name, f"shape_{i}"], [f"spread_{i}"])
        copy.graph.node[place].input[3] = f"spread_{i}"
        for offset, node in enumerate((one, length, shape, spread)):
            copy.graph.node.insert(place + offset, node)
    return copy


def _compare(
    before: onnx.ModelProto | None,
    path: Path,
    after: onnx.ModelProto,
    target: Path,
    feeds: Sequence[Mapping[str, np.ndarray]],
) -> float:
    """Compare ``after`` with ``before``, or the file it came from; where they agree, ``after`` becomes ``target``."""
    large = sum(len(t.raw_data) for t in after.graph.initializer) > EXTERNAL_ABOVE
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        fresh, old = Path(folder) / target.name, path
        _save(after, fresh, large)
        if before is not None:
            old = Path(folder) / "before.onnx"
            _save(before, old, large)
        try:
            reference = _session(old, False)
            expected = [reference.run(None, dict(given)) for given in feeds]
        except Exception as error:
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(f"{path} does not run on the inputs that were tried (see inputs=): {reason}") from error
        names = [o.name for o in reference.get_outputs()]
        worst = 0.0
        for side in (False, True):
            session = _session(fresh, side)
            for given, results in zip(feeds, expected, strict=True):
                for name, a, b in zip(names, results, session.run(None, dict(given)), strict=True):
                    worst = max(worst, _difference(name, np.asarray(a), np.asarray(b)))
        for file in sorted(Path(folder).glob(f"{target.name}*"), reverse=True):  # weights before what names them
            file.replace(target.with_name(file.name))
    return worst


def _save(model: onnx.ModelProto, path: Path, large: bool) -> None:
    # Saving moves external weights out of the model it is given.
    copy = model
    if large:
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
    onnx.save(copy, str(path), save_as_external_data=large, location=f"{path.name}.data" if large else None)


def _session(path: Path, library: bool) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(path), session_options(library=library), providers=["CPUExecutionProvider"])


def _difference(name: str, a: np.ndarray, b: np.ndarray) -> float:
    if a.shape != b.shape:
        raise ValueError(f"output {name} changed its shape from {a.shape} to {b.shape}; nothing was written")
    if a.size == 0 or not np.issubdtype(a.dtype, np.floating):
        if not np.array_equal(a, b):
            raise ValueError(f"output {name} changed; nothing was written")
        return 0.0
    same = ~np.isnan(a)  # NaN in the original: a row that sees no key
    difference = float(np.abs(a.astype(np.float64) - b.astype(np.float64))[same].max(initial=0.0))
    relative = difference / max(1.0, float(np.abs(a[same]).max(initial=0.0)))
    allowed = PARITY if a.dtype == np.float32 else 5e-3
    if not relative <= allowed:
        raise ValueError(f"output {name} differs by {relative:.2e} (allowed {allowed:.0e}); nothing was written")
    return relative
