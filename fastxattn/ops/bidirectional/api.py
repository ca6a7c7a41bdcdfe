"""The public function: two token sets that read each other."""

from __future__ import annotations

from torch import Tensor

from fastxattn.ops.attention import varlen_cross_attention
from fastxattn.ops.bidirectional.checks import check_sides


def bidirectional_attention(
    query_a: Tensor,
    query_b: Tensor,
    value_a: Tensor,
    value_b: Tensor,
    cu_seqlens_a: Tensor,
    cu_seqlens_b: Tensor,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    bias_a: Tensor | None = None,
    bias_b: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    r"""Co-attention of two token sets, packed: each side has one projection for scores and one for values.

    For the tokens i of side a and j of side b in the same sequence::

        s_ij    = scale * query_a_i . query_b_j          (capped when softcap is not 0)
        out_a_i = sum_j softmax_j(s_ij + bias_b_j) value_b_j          a reads b
        out_b_j = sum_i softmax_i(s_ij + bias_a_i) value_a_i          b reads a

    as in GroundingDINO's fusion layer and in LXMERT with shared projections. No matrix of scores is stored: each
    direction is one call of the attention kernel with the sides swapped, so it runs on every backend that has one, and
    the product query_a . query_b is computed once per direction.

    Args:
        query_a: (total_a, heads, head_dim) float32, bfloat16, float16 or float64.
        query_b: (total_b, heads, head_dim).
        value_a: (total_a, heads, value_dim_a).
        value_b: (total_b, heads, value_dim_b).
        cu_seqlens_a: (batch + 1,) int32 offsets of side a.
        cu_seqlens_b: (batch + 1,) int32 offsets of side b.
        scale: multiplies the scores; 1 / sqrt(head_dim) when None.
        softcap: soft limit on scores; 0 is off.
        bias_a: (total_a,) or (total_a, heads) float32, added where side a is read (the log of a merged token's size).
        bias_b: the same for side b.
        dropout_p: probability of dropping an attention weight, drawn for each direction on its own.
        dropout_seed: int or (1,) int64 tensor; the directions use it and its successor. None draws two.
        backend: ``"auto"``, or a name that is used or refused.

    Returns:
        out_a (total_a, heads, value_dim_b) and out_b (total_b, heads, value_dim_a), differentiable in everything. A
        token whose other side is empty gets 0.

    Raises:
        TypeError: an argument is not a tensor or has the wrong dtype.
        ValueError: a shape, device, offset or number is wrong, or there is no such backend.
        RuntimeError: the backend asked for cannot run this problem; the message says why.

    Example:
        >>> image_out, text_out = bidirectional_attention(q_image, q_text, v_image, v_text, cu_image, cu_text)

    Liu et al., Grounding DINO (2023); Tan and Bansal, LXMERT (2019); Li et al., GLIP (2022).
    """
    check_sides(query_a, query_b, value_a, value_b)
    second = None if dropout_seed is None else dropout_seed + 1
    out_a = varlen_cross_attention(
        query_a, query_b, value_b, cu_seqlens_a, cu_seqlens_b, scale=scale, softcap=softcap, key_bias=bias_b,
        dropout_p=dropout_p, dropout_seed=dropout_seed, backend=backend,
    )  # fmt: skip
    out_b = varlen_cross_attention(
        query_b, query_a, value_a, cu_seqlens_b, cu_seqlens_a, scale=scale, softcap=softcap, key_bias=bias_a,
        dropout_p=dropout_p, dropout_seed=second, backend=backend,
    )  # fmt: skip
    return out_a, out_b
