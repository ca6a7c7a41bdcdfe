"""Hugging Face Transformers 5: the attention implementation, its mask function, and adapters for named classes."""

from __future__ import annotations

import functools
from typing import Any

from fastxattn.integrations.catalogue import EAGER

IMPLEMENTATION = "fastxattn"


def register() -> None:
    """Make ``attn_implementation="fastxattn"`` known to transformers: the attention function *and* its masks.

    ::

        fastxattn.integrations.transformers.register()
        model.set_attn_implementation("fastxattn")      # or from_pretrained(..., attn_implementation="fastxattn")

    Safe to call again. :func:`fastxattn.accelerate` calls it. From then on ``set_attn_implementation`` and
    ``from_pretrained`` raise a ValueError for classes whose own attention code the name would break
    (:func:`unsupported`).

    Raises:
        ImportError: transformers 5 or later is not installed.
    """
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface, PreTrainedModel

    from fastxattn.integrations.transformers.attention import fastxattn_attention
    from fastxattn.integrations.transformers.masking import fastxattn_mask

    AttentionInterface.register(IMPLEMENTATION, fastxattn_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, fastxattn_mask)

    correct = PreTrainedModel.get_correct_attn_implementation
    if hasattr(correct, "_fastxattn"):
        return

    @functools.wraps(correct)
    def checked(self: Any, requested_attention: str | None, *args: Any, **kwargs: Any) -> Any:
        if requested_attention == IMPLEMENTATION and (reason := unsupported(self)):
            raise ValueError(f"attn_implementation={IMPLEMENTATION!r} is not for {type(self).__name__}: {reason}")
        return correct(self, requested_attention, *args, **kwargs)

    checked._fastxattn = True  # type: ignore[attr-defined]
    PreTrainedModel.get_correct_attn_implementation = checked


def unsupported(model: Any) -> str | None:
    """Why ``attn_implementation="fastxattn"`` would be wrong for a ``PreTrainedModel``, or None.

    Classes without sdpa support compute attention themselves, with masks that they expect in eager's form.
    """
    family = type(model).__module__.rpartition(".")[2].removeprefix("modeling_")
    if model._supports_sdpa or family in EAGER:
        return None
    return "transformers has no sdpa support for this class either: its layers add masks to scores themselves"
