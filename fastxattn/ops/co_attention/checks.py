"""What is wrong with the sides of a co-attention call; each direction then has attention's own checks."""

from __future__ import annotations

from torch import Tensor

from fastxattn.ops.offsets import check_dense


def check_sides(query_a: object, query_b: object, value_a: object, value_b: object) -> None:
    """Raise TypeError or ValueError when the sides do not fit together."""
    given = {"query_a": query_a, "query_b": query_b, "value_a": value_a, "value_b": value_b}
    for name, t in given.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor; got {type(t).__name__}")
        check_dense(name, t)
        if t.ndim != 3:
            raise ValueError(f"{name} must have shape (tokens, heads, dim); got {tuple(t.shape)}")
        assert isinstance(query_a, Tensor)
        if t.shape[1] != query_a.shape[1]:
            raise ValueError(f"{name} must have the heads of query_a, {query_a.shape[1]}; got {t.shape[1]}")
    assert isinstance(query_a, Tensor) and isinstance(query_b, Tensor)
    if query_b.shape[2] != query_a.shape[2]:
        raise ValueError(f"query_b must have the head_dim of query_a, {query_a.shape[2]}; got {query_b.shape[2]}")
    for side, query, value in (("a", query_a, value_a), ("b", query_b, value_b)):
        assert isinstance(value, Tensor)
        if value.shape[0] != query.shape[0]:
            raise ValueError(
                f"value_{side} must have as many tokens as query_{side}, {query.shape[0]}; got {value.shape[0]}"
            )
