"""SigLIP 2 with NaFlex: images of different sizes, padded; one learned query reads each image's patches."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fastxattn.integrations.swap import Adapter


class Siglip2PoolingHead(Adapter):
    """For ``Siglip2MultiheadAttentionPoolingHead``, which asks for an attention map and drops it."""

    does: ClassVar[str] = "one query per image: only valid patches are read, attention map not computed"

    def forward(self, hidden_state: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """As the original's."""
        me: Any = self
        padding = None if attention_mask is None else attention_mask == 0
        # An image without patches averages its padding; whether there is one cannot be asked in a trace.
        if padding is not None and (torch.compiler.is_compiling() or bool(padding.all(1).any())):
            return super().forward(hidden_state, attention_mask)  # type: ignore
        probe = me.probe.expand(hidden_state.shape[0], -1, -1)
        pooled = me.attention(probe, hidden_state, hidden_state, key_padding_mask=padding, need_weights=False)[0]
        return (pooled + me.mlp(me.layernorm(pooled)))[:, 0]  # type: ignore[no-any-return]
