"""Arguments of co-attention."""

from __future__ import annotations

from torch import Tensor

from fastxattn.ops.arguments import Arguments, differentiable, number, problem
from fastxattn.ops.attention.problem import Problem as AttentionProblem

SIDES = ("a", "b")


def roles(reader: int) -> dict[str, str]:
    """Attention's arguments of one direction by the names they have here: side a reads b (0), or b reads a (1)."""
    mine, other = SIDES[reader], SIDES[1 - reader]
    return {
        "query": f"query_{mine}",
        "key": f"query_{other}",
        "value": f"value_{other}",
        "cu_seqlens_q": f"cu_seqlens_{mine}",
        "cu_seqlens_k": f"cu_seqlens_{other}",
        "key_bias": f"key_bias_{other}",
    }


@problem
class Problem(Arguments):
    """One call; a suffix names the side that an argument belongs to."""

    query_a: Tensor = differentiable()  # (total_a, heads, head_dim)
    query_b: Tensor = differentiable()  # (total_b, heads, head_dim)
    value_a: Tensor = differentiable()  # (total_a, heads, value_dim_a)
    value_b: Tensor = differentiable()  # (total_b, heads, value_dim_b)
    cu_seqlens_a: Tensor  # (batch + 1,) int32
    cu_seqlens_b: Tensor  # (batch + 1,) int32
    key_bias_a: Tensor | None = differentiable(default=None)  # (total_a,) or (total_a, heads) float32
    key_bias_b: Tensor | None = differentiable(default=None)  # (total_b,) or (total_b, heads) float32
    scale: float = number(default=1.0)
    softcap: float = number(low=0.0, default=0.0)
    dropout_p: float = number(low=0.0, below=1.0, default=0.0)
    dropout_seed: Tensor | None = None  # (2,) int64, one for each reader

    def direction(self, reader: int) -> AttentionProblem:
        """The attention problem of one direction, as in :func:`roles`."""
        sides = {role: getattr(self, name) for role, name in roles(reader).items()}
        shared = {name: getattr(self, name) for name in self.numbers}
        seed = self.dropout_seed
        return AttentionProblem(**sides, **shared, dropout_seed=None if seed is None else seed[reader : reader + 1])
