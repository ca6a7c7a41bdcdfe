"""Layers of Hugging Face models, and the attention that tokens receive in them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastxattn.integrations.pruning.handle import PerThread, Pruning
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


class _Rows(PerThread):
    query: Tensor | None = None
    key: Tensor | None = None


class QueriesAndKeys:
    """The query and key rows that an attention module computed last, taken from its own projections or norms."""

    def __init__(self, attention: Any, pruning: Pruning) -> None:
        self._rows = _Rows()
        for name in ("q_proj", "k_proj"):
            if not hasattr(attention, name):
                raise ValueError(
                    f"attention scores need {type(attention).__name__}.{name}, which this model does not have"
                )
        self.head_dim = int(attention.head_dim)
        self.scale = float(getattr(attention, "scaling", getattr(attention, "scale", self.head_dim**-0.5)))
        query, key = (self._last(attention, kind) for kind in ("q", "k"))
        pruning.at_restore(query.register_forward_hook(self._keep_query).remove)
        pruning.at_restore(key.register_forward_hook(self._keep_key).remove)

    @staticmethod
    def _last(attention: Any, kind: str) -> Any:
        """The module that queries or keys leave: the norm after the projection, where there is one."""
        for name in (f"{kind}_norm", f"{kind}_layernorm"):
            if isinstance(getattr(attention, name, None), nn.Module):
                return getattr(attention, name)
        return getattr(attention, f"{kind}_proj")

    def _keep_query(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._rows.query = self._by_token(args[0], output)

    def _keep_key(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._rows.key = self._by_token(args[0], output)

    def _by_token(self, given: Tensor, output: Tensor) -> Tensor:
        """(batch, length, heads, head_dim), whether heads were split and moved before or not."""
        if output.ndim == 3:
            return output.unflatten(-1, (-1, self.head_dim))
        # (batch, heads, length, head_dim) is a transposed view, whose heads lie closer together than tokens.
        moved = given.stride(1) < given.stride(2) or given.shape[1] == 1
        return output.transpose(1, 2) if moved else output

    def forget(self) -> None:
        """Let go of the rows of this thread's last pass."""
        self._rows.query = self._rows.key = None

    def take(self) -> tuple[Tensor, Tensor]:
        """(batch, length, heads, head_dim) each; forgotten afterwards."""
        query, key = self._rows.query, self._rows.key
        if query is None or key is None:
            raise RuntimeError("the attention layer before the pruned one did not run")
        self.forget()
        return query, key


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


def encoder_scores(query: Tensor, key: Tensor, scale: float, cls: bool) -> Tensor:
    """Attention received by (batch, length) tokens as packed (total,) scores."""
    batch, length = key.shape[:2]
    offsets = torch.arange(batch + 1, dtype=torch.int32, device=key.device) * length
    packed = key.flatten(0, 1)
    if cls:
        return probe_scores(query[:, 0], packed, offsets, scale)
    return received_scores(query.flatten(0, 1), packed, offsets, scale, max_seqlen=length)


def check_layer(at: int, layers: nn.ModuleList, lowest: int) -> None:
    """``at`` names a layer that tokens can be pruned before."""
    if not isinstance(at, int) or isinstance(at, bool):
        raise TypeError(f"at must be an int; got {at!r}")
    if not lowest <= at < len(layers):
        raise ValueError(f"at must lie in [{lowest}, {len(layers)}); got {at}")
