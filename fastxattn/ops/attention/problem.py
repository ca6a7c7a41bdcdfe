"""The attention problem as every backend receives it."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Problem(NamedTuple):
    """Arguments of one attention call, in the order of the operator schema (which says what each means)."""

    query: Tensor
    key: Tensor
    value: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    seqused_q: Tensor | None = None
    seqused_k: Tensor | None = None
    query_index: Tensor | None = None
    key_index: Tensor | None = None
    kv_range: Tensor | None = None
    key_bias: Tensor | None = None
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float = 0.0
    dropout_p: float = 0.0
    dropout_seed: Tensor | None = None

    def values(self) -> tuple[Any, ...]:
        """The fields' values in order: the operator's positional arguments."""
        return tuple(self)

    def replace(self, **changes: Any) -> Problem:
        """A copy with these fields changed."""
        return self._replace(**changes)
