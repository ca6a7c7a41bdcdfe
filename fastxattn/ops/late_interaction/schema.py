"""Operator schemas of late interaction.

``maxsim``: tokens ``a`` (Ta, D) and ``b`` (Tb, D) in sets that start at ``cu_a`` (N + 1) and ``cu_b`` (M + 1), int32.
``from_a``: ``sum_a`` (N, M) float32, the sum over a set's tokens of their best match in each set of b, and ``best_a``
(Ta, M) int32, its place in that set (-1: the set is empty). ``from_b``: the same from b's tokens, ``sum_b`` (N, M) and
``best_b`` (Tb, N). The backward operator takes both sums' gradients and returns float32 gradients of a and b.
``smooth_maxsim`` takes the smooth maximum ``smooth * logsumexp(. / smooth)`` instead; its ``best`` are these maxima in
float32, -inf where the set is empty.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastxattn.runtime.operators import define

NEEDS = {"a": 1, "b": 2}


def _maxsim_fake(
    a: torch.Tensor, b: torch.Tensor, cu_a: torch.Tensor, cu_b: torch.Tensor, from_a: bool, from_b: bool
) -> tuple[torch.Tensor, ...]:
    n, m = cu_a.shape[0] - 1, cu_b.shape[0] - 1

    def empty(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        return a.new_empty((rows, columns), dtype=dtype)

    return (
        empty(n if from_a else 0, m, torch.float32),
        empty(n if from_b else 0, m, torch.float32),
        empty(a.shape[0] if from_a else 0, m, torch.int32),
        empty(b.shape[0] if from_b else 0, n, torch.int32),
    )


def _backward_fake(*args: object) -> tuple[torch.Tensor, ...]:
    a, b, needs = args[4], args[5], args[-1]
    assert isinstance(a, torch.Tensor)
    assert isinstance(b, torch.Tensor)
    assert isinstance(needs, int)
    return tuple(
        x.new_empty((x.shape[0] if needs & bit else 0, x.shape[1]), dtype=torch.float32)
        for x, bit in ((a, NEEDS["a"]), (b, NEEDS["b"]))
    )


_ARGUMENTS = "Tensor a, Tensor b, Tensor cu_a, Tensor cu_b, bool from_a, bool from_b"
_SAVED = f"Tensor grad_a, Tensor grad_b, Tensor best_a, Tensor best_b, {_ARGUMENTS}, int needs"
_RESULTS = "(Tensor sum_a, Tensor sum_b, Tensor best_a, Tensor best_b)"


def _smooth_fake(*args: Any) -> tuple[torch.Tensor, ...]:
    sum_a, sum_b, best_a, best_b = _maxsim_fake(*args[:6])
    return sum_a, sum_b, best_a.float(), best_b.float()


def _smooth_backward_fake(*args: Any) -> tuple[torch.Tensor, ...]:
    return _backward_fake(*args[:-1])


OPERATORS: dict[str, tuple[str, Callable[..., Any]]] = {
    "maxsim": (f"({_ARGUMENTS}) -> {_RESULTS}", _maxsim_fake),
    "maxsim_backward": (f"({_SAVED}) -> (Tensor, Tensor)", _backward_fake),
}
SMOOTH = OPERATORS | {
    "smooth_maxsim": (f"({_ARGUMENTS}, float smooth) -> {_RESULTS}", _smooth_fake),
    "smooth_maxsim_backward": (f"({_SAVED}, float smooth) -> (Tensor, Tensor)", _smooth_backward_fake),
}
for _backend, _operators in (("cpu", OPERATORS), ("triton", SMOOTH), ("cuda", SMOOTH)):
    for _name, (_signature, _fake) in _operators.items():
        define(f"{_name}_{_backend}", _signature, _fake)
