"""Pruning tokens on their way into the layers of a vision encoder."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastxattn.ops.pruning import Budget, Selection, probe_scores, received_scores
from fastxattn.ops.pruning.strategies import Strategy

if TYPE_CHECKING:
    from fastxattn.integrations.pruning import Pruning

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


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


class EncoderPruning:
    """The hooks of one pruned encoder, and what they hand on from layer to layer of a forward pass."""

    def __init__(
        self, model: nn.Module, pruning: Pruning, budget: Budget, strategy: Strategy, at: int | Sequence[int] | None
    ) -> None:
        vision = getattr(model, "vision_model", model)
        self.pruning, self.budget, self.strategy = pruning, budget, strategy
        self.layers, self.special = encoder_layers(vision), class_tokens(vision)
        if at is None:
            at = max(1, len(self.layers) // 3)
        self.stages = [at] if isinstance(at, int) else sorted(set(at))
        if not self.stages:
            raise ValueError("at must name a layer; got none")
        for stage in self.stages:
            check_layer(stage, self.layers, 1 if "attention" in strategy.needs else 0)
        if budget.kind not in ("count", "ratio"):
            raise ValueError(
                f"keep must be a count or ratio in an encoder of equal lengths; got a budget of {budget.kind}"
            )
        pruning.claim(self.layers)
        self.sizes: Tensor | None = None  # (batch * length,) tokens that each token stands for; None: one
        self.bias: Tensor | None = None  # (batch, 1, 1, length) log of the sizes

    def attach(self) -> None:
        """Hook into the layers; everything is undone through the pruning handle."""
        hooks = []
        for stage in self.stages:
            watch = None
            if "attention" in self.strategy.needs:
                watch = QueriesAndKeys(attention_of(self.layers[stage - 1]), self.pruning)
            enter = self._entering(watch, stage == self.stages[0])
            hooks.append(self.layers[stage].register_forward_pre_hook(enter, with_kwargs=True))
        # After the hooks above: a layer's mask has the length of what has just been pruned.
        hooks += [
            layer.register_forward_pre_hook(self._weigh, with_kwargs=True) for layer in self.layers[self.stages[0] :]
        ]
        self.pruning._restore += [hook.remove for hook in hooks]

    def _entering(
        self, watch: QueriesAndKeys | None, first: bool
    ) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Arguments]:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
            if first:
                self.sizes = self.bias = None
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            batch, width = hidden.shape[0], hidden.shape[2]
            selection = self._select(hidden, watch)
            self.pruning.last = selection
            kept = selection.rows // max(batch, 1)
            if kept * batch != selection.rows:
                raise RuntimeError(
                    f"strategy {self.strategy.name} must keep equal numbers of tokens in an encoder of equal lengths; "
                    f"it kept {selection.rows} in {batch} sequences"
                )
            shorter = selection.reduce(hidden.flatten(0, 1)).reshape(batch, kept, width)
            if selection.weight is not None or self.sizes is not None:
                self.bias = selection.key_bias(self.sizes).reshape(batch, 1, 1, kept).to(hidden.dtype)
                self.sizes = selection.sizes(self.sizes)
            if "hidden_states" in kwargs:
                return args, {**kwargs, "hidden_states": shorter}
            return (shorter, *args[1:]), kwargs

        return enter

    def _select(self, hidden: Tensor, watch: QueriesAndKeys | None) -> Selection:
        batch, length, _ = hidden.shape
        patches = length - self.special
        offsets = torch.arange(batch + 1, dtype=torch.int32, device=hidden.device) * length
        needs: dict[str, Any] = {}
        if watch is not None:
            query, key = watch.take()
            needs["attention"] = encoder_scores(query, key, watch.scale, self.special > 0)[0]
        if self.special:
            needs["protected"] = (torch.arange(batch * length, device=hidden.device) % length) < self.special
        side = math.isqrt(patches)
        if "columns" in self.strategy.needs and side * side == patches:
            needs["columns"] = side
        if "sizes" in self.strategy.needs:
            needs["sizes"] = self.sizes
        # The share is of patches; special tokens come on top.
        count = min(self.budget.capacity(patches, 1, patches), patches) + self.special
        return self.strategy(hidden.flatten(0, 1), offsets, Budget.count(count), max_seqlen=length, **needs)

    def _weigh(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        if self.bias is None:
            return args, kwargs
        # The mask is the second argument of every layer here, by place or by name.
        if len(args) > 1:
            return (args[0], self.bias if args[1] is None else args[1] + self.bias, *args[2:]), kwargs
        given = kwargs.get("attention_mask")
        return args, {**kwargs, "attention_mask": self.bias if given is None else given + self.bias}
