"""The image tokens of a vision-language model: where they are, how many each image has, and their vision attention."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from fastxattn.integrations.pruning.handle import PerThread, Pruning
from fastxattn.integrations.pruning.probe import (
    QueriesAndKeys,
    attention_of,
    class_tokens,
    encoder_layers,
    encoder_scores,
)

MODALITIES = ("image", "video")


@dataclass
class Images:
    """The placeholders of one forward pass, (batch, length) bool by modality, and the features that fill them."""

    places: dict[str, Tensor]
    features: dict[str, Any] = field(default_factory=dict)
    scores: Tensor | None = None  # of features that carry none, from an older Transformers

    def everywhere(self) -> Tensor:
        """(batch, length) bool: placeholders of any modality."""
        return functools.reduce(torch.logical_or, self.places.values())

    def lengths(self) -> Tensor:
        """(images,) int64 tokens of each image and video, in the order in which they stand."""
        everywhere = self.everywhere()
        number = torch.zeros_like(everywhere, dtype=torch.long)
        before = 0
        for modality, places in self.places.items():
            counts = _counts(self.features.get(modality))
            if sum(counts) == int(places.sum()):
                each = torch.tensor(counts, dtype=torch.long, device=places.device)
                number[places] = torch.repeat_interleave(torch.arange(len(counts), device=places.device), each) + before
            else:  # features that were merged or cut: every run of placeholders is one image
                first = places & ~nn.functional.pad(places, (1, 0))[:, :-1]
                number[places] = (first.flatten().cumsum(0) + before - 1).unflatten(0, places.shape)[places]
            before = int(number.max()) + 1
        return torch.unique_consecutive(number[everywhere], return_counts=True)[1]

    def vision_attention(self) -> Tensor:
        """(image tokens,) scores from the vision encoder."""
        carried = getattr(self.features.get("image"), "deepstack_features", None)
        scores = self.scores if carried is None else torch.cat([s.reshape(-1) for s in carried[0]])
        count = int(self.everywhere().sum())
        if scores is None or scores.shape[0] != count:
            raise ValueError(
                f"strategy must not need attention here: the vision encoder returned scores of "
                f"{0 if scores is None else scores.shape[0]} image tokens, and the prompt has {count} (features that "
                "were computed before prune_model, or videos); take divprune, cdpruner, norm, or at > 0"
            )
        return scores


def _counts(features: Any) -> list[int]:
    features = getattr(features, "pooler_output", features)
    if features is None or (isinstance(features, Tensor) and features.ndim < 3):
        return []
    return [len(image) for image in features]


class _State(PerThread):
    images: Images | None = None
    scores: Tensor | None = None


class ImageTokens:
    """Find image tokens of each forward pass of ``core``, a model with a language model inside."""

    def __init__(self, core: Any, pruning: Pruning, vision_scores: bool) -> None:
        self.core = core
        self.tokens: dict[str, int] = {}
        for modality in MODALITIES:
            for name in (f"{modality}_token_id", f"{modality}_token_index"):
                if isinstance(number := getattr(core.config, name, None), int):
                    self.tokens.setdefault(modality, number)
        if "image" not in self.tokens or not hasattr(core, "get_image_features"):
            raise ValueError(f"model must put image features in place of image tokens; {type(core).__name__} does not")
        self._state = _State()
        self._watch: QueriesAndKeys | None = None
        if vision_scores:
            layer, self._reduce = vision_attention(core)
            self._watch = QueriesAndKeys(attention_of(layer), pruning)
        pruning.at_restore(core.register_forward_pre_hook(self._find, with_kwargs=True).remove)
        for modality in MODALITIES:
            if hasattr(core, name := f"get_{modality}_features"):
                pruning.override(core, name, MethodType(_wrapper(core.__class__, name, modality), self))

    def take(self) -> Images | None:
        """The images of the pass that this thread runs; forgotten afterwards."""
        images, self._state.images = self._state.images, None
        return images

    def _find(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        encoded = {m: f for m, f in (kwargs.get("mm_encoder_outputs") or {}).items() if f is not None}
        pixels = [n for n, v in kwargs.items() if n.startswith("pixel_values") and v is not None]
        self._state.images = self._state.scores = None
        ids, embeds = kwargs.get("input_ids", args[0] if args else None), kwargs.get("inputs_embeds")
        if not (encoded or pixels):
            return
        places = {}
        for modality, number in self.tokens.items():
            if ids is not None:
                places[modality] = ids == number
            elif embeds is not None:  # as the models find them
                token = self.core.get_input_embeddings()(torch.tensor(number, device=embeds.device))
                places[modality] = (embeds == token).all(-1)
        self._state.images = Images(places, encoded) if places else None

    def computed(self, modality: str, result: Any) -> Any:
        """Note features that the model computed, and give them their scores."""
        if modality == "image" and self._watch is not None:
            query, key = self._watch.take()
            scores = self._reduce(query, key, self._watch.scale)
            self._state.scores = scores.flatten()
            if hasattr(result, "pooler_output"):
                result = _scored()(**result, deepstack_features=[list(scores[..., None])])
        if self._state.images is not None:
            self._state.images.features[modality] = result
            self._state.images.scores = self._state.scores
        return result


@functools.cache
def _wrapper(kind: Any, name: str, modality: str) -> Callable[..., Any]:
    """``get_image_features`` of a class, as a method of :class:`ImageTokens`; generate reads its signature."""
    original = getattr(kind, name)

    @functools.wraps(original)
    def get_features(self: ImageTokens, *args: Any, **kwargs: Any) -> Any:
        noted = self._state.images
        before = {} if noted is None else dict(noted.features)
        result = original(self.core, *args, **kwargs)
        if noted is not None:
            noted.features = before  # videos are encoded as images inside
        return self.computed(modality, result)

    return get_features


@functools.cache
def _scored() -> Any:
    """Features with scores, which Transformers expands and cuts as it does the features."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    @dataclass
    class ScoredFeatures(BaseModelOutputWithPooling):  # type: ignore[misc]
        deepstack_features: Any = None

    return ScoredFeatures


def vision_attention(core: Any) -> tuple[nn.Module, Callable[[Tensor, Tensor, float], Tensor]]:
    """The vision layer that image features leave, and a function from its queries and keys to (images, tokens) scores.

    Raises:
        ValueError: image tokens are not those of the vision encoder, or not made of them in a known manner.
    """
    config, merge = core.config, _MERGES.get(type(core).__name__)
    try:
        if merge is None:
            raise ValueError
        layers, special = encoder_layers(core.vision_tower), class_tokens(core.vision_tower)
    except ValueError:
        raise ValueError(
            f"strategy must not need attention at layer 0 of {type(core).__name__} (its vision encoder has no "
            "attention over single image tokens); take divprune, cdpruner, norm, or at > 0"
        ) from None
    place = getattr(config, "vision_feature_layer", -1)
    if not isinstance(place, int):
        raise ValueError(f"strategy must not need attention where features come from several layers; got {place}")
    drop = int(getattr(config, "vision_feature_select_strategy", "full") == "default")  # one, whatever it is
    # hidden_states[i] leaves layer i - 1.
    layer = layers[place - 1 if place > 0 else len(layers) + place]
    return layer, functools.partial(_image_scores, core, merge, special, drop)


def _image_scores(
    core: Any, merge: Callable[[Any, Tensor], Tensor], special: int, drop: int, query: Tensor, key: Tensor, scale: float
) -> Tensor:
    scores = encoder_scores(query, key, scale, special > 0).unflatten(0, key.shape[:2])
    return merge(core, scores[:, drop:])


def _same(core: Any, scores: Tensor) -> Tensor:
    return scores


def _shuffled(core: Any, scores: Tensor) -> Tensor:
    side = int(scores.shape[1] ** 0.5)
    # The model's own shuffle puts the patches of one token side by side, in the order of the tokens.
    merged: Tensor = core.pixel_shuffle(scores.reshape(-1, side, side, 1), scale_factor=core.config.downsample_ratio)
    return merged.mean(-1).flatten(1)


def _pooled(core: Any, scores: Tensor) -> Tensor:
    side = int(scores.shape[1] ** 0.5)
    pooled: Tensor = core.multi_modal_projector.avg_pool(scores.unflatten(1, (1, side, side)))
    return pooled.flatten(1)


_MERGES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "LlavaModel": _same,
    "PaliGemmaModel": _same,
    "InternVLModel": _shuffled,
    "Gemma3Model": _pooled,
}
"""How image tokens are made of patches, by class: (images, patches) scores to (images, tokens)."""
