"""Vision towers of the Qwen-VL kind: all images of a batch are one row of patches with ``cu_seqlens``.

Without flash-attention transformers splits that row and calls an attention function once per image, and once per
window in the layers with windowed attention.
"""

from __future__ import annotations

import sys
from typing import Any, ClassVar

from torch import Tensor

from fastxattn.integrations.core import worth
from fastxattn.integrations.swap import Adapter
from fastxattn.integrations.transformers import IMPLEMENTATION
from fastxattn.ops.attention import varlen_cross_attention


class VisionAttention(Adapter):
    """For ``Qwen2_5_VLVisionAttention`` and classes with the same code."""

    does: ClassVar[str] = "one call for all images and windows of a batch, whatever their sizes"

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        max_seqlen: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As the original's."""
        me: Any = self
        query, key, value = me.qkv(hidden_states).unflatten(-1, (3, me.num_heads, -1)).unbind(1)  # (total, heads, D)
        rows = query.transpose(0, 1)[None]
        if position_embeddings is None or me.config._attn_implementation != IMPLEMENTATION or not worth(rows, rows):
            return super().forward(hidden_states, cu_seqlens, position_embeddings, max_seqlen, **kwargs)  # type: ignore
        rotate = sys.modules[type(self).__module__].apply_rotary_pos_emb_vision
        query, key = rotate(query, key, *position_embeddings)
        out = varlen_cross_attention(query, key, value, cu_seqlens, cu_seqlens, scale=me.scaling)
        return me.proj(out.flatten(1))  # type: ignore[no-any-return]
