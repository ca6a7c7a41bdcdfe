"""prune(model): image-token pruning inside Hugging Face vision encoders and vision-language models, and its undo.

Nothing is copied or subclassed: forward hooks shorten the hidden states on their way into one layer, and put the last
hidden states of a language model back in place on the way out. Removing the hooks restores the model exactly.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from fastxattn.integrations.pruning_encoder import (
    EncoderPruning,
    QueriesAndKeys,
    attention_of,
    check_layer,
    class_tokens,
    encoder_layers,
    encoder_scores,
)
from fastxattn.integrations.pruning_language import LanguagePruning
from fastxattn.ops.pruning import Budget, Selection
from fastxattn.ops.pruning.strategies import Strategy, find_strategy
from fastxattn.runtime import html

_CLAIMED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class Pruning:
    """A model that prunes, until :meth:`undo` (or the end of a ``with`` block).

    ``last`` is the selection of the latest forward pass, None before the first.
    """

    def __init__(self) -> None:
        self._restore: list[Callable[[], None]] = []
        self.last: Selection | None = None

    def __repr__(self) -> str:
        return f"Pruning({'active' if self._restore else 'undone'}, last={self.last!r})"

    def _repr_html_(self) -> str:
        rows = [] if self.last is None else [(html.Markup(self.last._repr_html_()),)]
        return html.table(f"Pruning ({'active' if self._restore else 'undone'}), latest selection", (), rows)

    def undo(self) -> None:
        """Give the model back as it was."""
        while self._restore:
            self._restore.pop()()

    def claim(self, layers: nn.ModuleList) -> None:
        """Hold ``layers`` until the undo: two prunings would not know of each other's lengths."""
        if layers in _CLAIMED:
            raise ValueError("model must not be pruned already: undo the first pruning (or give `at` several layers)")
        _CLAIMED.add(layers)
        self._restore.append(lambda: _CLAIMED.discard(layers))

    def __enter__(self) -> Pruning:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def prune_model(
    model: nn.Module,
    *,
    keep: float | Budget,
    strategy: str = "attention",
    at: int | Sequence[int] | None = None,
    restore: bool = True,
) -> Pruning:
    """Make a Hugging Face model prune its image tokens.

    * Vision encoders (CLIP, SigLIP, DINOv2, DINOv2 with registers, ViT; the vision part of CLIPModel and SiglipModel):
      tokens are pruned before layer ``at`` (a third of the layers when None). CLS and register tokens are protected.
      ``attention`` ranks by the CLS token's attention in the layer before, or by column sums where there is no CLS.
      Merging strategies attend proportionally (log size as a bias) in the layers after.
    * Vision-language models (LLaVA, Qwen2-VL and models of their shape): ``at=0`` (or None) prunes between vision
      encoder and language model, ``at > 0`` inside the language model before that layer, by the last text token's
      attention (FastV). Positions are kept, images may differ in size, ``generate`` works with its cache. With
      ``restore`` the last hidden states come back at full length, zeros in place of pruned tokens, so that logits and
      labels line up; without it they are as short as the pruned sequence.

    Args:
        model: one of the above; it is changed in place.
        keep: the share of image tokens to keep, or a budget.
        strategy: a name of ``fastxattn.ops.pruning.STRATEGIES``.
        at: the layer before which tokens are pruned; several for encoders, where each time ``keep`` of the tokens that
            are left stay (stages as in PyramidDrop, steps as in ToMe; the sizes of merged tokens are carried along).
        restore: see above; vision-language models only.

    Returns:
        A handle; ``undo()`` or the end of a ``with`` block takes the pruning out again.

    Raises:
        ValueError: an unknown model or strategy, a model that is pruned already, a layer out of range, a budget that
            gives unequal lengths in an encoder of equal lengths, or scores that the model cannot provide there.
        TypeError: several layers for a language model.

    Papers: EViT (arXiv 2202.07800), ToMe (2210.09461), FastV (2403.06764), PyramidDrop (2410.17247), VisionZip
    (2412.04467).
    """
    chosen = find_strategy(strategy)
    budget = keep if isinstance(keep, Budget) else Budget.ratio(keep)
    pruning = Pruning()
    try:
        core = getattr(model, "model", model)
        if hasattr(core, "language_model"):
            _prune_language(core, pruning, budget, chosen, 0 if at is None else at, restore)
        else:
            EncoderPruning(model, pruning, budget, chosen, at).attach()
    except BaseException:
        pruning.undo()
        raise
    return pruning


def _prune_language(
    core: nn.Module, pruning: Pruning, budget: Budget, strategy: Strategy, at: Any, restore: bool
) -> None:
    language: Any = core.language_model
    check_layer(at, language.layers, 0)
    pruning.claim(language.layers)
    provider: Callable[[], Tensor] | None = None
    watch = None
    if "attention" in strategy.needs and at == 0:
        provider = _vision_attention(core, pruning)
    elif "attention" in strategy.needs:
        watch = QueriesAndKeys(attention_of(language.layers[at - 1]), pruning)
    LanguagePruning(core, pruning, budget, strategy, at, restore, provider, watch).attach()


def _vision_attention(core: nn.Module, pruning: Pruning) -> Callable[[], Tensor]:
    """Attention that each image feature received in the vision tower, by CLS or by column sums."""
    tower: Any = getattr(core, "vision_tower", None)
    if tower is None:
        raise ValueError(
            f"strategy must not need attention at layer 0 of {type(core).__name__} (its vision encoder has no "
            "attention over single image tokens); take divprune, cdpruner, norm, or at > 0"
        )
    config: Any = core.config
    layers, special = encoder_layers(tower), class_tokens(tower)
    place = config.vision_feature_layer
    if not isinstance(place, int):
        raise ValueError(f"strategy must not need attention where features come from several layers; got {place}")
    # hidden_states[i] leaves layer i - 1.
    index = place - 1 if place > 0 else len(layers) + place
    watch = QueriesAndKeys(attention_of(layers[index]), pruning)
    drop = special if config.vision_feature_select_strategy == "default" else 0

    def scores() -> Tensor:
        query, key = watch.take()
        flat, _ = encoder_scores(query, key, watch.scale, special > 0)
        images: Tensor = flat.unflatten(0, key.shape[:2])[:, drop:]
        return images.flatten()

    return scores
