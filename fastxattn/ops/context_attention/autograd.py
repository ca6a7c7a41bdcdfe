"""The autograd.Function around the compiled backends: the one place that saves tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastxattn.ops.context_attention.schema import NEEDS


class ContextAttention(torch.autograd.Function):
    """Differentiates ``fastxattn::context_attention_<backend>`` for query, context and key_bias."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        context: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        kv_range: Tensor | None,
        key_bias: Tensor | None,
        scale: float,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        """Run the forward operator and keep what its gradient needs."""
        op = getattr(torch.ops.fastxattn, f"context_attention_{backend}")
        out, lse, softmax = op(query, context, cu_seqlens_q, cu_seqlens_k, kv_range, key_bias, scale)
        ctx.save_for_backward(query, context, cu_seqlens_q, cu_seqlens_k, kv_range, key_bias, out, lse, softmax)
        ctx.scale, ctx.backend = scale, backend
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of query, context and key_bias, those that are needed."""
        grad_out, grad_lse = grads
        query, context, cu_q, cu_k, kv_range, key_bias, out, lse, softmax = ctx.saved_tensors
        asked = ctx.needs_input_grad
        wanted = {"query": asked[0], "context": asked[1], "key_bias": asked[5]}
        needs = sum(NEEDS[name] for name, want in wanted.items() if want)
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out.contiguous()
        grad_lse = None if grad_lse is None else grad_lse.contiguous()
        op = getattr(torch.ops.fastxattn, f"context_attention_backward_{ctx.backend}")
        gq, gc, gb = op(
            grad_out, grad_lse, out, lse, softmax, query, context, cu_q, cu_k, kv_range, key_bias, ctx.scale, needs
        )  # fmt: skip
        return (
            gq if wanted["query"] else None,
            gc if wanted["context"] else None,
            None,
            None,
            None,
            gb if wanted["key_bias"] else None,
            None,
            None,
        )
