"""Every leaf of a model's inputs and outputs: copied, cast and compared, in whatever containers it comes."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def rebuilt(value: Any, tensor: Callable[[Tensor], Tensor], seen: dict[int, Any] | None = None) -> Any:
    """A copy of ``value`` (containers, dataclasses, caches, generators) with ``tensor`` applied to each tensor.

    Floating ``torch.dtype`` attributes follow the tensors, as a cache remembers the dtype of its keys.
    """
    seen = {} if seen is None else seen
    if isinstance(value, torch.dtype):
        return tensor(torch.empty(0, dtype=value)).dtype if value.is_floating_point else value
    if isinstance(value, (*_PLAIN, type, nn.Module)) or callable(value):
        return value
    if id(value) in seen:
        return seen[id(value)][0]
    made: Any
    if isinstance(value, Tensor):
        made = tensor(value)
    elif isinstance(value, torch.Generator):
        made = torch.Generator(value.device)
        made.set_state(value.get_state())
    elif type(value) in (list, set, frozenset):
        made = type(value)(rebuilt(v, tensor, seen) for v in value)
    elif isinstance(value, tuple):
        parts = [rebuilt(v, tensor, seen) for v in value]
        made = type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    elif type(value) is dict:
        made = {k: rebuilt(v, tensor, seen) for k, v in value.items()}
    elif hasattr(value, "__dict__"):
        made = copy.copy(value)
        seen[id(value)] = (made, value)
        if isinstance(made, dict):
            dict.update(made, {k: rebuilt(v, tensor, seen) for k, v in dict.items(made)})
        vars(made).update({k: rebuilt(v, tensor, seen) for k, v in vars(value).items()})
    else:
        made = copy.deepcopy(value)
    seen[id(value)] = (made, value)  # the original is held, so that its id stays its own
    return made


def leaves(value: Any, path: str = "", seen: set[int] | None = None, opaque: bool = False) -> Iterator[tuple[str, Any]]:
    """(path, leaf) of every tensor, number and string: ``text_model_output.last_hidden_state``, ``0.boxes``.

    Objects that are no containers (caches) contribute their tensors only.
    """
    seen = set() if seen is None else seen
    if isinstance(value, Tensor) and value.is_nested:
        value = list(value.unbind())
    if isinstance(value, Tensor):
        yield path, value if value.layout == torch.strided else value.to_dense()
        return
    if isinstance(value, (bool, int, float, complex, str)):
        if not opaque:
            yield path, value
        return
    if isinstance(value, (*_PLAIN, type, nn.Module)) or callable(value) or id(value) in seen:
        return
    seen.add(id(value))
    if type(value).__module__ == "numpy":
        yield path, torch.as_tensor(value)
        return
    if isinstance(value, Mapping):
        parts: Any = value.items()
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        parts = zip(value._fields, value, strict=True)
    elif isinstance(value, (list, tuple)):
        parts = enumerate(value)
    elif dataclasses.is_dataclass(value):
        parts = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    else:
        opaque, parts = True, getattr(value, "__dict__", {}).items()
    for name, part in parts:
        yield from leaves(part, f"{path}.{name}" if path else str(name), seen, opaque)


@dataclass(frozen=True)
class Comparison:
    """What two results differ by, against the same computed in float64."""

    error: float
    eager_error: float
    budget: float
    values: int
    """How many values were compared."""
    reason: str
    """Why they do not agree; "" when they do."""


def compare(given: Any, original: Any, reference: Any, changes: tuple[str, ...] = ()) -> Comparison:
    """Compare every leaf of three outputs: integers exactly, floating-point numbers within the error budget.

    Args:
        given: the output to judge.
        original: the output of the model as it was, in the same dtype.
        reference: the same in float64.
        changes: patterns of paths that are not compared.
    """
    found = [dict(leaves(output)) for output in (given, original, reference)]
    names = [name for name in found[1] if not any(fnmatchcase(name, pattern) for pattern in changes)]
    extra = [name for name in found[0] if name not in found[1]]
    worst, values, reason = (0.0, 0.0, 0.0), 0, ""
    for name in [*names, *extra]:
        a, b, ref = (leaf.get(name) for leaf in found)
        where = f"output {name!r}" if name else "the output"
        if a is None or b is None or ref is None:
            reason = reason or f"{where} is {'missing' if a is None else 'one that the original does not return'}"
            continue
        problem, one, count = _compare_leaf(a, b, ref)
        values += count
        reason = reason or (problem and f"{where} {problem}")
        if _share(one) > _share(worst) or not math.isfinite(one[0]):
            worst = one
    if not values and not reason:
        reason = "the model returned no value that could be compared"
    return Comparison(*worst, values, reason)


def _share(one: tuple[float, float, float]) -> float:
    return one[0] / max(one[2], 1e-300)


def _compare_leaf(a: Any, b: Any, ref: Any) -> tuple[str, tuple[float, float, float], int]:
    none = (0.0, 0.0, 0.0)
    if not isinstance(b, Tensor):
        if isinstance(b, str) or not isinstance(a, (bool, int, float, complex)):
            return ("" if a == b else f"is {a!r}, not {b!r}"), none, 0
        kinds = (torch.float32, torch.float32, torch.float64) if isinstance(b, float) else (None, None, None)
        a, b, ref = (torch.as_tensor(x, dtype=kind) for x, kind in zip((a, b, ref), kinds, strict=True))
    if not isinstance(a, Tensor) or a.shape != b.shape or a.dtype != b.dtype or ref.shape != b.shape:
        return f"is of another kind: {_kind(a)}, not {_kind(b)}", none, 0
    if b.is_complex():
        a, b, ref = torch.view_as_real(a), torch.view_as_real(b), torch.view_as_real(ref)
    if not b.is_floating_point():
        wrong = int((a != b).sum())
        return (f"differs in {wrong} of {b.numel()} integers" if wrong else ""), none, b.numel()
    return _compare_floats(a.detach(), b.detach(), ref.detach().to(torch.float64))


def _compare_floats(a: Tensor, b: Tensor, ref: Tensor) -> tuple[str, tuple[float, float, float], int]:
    """NaN and infinity must stand where they stand in the original, except where float64 has a number there."""
    none, finite = (0.0, 0.0, 0.0), ref.isfinite()
    both = finite & b.isfinite()
    if bool((both & ~a.isfinite()).any()) or bool((~finite & (a.isfinite() != b.isfinite())).any()):
        return "has NaN or infinity in other places than the original", none, 0
    both &= a.isfinite()
    count = int(both.sum())
    if not count:
        return "", none, 0
    exact, rounded = ref[both], ref[both].to(a.dtype)
    mine = float((a[both].double() - exact).abs().max())
    theirs = float((b[both].double() - exact).abs().max())
    budget = 2 * theirs + 2 * float(((rounded + 0.3 - 0.3).double() - rounded.double()).abs().max())
    largest = float(exact.abs().max())
    reason = ""
    if not mine <= budget:
        reason = f"has the error {mine:.3g}, which exceeds the budget {budget:.3g}"
    elif theirs > largest / 2 > 5e-5:
        reason = f"differs by {theirs:.3g} from float64 before the swap (values reach {largest:.3g}): nothing is proved"
    return reason, (mine, theirs, budget), count


def _kind(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
