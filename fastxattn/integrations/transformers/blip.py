"""BLIP: one image against many texts is projected once, however its features were repeated over the batch."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fastxattn.integrations.core import attend_padded, projections, read, worth
from fastxattn.integrations.masks import PackedMask, Visible, recognise
from fastxattn.integrations.swap import Adapter
from fastxattn.integrations.transformers.capturing import wants_maps


class BlipTextEncoder(Adapter):
    """For ``BlipTextEncoder``: finds texts that read the same image features."""

    does: ClassVar[str] = "texts that read the same image share its keys and values"

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the original's."""
        mask: Any = encoder_attention_mask
        features, batch = encoder_hidden_states, hidden_states.shape[0]
        plain = past_key_values is None and not use_cache and not wants_maps(self, None, kwargs)
        if plain and features is not None and batch > 1:
            # transformers 5 loses a BLIP encoder mask on the way to its cross-attention: texts see padded features.
            # Where nothing is padded that makes no difference; elsewhere the layers decide, as they do there.
            visible = recognise(mask, batch, hidden_states.shape[1], features.shape[1])
            groups = shared(features, batch) if visible.everything else None
            if groups is not None:
                encoder_hidden_states, mask = share(features, groups, hidden_states.shape[1])
        return super().forward(  # type: ignore[misc]
            hidden_states,
            attention_mask=attention_mask,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )


def shared(features: Tensor, batch: int) -> list[int] | None:
    """Sizes of runs of batch entries with equal features; None where every entry differs.

    A stride of 0 shows it for nothing. Repeated copies are compared, on the CPU and only where no gradient has to
    reach each copy: one comparison costs a thousandth of a projection.
    """
    if features.shape[0] == 1 or features.stride(0) == 0:
        return [batch]
    if features.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    if features.requires_grad and torch.is_grad_enabled():
        return None
    sizes = [1]
    for i in range(1, batch):
        if torch.equal(features[i, :1], features[i - 1, :1]) and torch.equal(features[i], features[i - 1]):
            sizes[-1] += 1
        else:
            sizes.append(1)
    return sizes if len(sizes) < batch else None


def share(features: Tensor, sizes: list[int], queries: int) -> tuple[Tensor, PackedMask]:
    """The distinct features, packed, and the mask under which each run of queries is one sequence."""
    ends = torch.tensor(sizes, device=features.device).cumsum(0)
    distinct = features[:1] if len(sizes) == 1 else features[ends - 1]
    length = distinct.shape[1]
    starts = torch.arange(len(sizes) + 1, dtype=torch.int32, device=features.device) * length
    starts_q = torch.nn.functional.pad(ends * queries, (1, 0)).to(torch.int32)
    return distinct.flatten(0, 1)[None], PackedMask(starts, length, starts_q, max(sizes) * queries)


class BlipTextAttention(Adapter):
    """For ``BlipTextSelfAttention``, self- and cross-."""

    does: ClassVar[str] = "attention over valid keys; cross-attention projects those alone"

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | PackedMask | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As the original's."""
        me: Any = self
        crossing = encoder_hidden_states is not None
        mask = encoder_attention_mask if crossing and not isinstance(attention_mask, PackedMask) else attention_mask
        packed = isinstance(mask, PackedMask)
        features = encoder_hidden_states if crossing else hidden_states
        assert features is not None
        out = None
        same_batch = packed or features.shape[0] == hidden_states.shape[0]
        if past_key_values is None and same_batch and (packed or not wants_maps(self, None, kwargs)):
            out = read(
                me.query(hidden_states),
                features,
                mask,
                projections(me.key, me.value),
                heads=me.num_attention_heads,
                scale=me.attention_head_size**-0.5,
                dropout_p=me.dropout.p if me.training else 0.0,
            )
        if out is not None:
            return out, None
        return super().forward(  # type: ignore
            hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, past_key_values, **kwargs
        )


class BlipVisionAttention(Adapter):
    """For ``BlipAttention``, the vision tower's."""

    does: ClassVar[str] = "attention without the attention map"

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As the original's."""
        me: Any = self
        rows = hidden_states[:, None]
        if wants_maps(self, None, kwargs) or not worth(rows, rows):
            return super().forward(hidden_states, **kwargs)  # type: ignore
        query, key, value = me.qkv(hidden_states).unflatten(-1, (3, me.num_heads, me.head_dim)).unbind(2)
        dropout = me.dropout.p if me.training else 0.0
        out = attend_padded(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            Visible(),
            scale=me.scale,
            dropout_p=dropout,
        )
        return me.projection(out.flatten(2)), None
