"""Public function: two token sets that read each other."""

from __future__ import annotations

import torch
from torch import Tensor

from fastxattn.ops.arguments import default_scale
from fastxattn.ops.attention.backends import seed_tensor
from fastxattn.ops.co_attention.backends import run
from fastxattn.ops.co_attention.checks import check_seed
from fastxattn.ops.co_attention.problem import Problem


def co_attention(
    query_a: Tensor,
    query_b: Tensor,
    value_a: Tensor,
    value_b: Tensor,
    cu_seqlens_a: Tensor,
    cu_seqlens_b: Tensor,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    key_bias_a: Tensor | None = None,
    key_bias_b: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    r"""Compute co-attention of two packed token sets.

    Each side has one projection for scores and one for values.

    For the tokens i of side a and j of side b in the same sequence::

        s_ij    = scale * query_a_i . query_b_j          (capped when softcap is not 0)
        out_a_i = sum_j softmax_j(s_ij + key_bias_b_j) value_b_j          a reads b
        out_b_j = sum_i softmax_i(s_ij + key_bias_a_i) value_a_i          b reads a

    as in GroundingDINO's fusion layer and in LXMERT with shared projections. No matrix of scores is stored. The CPU
    kernel computes every tile of scores once and feeds both softmaxes from it, forward and backward; the Triton kernels
    share it in the backward pass; on other backends each direction is a call of attention with the sides swapped.
    GroundingDINO clamps its scores to +-50000 against overflow in float16; here they are float32 and each softmax
    subtracts its own maximum, so there is nothing to clamp.

    Args:
        query_a: (total_a, heads, head_dim) float32, bfloat16, float16 or float64.
        query_b: (total_b, heads, head_dim).
        value_a: (total_a, heads, value_dim_a).
        value_b: (total_b, heads, value_dim_b).
        cu_seqlens_a: (batch + 1,) int32 offsets of side a.
        cu_seqlens_b: (batch + 1,) int32 offsets of side b.
        scale: multiplies the scores; 1 / sqrt(head_dim) when None.
        softcap: soft limit on scores; 0 is off.
        key_bias_a: (total_a,) or (total_a, heads) float32, added to the scores where the tokens of side a are keys,
            that is where b reads a (the log of a merged token's size).
        key_bias_b: the same for side b.
        dropout_p: probability of dropping an attention weight, drawn for each direction on its own.
        dropout_seed: int or (1,) int64 tensor; the directions use it and its successor. None draws one.
        backend: ``"auto"``, or a name that is used or refused.

    Returns:
        out_a (total_a, heads, value_dim_b) and out_b (total_b, heads, value_dim_a), differentiable in everything. A
        token whose other side is empty gets 0.

    Raises:
        TypeError: an argument is not a tensor or has the wrong dtype.
        ValueError: a shape, device, offset or number is wrong, or there is no such backend.
        RuntimeError: the backend asked for cannot run this problem; the message says why.

    Example:
        >>> image_out, text_out = co_attention(q_image, q_text, v_image, v_text, cu_image, cu_text)

    Liu et al., Grounding DINO (2023); Tan and Bansal, LXMERT (2019); Li et al., GLIP (2022).
    """
    seeds = None
    if dropout_p:
        check_seed(dropout_seed, query_a)
        first = seed_tensor(dropout_seed, query_a.device)
        seeds = torch.cat([first, first + 1])
    problem = Problem(
        query_a=query_a,
        query_b=query_b,
        value_a=value_a,
        value_b=value_b,
        cu_seqlens_a=cu_seqlens_a,
        cu_seqlens_b=cu_seqlens_b,
        key_bias_a=key_bias_a,
        key_bias_b=key_bias_b,
        scale=default_scale(query_a, scale),
        softcap=softcap,
        dropout_p=dropout_p,
        dropout_seed=seeds,
    )
    return run(problem, backend)
