"""Co-attention modules: GroundingDINO's fusion and LXMERT's shared cross-attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastxattn.nn.packing import Tokens, check_same_batch, pack
from fastxattn.nn.projected import Absorb, KeyValueWeights, cross_attend
from fastxattn.ops.co_attention import co_attention
from fastxattn.packed import PackedTokens


class CoAttention(nn.Module):
    """Image and text attend to each other through one similarity: its softmax over text, and over image.

    ::

        S = scale (image W_i) (text W_t)^T
        image_out = softmax_text(S) (text W_vt) W_oi      text_out = softmax_image(S^T) (image W_vi) W_ot

    Parameters and ``state_dict`` of Hugging Face's ``GroundingDinoBiMultiHeadAttention``.

    Args:
        image_dim: width of the image tokens.
        text_dim: width of the text tokens.
        embed_dim: width of all heads together.
        num_heads: heads.
        dropout: on attention weights, in training.

    Source: Li et al., "Grounded language-image pre-training", 2022; Liu et al., "Grounding DINO", 2023.
    """

    def __init__(self, image_dim: int, text_dim: int, embed_dim: int, num_heads: int, dropout: float = 0.0) -> None:
        if embed_dim % num_heads:
            raise ValueError(f"num_heads must divide embed_dim; got {num_heads} and {embed_dim}")
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.vision_proj = nn.Linear(image_dim, embed_dim)
        self.text_proj = nn.Linear(text_dim, embed_dim)
        self.values_vision_proj = nn.Linear(image_dim, embed_dim)
        self.values_text_proj = nn.Linear(text_dim, embed_dim)
        self.out_vision_proj = nn.Linear(embed_dim, image_dim)
        self.out_text_proj = nn.Linear(embed_dim, text_dim)

    @classmethod
    def from_hf(cls, module: Any) -> CoAttention:
        """A module that shares the parameters of a ``GroundingDinoBiMultiHeadAttention``."""
        with torch.device("meta"):
            new = cls(module.vision_dim, module.text_dim, module.embed_dim, module.num_heads, module.dropout)
        new.load_state_dict(module.state_dict(keep_vars=True), assign=True)
        return new.train(module.training)

    def forward(
        self,
        image: Tokens,
        text: Tokens,
        *,
        image_mask: torch.Tensor | None = None,
        text_mask: torch.Tensor | None = None,
    ) -> tuple[Tokens, Tokens]:
        """Compute both updates, each in its input's form.

        Args:
            image: (batch, Li, image_dim) or PackedTokens.
            text: (batch, Lt, text_dim) or PackedTokens.
            image_mask: (batch, Li) boolean, True = valid token (the original's masks are inverted).
            text_mask: (batch, Lt) boolean.
        """
        images, image_layout = pack(image, image_mask, name="image")
        texts, text_layout = pack(text, text_mask, name="text")
        check_same_batch(images, texts)

        def heads(tokens: PackedTokens, linear: nn.Linear) -> torch.Tensor:
            return linear(tokens.values).unflatten(-1, (self.num_heads, -1))  # type: ignore[no-any-return]

        image_key, image_value = heads(images, self.vision_proj), heads(images, self.values_vision_proj)
        text_key, text_value = heads(texts, self.text_proj), heads(texts, self.values_text_proj)
        dropout = self.dropout if self.training else 0.0
        to_image, to_text = co_attention(
            image_key, text_key, image_value, text_value, images.cu_seqlens, texts.cu_seqlens, dropout_p=dropout
        )
        return (
            image_layout.restore(self.out_vision_proj(to_image.flatten(1))),
            text_layout.restore(self.out_text_proj(to_text.flatten(1))),
        )


class _Projections(nn.Module):
    def __init__(self, hidden: int, context: int) -> None:
        super().__init__()
        self.query = nn.Linear(hidden, hidden)
        self.key = nn.Linear(context, hidden)
        self.value = nn.Linear(context, hidden)


class _Output(nn.Module):
    def __init__(self, hidden: int, dropout: float) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden, hidden)
        self.LayerNorm = nn.LayerNorm(hidden, eps=1e-12)
        self.dropout = nn.Dropout(dropout)


class SharedCrossAttention(nn.Module):
    """LXMERT's cross-attention: one set of weights, used by text over image and by image over text.

    ``out = LayerNorm(attention(tokens, context) W_o + b_o + tokens)`` in each direction, both from the inputs.
    Parameters and ``state_dict`` of Hugging Face's ``LxmertCrossAttentionLayer``.

    Source: Tan and Bansal, "LXMERT", 2019.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        absorb: Absorb = "auto",
    ) -> None:
        if hidden_size % num_heads:
            raise ValueError(f"num_heads must divide hidden_size; got {num_heads} and {hidden_size}")
        super().__init__()
        self.num_heads, self.attention_dropout, self.absorb = num_heads, attention_dropout, absorb
        self.att = _Projections(hidden_size, hidden_size)
        self.output = _Output(hidden_size, dropout)

    @classmethod
    def from_hf(cls, module: Any, absorb: Absorb = "auto") -> SharedCrossAttention:
        """A module that shares the parameters of a ``LxmertCrossAttentionLayer``."""
        inner = module.att
        with torch.device("meta"):
            new = cls(
                inner.head_size,
                inner.num_attention_heads,
                dropout=module.output.dropout.p,
                attention_dropout=inner.dropout.p,
                absorb=absorb,
            )
        new.load_state_dict(module.state_dict(keep_vars=True), assign=True)
        return new.train(module.training)

    def _attend(self, tokens: PackedTokens, context: PackedTokens) -> torch.Tensor:
        query = self.att.query(tokens.values).unflatten(-1, (self.num_heads, -1))
        weights = KeyValueWeights.of(self.att.key, self.att.value)
        dropout = self.attention_dropout if self.training else 0.0
        out = cross_attend(query, tokens, context, weights, absorb=self.absorb, dropout_p=dropout)
        output = self.output
        return output.LayerNorm(output.dropout(output.dense(out)) + tokens.values)  # type: ignore[no-any-return]

    def forward(
        self,
        text: Tokens,
        image: Tokens,
        *,
        text_mask: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
    ) -> tuple[Tokens, Tokens]:
        """Attend text over image and image over text; each result in its input's form, (batch, length, hidden_size)."""
        texts, text_layout = pack(text, text_mask, name="text")
        images, image_layout = pack(image, image_mask, name="image")
        return text_layout.restore(self._attend(texts, images)), image_layout.restore(self._attend(images, texts))
