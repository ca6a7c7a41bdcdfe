"""Image-token pruning inside Hugging Face vision encoders and vision-language models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from fastxattn.integrations.pruning.encoder import EncoderPruning
from fastxattn.integrations.pruning.handle import Pruning
from fastxattn.integrations.pruning.language import LanguagePruning, default_strategy, language_model
from fastxattn.ops.pruning import Budget
from fastxattn.ops.pruning.strategies import find_strategy


def prune_model(
    model: nn.Module,
    *,
    keep: float | Budget,
    strategy: str = "auto",
    at: int | Sequence[int] | None = None,
    full_length: bool = True,
) -> Pruning:
    """Make a Hugging Face model prune its image tokens.

    Nothing is copied or subclassed: forward hooks shorten the hidden states on their way into one layer, and bring the
    last hidden states of a language model back to full length.

    * Vision encoders (CLIP, SigLIP, DINOv2, DINOv2 with registers, ViT; the vision part of CLIPModel and SiglipModel):
      tokens are pruned before layer ``at`` (a third of the layers when None). CLS and register tokens are protected.
      ``attention`` ranks by the CLS token's attention in the layer before, or by column sums where there is no CLS.
      Merging strategies attend proportionally (log size as a bias) in the layers after.
    * Vision-language models (LLaVA, Qwen-VL, InternVL, Gemma 3, PaliGemma and models of their shape): ``at=0`` (or
      None) prunes between vision encoder and language model, ``at > 0`` inside the language model before that layer,
      by the last valid text token's attention (FastV). Positions are kept, images may differ in size, and the cache
      reports the length without pruning, so that ``generate`` works in its modes. With
      ``full_length`` the last hidden states have the prompt's length, zeros in place of pruned tokens, so that logits
      and labels line up; without it they are as short as the pruned sequence.

    Args:
        model: one of the above; it is changed in place.
        keep: the share of image tokens to keep, or a budget.
        strategy: a name of ``fastxattn.ops.pruning.STRATEGIES``; :func:`fastxattn.register_strategy` adds to it.
            "auto" is "attention", or "divprune" in vision-language models without attention over image tokens there.
        at: the layer before which tokens are pruned; several for encoders, where each time ``keep`` of the tokens that
            are left stay (stages as in PyramidDrop, steps as in ToMe; the sizes of merged tokens are carried along).
        full_length: see above; vision-language models only.

    Returns:
        A handle. Its ``restore()``, the end of a ``with`` block or :func:`fastxattn.restore` takes the pruning out.

    Raises:
        ValueError: an unknown model or strategy, a model that is pruned already, a layer out of range, a budget that
            gives unequal lengths in an encoder of equal lengths, or scores that the model cannot provide there. A
            selection that breaks a rule of the strategies is refused in the forward pass.
        TypeError: several layers for a language model.

    Example:
        >>> with fastxattn.prune_model(vision_model, keep=0.25, at=2) as pruning:  # a CLIP encoder, 16 patches
        ...     features = vision_model(pixels).last_hidden_state  # CLS and 4 patches of each image
        >>> pruning.last.cu_seqlens.tolist()
        [0, 5, 10]

    Papers: EViT (arXiv 2202.07800), ToMe (2210.09461), FastV (2403.06764), PyramidDrop (2410.17247), VisionZip
    (2412.04467).
    """
    core = getattr(model, "model", model)
    language = language_model(core)
    place: Any = 0 if at is None else at
    if strategy == "auto":
        strategy = default_strategy(core, place) if language is not None else EncoderPruning.default_strategy(model)
    chosen = find_strategy(strategy)
    budget = keep if isinstance(keep, Budget) else Budget.ratio(keep)
    pruning = Pruning()
    try:
        if language is not None:
            LanguagePruning(core, pruning, budget, chosen, place, full_length).attach()
        else:
            EncoderPruning(model, pruning, budget, chosen, at).attach()
    except BaseException:
        pruning.restore()
        raise
    return pruning
