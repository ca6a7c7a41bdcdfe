"""Hugging Face Transformers 5: the attention implementation, its mask function, and adapters for named classes."""

from __future__ import annotations

IMPLEMENTATION = "fastxattn"


def register() -> None:
    """Make ``attn_implementation="fastxattn"`` known to transformers: the attention function *and* its masks.

    ::

        fastxattn.integrations.transformers.register()
        model.set_attn_implementation("fastxattn")      # or from_pretrained(..., attn_implementation="fastxattn")

    Safe to call again. :func:`fastxattn.accelerate` calls it.

    Raises:
        ImportError: transformers 5 or later is not installed.
    """
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    from fastxattn.integrations.transformers.attention import fastxattn_attention
    from fastxattn.integrations.transformers.masking import fastxattn_mask

    AttentionInterface.register(IMPLEMENTATION, fastxattn_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, fastxattn_mask)
