"""Layers of Hugging Face models, and the attention that tokens receive in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastxattn.integrations.pruning.handle import Pruning
from fastxattn.ops.pruning import probe_scores, received_scores

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a layer's forward."""
_LAYERS = (
    "vision_model.encoder.layers",
    "encoder.layers",
    "encoder.layer",
    "layers",
    "dinov2.encoder.layer",
    "dinov2_with_registers.encoder.layer",
    "vit.layers",
    "vit.encoder.layer",
)
"""Where vision encoders keep their layers."""


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
            pruning.at_restore(getattr(attention, name).register_forward_hook(self._keep(name)).remove)
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


def encoder_layers(model: nn.Module) -> nn.ModuleList:
    """The layers of a vision encoder, wherever its class keeps them."""
    for path in _LAYERS:
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


def encoder_scores(query: Tensor, key: Tensor, scale: float, cls: bool) -> tuple[Tensor, Tensor]:
    """Attention received by (batch, length) tokens as packed (total,) scores, with their offsets."""
    batch, length = key.shape[:2]
    offsets = torch.arange(batch + 1, dtype=torch.int32, device=key.device) * length
    packed = key.flatten(0, 1)
    if cls:
        return probe_scores(query[:, 0], packed, offsets, scale), offsets
    return received_scores(query.flatten(0, 1), packed, offsets, scale, max_seqlen=length), offsets


def check_layer(at: int, layers: nn.ModuleList, lowest: int) -> None:
    """``at`` names a layer that tokens can be pruned before."""
    if not isinstance(at, int) or isinstance(at, bool):
        raise TypeError(f"at must be an int; got {at!r}")
    if not lowest <= at < len(layers):
        raise ValueError(f"at must lie in [{lowest}, {len(layers)}); got {at}")


def vision_attention(core: nn.Module, pruning: Pruning) -> Callable[[], Tensor]:
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
