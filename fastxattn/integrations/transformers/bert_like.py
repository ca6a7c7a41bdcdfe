"""Attention of LXMERT, FLAVA, ViLT and GroupViT, written out in each class."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from fastxattn.integrations.core import projections, read
from fastxattn.integrations.swap import Adapter
from fastxattn.integrations.transformers.capturing import wants_maps


def _read(module: Any, hidden_states: Tensor, context: Tensor, mask: Tensor | None) -> Tensor | None:
    return read(
        module.query(hidden_states),
        context,
        mask,
        projections(module.key, module.value),
        heads=module.num_attention_heads,
        scale=module.attention_head_size**-0.5,
        dropout_p=module.dropout.p if module.training else 0.0,
    )


class LxmertAttention(Adapter):
    """For ``LxmertAttention``, between modalities and within one."""

    does: ClassVar[str] = "attention over valid tokens, which alone are projected"

    def forward(
        self,
        hidden_states: Tensor,
        context: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, ...]:
        """As the original's."""
        out = None
        if not output_attentions and not wants_maps(self):
            out = _read(self, hidden_states, context, attention_mask)
        if out is None:
            return super().forward(hidden_states, context, attention_mask, output_attentions)  # type: ignore
        return (out,)


class SelfAttention(Adapter):
    """For ``FlavaSelfAttention`` and ``ViltSelfAttention``."""

    does: ClassVar[str] = "attention over valid tokens, without the attention map"

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, output_attentions: bool = False
    ) -> tuple[Tensor, ...]:
        """As the original's."""
        out = None
        if not output_attentions and not wants_maps(self):
            out = _read(self, hidden_states, hidden_states, attention_mask)
        if out is None:
            return super().forward(hidden_states, attention_mask, output_attentions)  # type: ignore
        return (out,)


class GroupViTAttention(Adapter):
    """For ``GroupViTAttention``, self- and cross-."""

    does: ClassVar[str] = "attention without the attention map"

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As the original's."""
        me: Any = self
        out = None
        if not wants_maps(self, me.config, kwargs):
            out = read(
                me.q_proj(hidden_states),
                hidden_states if encoder_hidden_states is None else encoder_hidden_states,
                attention_mask,
                projections(me.k_proj, me.v_proj),
                heads=me.num_heads,
                scale=me.scale,
                dropout_p=me.dropout if me.training else 0.0,
            )
        if out is None:
            return super().forward(hidden_states, attention_mask, encoder_hidden_states, **kwargs)  # type: ignore
        return me.out_proj(out), None
