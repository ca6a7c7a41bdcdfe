"""CLIP: the text tower is causal and pools at its end token, so what comes after that token need not be computed."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fastxattn.integrations.masks import PackedMask
from fastxattn.integrations.swap import Adapter
from fastxattn.integrations.transformers import IMPLEMENTATION
from fastxattn.integrations.transformers.capturing import wants_maps
from fastxattn.integrations.transformers.hook import AttentionHook
from fastxattn.packed import PackedTokens


class ClipModel(AttentionHook):
    """For ``CLIPModel``, which uses nothing of its text tower but the pooled end token."""

    changes: ClassVar[tuple[str, ...]] = ("text_model_output.last_hidden_state",)

    does: ClassVar[str] = "text states after the end token become 0 and are not computed"
    exact: ClassVar[bool] = False

    def get_text_features(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the original's; ``last_hidden_state`` is 0 past each end token."""
        return super().get_text_features(  # type: ignore[misc]
            input_ids, attention_mask, position_ids, only_end_token=True, **kwargs
        )


class ClipText(AttentionHook):
    """For ``CLIPTextModel``: finds the end tokens."""

    does: ClassVar[str] = "inside CLIPModel, cuts each text after its end token; attention function"

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        only_end_token: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As the original's, with ``only_end_token`` from :class:`ClipModel`."""
        config: Any = self.config  # type: ignore[attr-defined]
        whole = wants_maps(self, config, kwargs) or kwargs.get("output_hidden_states", config.output_hidden_states)
        if only_end_token and input_ids is not None and not whole and config._attn_implementation == IMPLEMENTATION:
            ids = input_ids.view(-1, input_ids.shape[-1])
            # The two rules of CLIPTextModel's own pooling.
            ends = ids.int() if self.eos_token_id == 2 else (ids == self.eos_token_id).int()  # type: ignore[attr-defined]
            lengths = ends.argmax(-1) + 1
            if attention_mask is None or _only_after_end(attention_mask, lengths):
                kwargs["text_lengths"] = lengths
                attention_mask = None
        return super().forward(input_ids, attention_mask, position_ids, **kwargs)  # type: ignore[misc]


class ClipEncoder(Adapter):
    """For ``CLIPEncoder``: runs all layers on the tokens that count."""

    does: ClassVar[str] = "runs packed tokens through all layers of a cut text tower"

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        text_lengths: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the original's, with ``text_lengths`` from :class:`ClipText`."""
        if text_lengths is None:
            return super().forward(inputs_embeds, attention_mask, **kwargs)  # type: ignore[misc]
        place = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
        packed = PackedTokens.from_padded(inputs_embeds, place < text_lengths[:, None])
        ends = packed.positions().to(torch.int32) + 1
        mask = PackedMask(
            packed.cu_seqlens,
            packed.max_seqlen,
            packed.cu_seqlens,
            packed.max_seqlen,
            torch.stack([torch.zeros_like(ends), ends], -1),
        )
        out = super().forward(packed.values[None], mask, **kwargs)  # type: ignore[misc]
        out.last_hidden_state = packed.with_values(out.last_hidden_state[0]).to_padded(length=inputs_embeds.shape[1])[0]
        return out


def _only_after_end(attention_mask: Tensor, lengths: Tensor) -> bool:
    """Whether a mask hides nothing before the end tokens (read on the CPU only)."""
    if attention_mask.device.type != "cpu" or torch.compiler.is_compiling() or attention_mask.ndim != 2:
        return False
    place = torch.arange(attention_mask.shape[1], device="cpu")
    return not bool(((attention_mask == 0) & (place < lengths[:, None])).any())
