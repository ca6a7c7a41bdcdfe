"""``inspect``: what will go wrong with the attention in an ONNX file, and which of it could be accelerated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx

from fastxattn.export.files import read
from fastxattn.export.operations import DOMAIN
from fastxattn.export.patterns import Index, Match, find


@dataclass(frozen=True)
class Finding:
    """One remark. ``error``: a runtime refuses it or errs; ``warning``: it may; ``note``: good to know."""

    level: str
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.level:<7}  {self.where}: {self.message}"


@dataclass(frozen=True)
class Inspection:
    """What :func:`inspect` found in a file."""

    path: Path
    opset: int
    findings: tuple[Finding, ...]
    accelerated: int
    """Nodes that are fastxattn's already."""
    could_be: tuple[str, ...]
    """Attention that :func:`fastxattn.export.optimize` can rewrite."""

    @property
    def ok(self) -> bool:
        """Whether nothing is an error."""
        return not any(f.level == "error" for f in self.findings)

    def __str__(self) -> str:
        head = f"{self.path}: opset {self.opset}, {self.accelerated} fastxattn nodes, {len(self.could_be)} could be"
        return "\n".join([head, *map(str, self.findings), *(f"could be accelerated: {name}" for name in self.could_be)])


def inspect(path: str | Path) -> Inspection:
    """Lint an ONNX file for what is known to break with attention. The file is not run.

    Raises:
        ValueError: it is not a valid ONNX model.

    Example:
        >>> print(fastxattn.export.inspect("model.onnx"))
    """
    model = read(Path(path), weights=False)
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    index = Index(model)
    matches = list(find(index))
    findings = [*_file(model, opset), *(f for match in matches for f in _attention(index, match, opset))]
    ours = sum(node.domain == DOMAIN for node in index.nodes)
    could = tuple(_title(m) for m in matches if m.refused is None)
    return Inspection(Path(path), opset, tuple(findings), ours, could)


def _title(match: Match) -> str:
    return f"{match.kind} at {match.node.name or match.node.output[0]}"


def _file(model: onnx.ModelProto, opset: int) -> Iterator[Finding]:
    if opset > 24:
        yield Finding(
            "error", "file", f"opset {opset}: ONNX Runtime has no attention kernel past opset 24; export at 18..24"
        )
    names = [f.name for f in model.functions]
    for function in model.functions:
        version = next((o.version for o in function.opset_import if o.domain in ("", "ai.onnx")), opset)
        if version != opset:
            yield Finding(
                "error",
                f"function {function.name}",
                f"it imports opset {version}, the model {opset}; they must be equal",
            )
        if function.overload and names.count(function.name) > 1:
            yield Finding(
                "error", f"function {function.name}", "overloads of one name: runtimes before 1.22 use one for all"
            )
    own = {f.name for f in model.functions if f.domain == DOMAIN}
    for node in model.graph.node:
        if node.domain == DOMAIN and node.op_type not in own:
            yield Finding("error", node.name or node.op_type, "no function of that name: it runs only with the library")
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        if dims and dims[0].HasField("dim_value") and dims[0].dim_value == 1 and len(dims) > 1:
            yield Finding(
                "warning", f"input {value.name}", "its first axis is fixed at 1: the example's batch was baked in"
            )


def _attention(index: Index, match: Match, opset: int) -> Iterator[Finding]:
    where = _title(match)
    masked = bool(match.biases or match.masks or match.key_mask)
    if match.kind == "Attention":
        for name in [*match.biases, *(m[0] for m in match.masks)]:
            shape = index.shape(name)
            if shape is not None and len(shape) == 4 and shape[2] == 1 and _size(index, match.query, -2) != 1:
                yield Finding(
                    "error",
                    where,
                    f"mask {name} broadcasts over queries; ONNX Runtime refuses it: expand it to (B, 1, Lq, Lk)",
                )
        if not all(isinstance(d, int) and d > 0 for d in index.shape(match.query) or (None,)):
            yield Finding(
                "warning", where, "ONNX Runtime's kernel fails on an axis of size 0 (an empty batch, no tokens)"
            )
    if match.kind == "decomposed":
        for name, _, hidden in match.masks:
            if hidden == float("-inf"):
                yield Finding("warning", where, f"mask {name} fills with -inf: a row without keys gives NaN")
            else:
                yield Finding(
                    "warning", where, f"mask {name} fills with {hidden:g}: a row without keys gives mean(value)"
                )
        if match.biases:
            yield Finding(
                "warning", where, "additive mask: a row without keys gives mean(value), or NaN when it holds -inf"
            )
    elif masked or match.lengths:
        yield Finding("warning", where, "a row without keys gives mean(value) or NaN, by runtime and provider")
    if masked or match.lengths:
        yield Finding(
            "note", where, "NaN in padded values reaches the result: a masked weight is 0, and 0 * NaN is NaN"
        )
    if match.refused is not None:
        yield Finding("note", where, f"cannot be accelerated: {match.refused}")


def _size(index: Index, name: str, axis: int) -> int | str | None:
    shape = index.shape(name)
    return None if shape is None or len(shape) < -axis else shape[axis]
