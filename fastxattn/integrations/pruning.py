"""prune(model): image-token pruning inside Hugging Face vision encoders and vision-language models, and its undo.

Nothing is copied or subclassed: forward hooks shorten the hidden states on their way into one layer, and put the last
hidden states of a language model back in place on the way out. Removing the hooks restores the model exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from fastxattn.integrations.pruning_language import LanguagePruning
from fastxattn.ops.pruning import Budget, Selection, probe_scores, received_scores
from fastxattn.ops.pruning.strategies import NEEDS_ATTENTION, STRATEGIES


class Pruning:
    """A model that prunes, until :meth:`undo` (or the end of a ``with`` block).

    ``last`` is the selection of the latest forward pass, None before the first.
    """

    def __init__(self) -> None:
        self._restore: list[Callable[[], None]] = []
        self.last: Selection | None = None

    def undo(self) -> None:
        """Give the model back as it was."""
        while self._restore:
            self._restore.pop()()

    def __enter__(self) -> Pruning:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


class QueriesAndKeys:
    """The query and key rows that an attention module computed last, taken from its own projections."""

    def __init__(self, attention: Any, pruning: Pruning) -> None:
        self.query: Tensor | None = None
        self.key: Tensor | None = None
        for name in ("q_proj", "k_proj"):
            if not hasattr(attention, name):
                raise ValueError(
                    f"attention scores need {type(attention).__name__}.{name}, which this model does not have"
                )
            handle = getattr(attention, name).register_forward_hook(self._keep(name))
            pruning._restore.append(handle.remove)
        self.head_dim = int(attention.head_dim)
        self.scale = float(getattr(attention, "scaling", getattr(attention, "scale", self.head_dim**-0.5)))

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            setattr(self, "query" if name == "q_proj" else "key", output)

        return hook

    def take(self) -> tuple[Tensor, Tensor]:
        """(batch, length, heads, head_dim) each; forgotten afterwards."""
        query, key = self.query, self.key
        if query is None or key is None:
            raise RuntimeError("the attention layer before the pruned one did not run")
        self.query = self.key = None
        return query.unflatten(-1, (-1, self.head_dim)), key.unflatten(-1, (-1, self.head_dim))


def prune(
    model: nn.Module,
    *,
    keep: float | Budget,
    strategy: str = "attention",
    at: int | None = None,
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
        at: the layer before which tokens are pruned.
        restore: see above; vision-language models only.

    Returns:
        A handle; ``undo()`` or the end of a ``with`` block takes the pruning out again.

    Raises:
        ValueError: an unknown model or strategy, a layer out of range, a budget that gives unequal lengths in an
            encoder of equal lengths, or scores that the model cannot provide there.

    Papers: EViT (arXiv 2202.07800), ToMe (2210.09461), FastV (2403.06764), VisionZip (2412.04467).
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}; got {strategy!r}")
    budget = keep if isinstance(keep, Budget) else Budget.ratio(keep)
    pruning = Pruning()
    try:
        core = getattr(model, "model", model)
        if hasattr(core, "language_model"):
            _prune_language(core, pruning, budget, strategy, 0 if at is None else at, restore)
        else:
            _prune_encoder(model, pruning, budget, strategy, at)
    except BaseException:
        pruning.undo()
        raise
    return pruning


def encoder_layers(model: nn.Module) -> nn.ModuleList:
    """The layers of a vision encoder, wherever its class keeps them."""
    for path in (
        "vision_model.encoder.layers", "encoder.layers", "encoder.layer", "layers", "dinov2.encoder.layer",
        "dinov2_with_registers.encoder.layer", "vit.layers", "vit.encoder.layer",
    ):  # fmt: skip
        found: Any = model
        for name in path.split("."):
            found = getattr(found, name, None)
        if isinstance(found, nn.ModuleList):
            return found
    raise ValueError(
        f"model must be a CLIP, SigLIP, DINOv2 or ViT encoder, or a LLaVA or Qwen2-VL; got {type(model).__name__}"
    )


def class_tokens(model: nn.Module) -> int:
    """How many CLS and register tokens stand before the patches."""
    for module in model.modules():
        if "Embeddings" in type(module).__name__ and "Patch" not in type(module).__name__:
            if isinstance(getattr(module, "class_embedding", None), Tensor) or isinstance(
                getattr(module, "cls_token", None), Tensor
            ):
                registers = getattr(module, "register_tokens", None)
                return 1 + (registers.shape[1] if isinstance(registers, Tensor) else 0)
            if hasattr(module, "patch_embedding"):
                return 0
    raise ValueError(f"model must have image embeddings with or without a CLS token; got {type(model).__name__}")


def attention_of(layer: nn.Module) -> nn.Module:
    """The self-attention module of an encoder or decoder layer."""
    for name in ("self_attn", "attention", "attn"):
        if isinstance(getattr(layer, name, None), nn.Module):
            return getattr(layer, name)  # type: ignore[no-any-return]
    raise ValueError(f"layers must have a self_attn or attention module; {type(layer).__name__} has not")


def _check_layer(at: int, layers: nn.ModuleList, lowest: int) -> None:
    if not lowest <= at < len(layers):
        raise ValueError(f"at must lie in [{lowest}, {len(layers)}); got {at}")


def encoder_scores(query: Tensor, key: Tensor, scale: float, cls: bool) -> tuple[Tensor, Tensor]:
    """Attention received by (batch, length) tokens as packed (total,) scores, with their offsets."""
    batch, length = key.shape[:2]
    offsets = torch.arange(batch + 1, dtype=torch.int32, device=key.device) * length
    packed = key.flatten(0, 1)
    if cls:
        return probe_scores(query[:, 0], packed, offsets, scale), offsets
    return received_scores(query.flatten(0, 1), packed, offsets, scale, max_seqlen=length), offsets


def _prune_encoder(model: nn.Module, pruning: Pruning, budget: Budget, strategy: str, at: int | None) -> None:
    vision = getattr(model, "vision_model", model)
    layers, special = encoder_layers(vision), class_tokens(vision)
    at = max(1, len(layers) // 3) if at is None else at
    _check_layer(at, layers, 1 if strategy in NEEDS_ATTENTION else 0)
    if budget.kind not in ("count", "ratio"):
        raise ValueError(f"keep must be a count or ratio in an encoder of equal lengths; got a budget of {budget.kind}")
    watch = QueriesAndKeys(attention_of(layers[at - 1]), pruning) if strategy in NEEDS_ATTENTION else None
    bias: list[Tensor | None] = [None]

    def enter(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        batch, length, width = hidden.shape
        offsets = torch.arange(batch + 1, dtype=torch.int32, device=hidden.device) * length
        needs: dict[str, Any] = {}
        if watch is not None:
            query, key = watch.take()
            needs["attention"] = encoder_scores(query, key, watch.scale, special > 0)[0]
        protected = None
        if special:
            protected = (torch.arange(batch * length, device=hidden.device) % length) < special
        # The share is of patches; special tokens come on top.
        wanted = min(budget.capacity(length - special, 1, length - special), length - special) + special
        selection = STRATEGIES[strategy](
            hidden.flatten(0, 1), offsets, Budget.count(wanted), protected=protected, max_seqlen=length, **needs
        )
        pruning.last = selection
        rows = selection.rows
        if rows % max(batch, 1):
            raise RuntimeError(f"{strategy} kept unequal numbers of tokens, which this encoder cannot take")
        shorter = selection.reduce(hidden.flatten(0, 1)).reshape(batch, rows // max(batch, 1), width)
        bias[0] = None
        if selection.weight is not None:
            bias[0] = selection.key_bias().reshape(batch, 1, 1, -1).to(hidden.dtype)
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": shorter}
        return (shorter, *args[1:]), kwargs

    def weigh(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if bias[0] is None:
            return args, kwargs
        # The mask is the second argument of every layer here, by place or by name.
        if len(args) > 1:
            return (args[0], bias[0] if args[1] is None else args[1] + bias[0], *args[2:]), kwargs
        given = kwargs.get("attention_mask")
        return args, {**kwargs, "attention_mask": bias[0] if given is None else given + bias[0]}

    pruning._restore.append(layers[at].register_forward_pre_hook(enter, with_kwargs=True).remove)
    for layer in layers[at:]:
        pruning._restore.append(layer.register_forward_pre_hook(weigh, with_kwargs=True).remove)


def _prune_language(core: nn.Module, pruning: Pruning, budget: Budget, strategy: str, at: int, restore: bool) -> None:
    language: Any = core.language_model
    _check_layer(at, language.layers, 0)
    provider: Callable[[], Tensor] | None = None
    watch = None
    if strategy in NEEDS_ATTENTION and at == 0:
        provider = _vision_attention(core, pruning)
    elif strategy in NEEDS_ATTENTION:
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
