"""torch.nn's own attention: MultiheadAttention, and the encoder layer whose native fast path would go around it."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastxattn.integrations import calls
from fastxattn.integrations.core import plain_linear, read
from fastxattn.integrations.swap import Adapter
from fastxattn.nn.projected import KeyValueWeights

_unused: contextvars.ContextVar[bool] = contextvars.ContextVar("attention_weights_unused", default=False)


@contextlib.contextmanager
def weights_unused() -> Iterator[None]:
    """Inside, attention weights that modules ask for are not looked at: for adapters of modules that drop them."""
    token = _unused.set(True)
    try:
        yield
    finally:
        _unused.reset(token)


def weights_are_unused() -> bool:
    """Whether the caller said so (:func:`weights_unused`)."""
    return not torch.compiler.is_compiling() and _unused.get()


class MultiheadAttention(Adapter):
    """For ``torch.nn.MultiheadAttention``; with ``need_weights=True`` (its default) the original runs."""

    does: ClassVar[str] = "attention over valid tokens, which alone are projected (with need_weights=False)"

    @classmethod
    def refuses(cls, module: nn.Module, parent: nn.Module | None) -> str | None:
        """Refuse extra keys, and heads wider than the kernel's."""
        if module.bias_k is not None or module.add_zero_attn:
            return "add_bias_kv and add_zero_attn append keys that are not tokens"
        if module.head_dim > 256:  # type: ignore[operator]
            return f"its head_dim, {module.head_dim}, is above 256"
        return None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As the original's."""
        reason = self._why_not(query, need_weights and not weights_are_unused(), is_causal and attn_mask is None)
        out = None
        if reason:
            calls.note(reason)
        else:
            out = self._attend(query, key, value, key_padding_mask, attn_mask)
        if out is not None:
            return out, None
        need_weights = need_weights and not weights_are_unused()
        return super().forward(  # type: ignore
            query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )

    def _why_not(self, query: Tensor, weights: bool, refused: bool) -> str:
        if weights:
            return "attention weights were requested (need_weights=True, the default of nn.MultiheadAttention)"
        if query.is_nested or query.dim() != 3:
            return "nested tensors" if query.is_nested else "an input without a batch axis"
        if refused:
            return "is_causal without attn_mask, which torch refuses"
        plain = plain_linear(self.out_proj)  # type: ignore[attr-defined]
        return "" if plain else "its out_proj must be called as it is"

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, attn_mask: Tensor | None
    ) -> Tensor | None:
        me: Any = self
        same = key is value
        if not me.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        size, weight, bias = me.embed_dim, me.in_proj_weight, me.in_proj_bias
        weights = (me.q_proj_weight, me.k_proj_weight, me.v_proj_weight) if weight is None else weight.split(size)
        biases = (None, None, None) if bias is None else bias.split(size)
        mask = combined_mask(padding, attn_mask, query.shape[0], me.num_heads)
        out = read(
            F.linear(query, weights[0], biases[0]),
            key,
            mask,
            KeyValueWeights(weights[1], weights[2], biases[1], biases[2]),
            heads=me.num_heads,
            scale=me.head_dim**-0.5,
            dropout_p=me.dropout if me.training else 0.0,
            values=None if same else value,
        )
        if out is None:
            return None
        # The result of (length, batch, width) is contiguous, as the original's.
        return me.out_proj(out if me.batch_first else out.transpose(0, 1).contiguous())  # type: ignore[no-any-return]


def combined_mask(padding: Tensor | None, attn_mask: Tensor | None, batch: int, heads: int) -> Tensor | None:
    """torch.nn's two masks (True or -inf = hidden) as one of 4 axes: boolean True = sees, or additive."""
    if attn_mask is not None:
        attn_mask = attn_mask.unflatten(0, (batch, heads)) if attn_mask.dim() == 3 else attn_mask[None, None]
    if padding is not None:
        padding = padding[:, None, None, :]
    both = [m for m in (padding, attn_mask) if m is not None]
    if all(m.dtype == torch.bool for m in both):
        seen = [~m for m in both]
        return None if not seen else seen[0] if len(seen) == 1 else seen[0] & seen[1]
    added = [m if m.dtype != torch.bool else torch.where(m, -torch.inf, 0.0) for m in both]
    return added[0] if len(added) == 1 else added[0] + added[1]


class TransformerEncoderLayer(Adapter):
    """For ``nn.TransformerEncoderLayer``.

    Its native fast path (evaluation, no gradients) reads the weights of ``self_attn`` and never calls the module. On
    ordinary tensors this runs the blocks instead; nested tensors, which ``nn.TransformerEncoder`` makes of padded
    batches there, keep the native path.
    """

    does: ClassVar[str] = "runs its attention module, which the native fast path would go around"

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """As the original's."""
        me: Any = self
        if src.is_nested or torch.is_grad_enabled() or me.training:
            calls.note("nested tensors keep the native fast path" if src.is_nested else "")
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)  # type: ignore
        if me.norm_first:
            src = src + me._sa_block(me.norm1(src), src_mask, src_key_padding_mask, is_causal=is_causal)
            return src + me._ff_block(me.norm2(src))  # type: ignore[no-any-return]
        src = me.norm1(src + me._sa_block(src, src_mask, src_key_padding_mask, is_causal=is_causal))
        return me.norm2(src + me._ff_block(src))  # type: ignore[no-any-return]


class SiglipPoolingHead(Adapter):
    """For SigLIP's ``*MultiheadAttentionPoolingHead``: one learned query per image."""

    does: ClassVar[str] = "one query per image: projections of the patches absorbed, attention map not computed"

    def forward(self, hidden_state: Tensor) -> Tensor:
        """As the original's."""
        me: Any = self
        probe = me.probe.expand(hidden_state.shape[0], -1, -1)
        pooled = me.attention(probe, hidden_state, hidden_state, need_weights=False)[0]
        return (pooled + me.mlp(me.layernorm(pooled)))[:, 0]  # type: ignore[no-any-return]
