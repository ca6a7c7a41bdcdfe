"""Pruning tokens on their way into the layers of a vision encoder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastxattn.integrations.pruning.handle import PerThread, Pruning
from fastxattn.integrations.pruning.probe import (
    Arguments,
    QueriesAndKeys,
    attention_of,
    check_layer,
    class_tokens,
    encoder_layers,
    encoder_scores,
)
from fastxattn.ops.pruning import Budget, Selection, Strategy


class _State(PerThread):
    sizes: Tensor | None = None  # (batch * length,) tokens that each token stands for; None: one
    bias: Tensor | None = None  # (batch, 1, 1, length) log of the sizes


class EncoderPruning:
    """The hooks of one pruned encoder, and the state that they share during a forward pass."""

    def __init__(
        self, model: nn.Module, pruning: Pruning, budget: Budget, strategy: Strategy, at: int | Sequence[int] | None
    ) -> None:
        vision = getattr(model, "vision_model", model)
        self.pruning, self.budget, self.strategy, self.state = pruning, budget, strategy, _State()
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

    @staticmethod
    def default_strategy(model: nn.Module) -> str:
        """``attention`` where the layers have query and key projections, else ``divprune``."""
        attention = attention_of(encoder_layers(getattr(model, "vision_model", model))[0])
        inner = getattr(attention, "attention", attention)
        return "attention" if hasattr(inner, "q_proj") or hasattr(attention, "q_proj") else "divprune"

    def attach(self) -> None:
        """Register the hooks; the handle removes them."""
        for stage in self.stages:
            watch = None
            if "attention" in self.strategy.needs:
                watch = QueriesAndKeys(attention_of(self.layers[stage - 1]), self.pruning)
            enter = _Stage(self, watch, stage == self.stages[0]).enter
            self.pruning.at_restore(self.layers[stage].register_forward_pre_hook(enter, with_kwargs=True).remove)
        # After the hooks above: a layer's mask has the length of what has just been pruned.
        for layer in self.layers[self.stages[0] :]:
            self.pruning.at_restore(layer.register_forward_pre_hook(self._weigh, with_kwargs=True).remove)

    def prune(self, hidden: Tensor, watch: QueriesAndKeys | None) -> Tensor:
        """(batch, kept, width) of (batch, length, width) hidden states."""
        batch, width = hidden.shape[0], hidden.shape[2]
        selection = self._select(hidden, watch)
        self.pruning.last = selection
        kept = selection.rows // max(batch, 1)
        if kept * batch != selection.rows:
            raise RuntimeError(
                f"strategy {self.strategy.name} must keep equal numbers of tokens in an encoder of equal lengths; "
                f"it kept {selection.rows} in {batch} sequences"
            )
        if selection.weight is not None or self.state.sizes is not None:
            bias = selection.key_bias(self.state.sizes).reshape(batch, 1, 1, kept)
            self.state.bias, self.state.sizes = bias.to(hidden.dtype), selection.sizes(self.state.sizes)
        return selection.reduce(hidden.flatten(0, 1)).reshape(batch, kept, width)

    def _select(self, hidden: Tensor, watch: QueriesAndKeys | None) -> Selection:
        batch, length, _ = hidden.shape
        patches = length - self.special
        offsets = torch.arange(batch + 1, dtype=torch.int32, device=hidden.device) * length
        needs: dict[str, Any] = {}
        if watch is not None:
            query, key = watch.take()
            needs["attention"] = encoder_scores(query, key, watch.scale, self.special > 0)
        if self.special:
            needs["protected"] = (torch.arange(batch * length, device=hidden.device) % length) < self.special
        side = math.isqrt(patches)
        if "columns" in self.strategy.needs and side * side == patches:
            needs["columns"] = side
        if "sizes" in self.strategy.needs:
            needs["sizes"] = self.state.sizes
        # The share is of patches; special tokens come on top.
        count = min(self.budget.capacity(patches, 1, patches), patches) + self.special
        return self.strategy(hidden.flatten(0, 1), offsets, Budget.count(count), max_seqlen=length, **needs)

    def _weigh(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        bias = self.state.bias
        if bias is None:
            return args, kwargs
        # The mask is the second argument of every layer here, by place or by name.
        if len(args) > 1:
            return (args[0], bias if args[1] is None else args[1] + bias, *args[2:]), kwargs
        given = kwargs.get("attention_mask")
        return args, {**kwargs, "attention_mask": bias if given is None else given + bias}


class _Stage:
    """The hook of one layer that prunes."""

    def __init__(self, owner: EncoderPruning, watch: QueriesAndKeys | None, first: bool) -> None:
        self.owner, self.watch, self.first = owner, watch, first

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        if self.first:
            self.owner.state.sizes = self.owner.state.bias = None
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": self.owner.prune(kwargs["hidden_states"], self.watch)}
        return (self.owner.prune(args[0], self.watch), *args[1:]), kwargs
