"""Pruning image tokens on their way into a decoder layer of a vision-language model."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastxattn.integrations.pruning.handle import Pruning
from fastxattn.integrations.pruning.probe import Arguments, QueriesAndKeys, attention_of, check_layer, vision_attention
from fastxattn.ops.pruning import Budget, Strategy, probe_scores
from fastxattn.ops.pruning.segments import offsets_of


@dataclass
class Prefill:
    """What was pruned from the prompts of one batch."""

    keep: Tensor  # (batch, kept) int64 places in the full prompt, right-aligned
    there: Tensor | None  # (batch, kept) bool; None: every place holds a token
    length: int  # of the full prompt


class LanguagePruning:
    """The hooks of one pruned language model, and what they remember between prefill and decoding."""

    def __init__(
        self, core: nn.Module, pruning: Pruning, budget: Budget, strategy: Strategy, at: int, full_length: bool
    ) -> None:
        language: Any = core.language_model
        check_layer(at, language.layers, 0)
        pruning.claim(language.layers)
        self.core, self.pruning, self.budget, self.strategy = core, pruning, budget, strategy
        self.at, self.full_length = at, full_length
        self.provider: Callable[[], Tensor] | None = None
        self.watch: QueriesAndKeys | None = None
        if "attention" in strategy.needs and at == 0:
            self.provider = vision_attention(core, pruning)
        elif "attention" in strategy.needs:
            self.watch = QueriesAndKeys(attention_of(language.layers[at - 1]), pruning)
        self.images: Tensor | None = None  # (batch, length) bool: image tokens of this forward pass
        self.image_lengths: list[int] = []
        self.rotary: tuple[Tensor, Tensor] | None = None
        self.prefill: Prefill | None = None
        self.pruned_now = False

    def attach(self) -> None:
        """Register the hooks; the handle removes them."""
        language: Any = self.core.language_model
        layers = language.layers
        hooks = [
            self.core.register_forward_pre_hook(self._find_images, with_kwargs=True),
            language.register_forward_pre_hook(self._enter_language, with_kwargs=True),
            language.register_forward_hook(self._leave_language),
            layers[self.at].register_forward_pre_hook(self._enter_layer, with_kwargs=True),
        ]
        if self.watch is not None:
            hooks.append(layers[self.at - 1].register_forward_pre_hook(self._keep_rotary, with_kwargs=True))
        hooks += [layer.register_forward_pre_hook(self._shorten, with_kwargs=True) for layer in layers[self.at :]]
        self.pruning.at_restore(*(hook.remove for hook in hooks))
        core: Any = self.core
        original = core.get_image_features

        @functools.wraps(original)  # generate reads its signature
        def get_image_features(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            features = getattr(result, "pooler_output", result)
            self.image_lengths = [len(image) for image in features]
            return result

        core.get_image_features = get_image_features
        self.pruning.at_restore(lambda: delattr(self.core, "get_image_features"))

    # Hooks, in the order in which a forward pass meets them ---------------------------------------------------

    def _find_images(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        self.images, self.pruned_now, self.image_lengths = None, False, []
        if ids is not None and (kwargs.get("pixel_values") is not None or kwargs.get("mm_encoder_outputs") is not None):
            config: Any = self.core.config
            self.images = ids == config.image_token_id
            features = (kwargs.get("mm_encoder_outputs") or {}).get("image")
            if features is not None:
                self.image_lengths = [len(image) for image in features.pooler_output]

    def _enter_language(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        embeds = kwargs.get("inputs_embeds")
        cache = kwargs.get("past_key_values")
        if embeds is None or self.images is not None or cache is None or self.prefill is None:
            if cache is None or (self.images is None and self.prefill is not None and not cache.get_seq_length()):
                self.prefill = None
            return None
        if self.at > 0:
            return None  # layers before the pruned one hold the full prompt: lengths and positions are right
        # Decoding after a prompt that was pruned before layer 0: the cache is shorter than the prompt.
        prompt, change = self.prefill, dict(kwargs)
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            kept = mask[:, : prompt.length].gather(1, prompt.keep)
            if prompt.there is not None:
                kept = kept * prompt.there
            change["attention_mask"] = torch.cat([kept, mask[:, prompt.length :]], 1)
        elif prompt.there is not None:
            width = embeds.shape[1] + cache.get_seq_length() - prompt.there.shape[1]
            change["attention_mask"] = torch.cat([prompt.there, prompt.there.new_ones(len(prompt.there), width)], 1)
        if kwargs.get("position_ids") is None:
            at = cache.get_seq_length() - prompt.keep.shape[1] + prompt.length
            change["position_ids"] = (torch.arange(embeds.shape[1], device=embeds.device) + at)[None]
        elif not isinstance(mask, Tensor):
            pass  # positions given with no mask are the caller's own and count from the full prompt
        return args, change

    def _keep_rotary(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.rotary = kwargs.get("position_embeddings")

    def _enter_layer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        if self.images is None:
            if self.watch is not None:
                self.watch.query = self.watch.key = None
            return None
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        images, batch, length = self.images, hidden.shape[0], hidden.shape[1]
        rows = images.flatten().nonzero().squeeze(1)
        lengths = self.image_lengths if sum(self.image_lengths) == rows.shape[0] else [int(n) for n in images.sum(1)]
        offsets = offsets_of(torch.tensor(lengths, device=hidden.device))
        tokens = hidden.reshape(batch * length, -1).index_select(0, rows)
        needs: dict[str, Any] = {}
        if self.provider is not None:
            needs["attention"] = self.provider()
        elif self.watch is not None:
            needs["attention"] = self._text_attention(hidden)[rows]
        longest = max(lengths, default=0)
        selection = self.strategy(tokens, offsets, self.budget, protected=None, max_seqlen=longest, **needs)
        self.pruning.last = selection
        stay = ~images.flatten()
        seats = rows[selection.keep_index.long()]
        stay[seats] = True
        flat = hidden.reshape(batch * length, -1)
        if selection.weight is not None:
            flat = flat.index_copy(0, seats, selection.reduce(tokens))
        self.prefill = _places(stay.unflatten(0, (batch, length)))
        self.pruned_now = True
        shorter = flat.unflatten(0, (batch, length)).gather(
            1, self.prefill.keep[..., None].expand(-1, -1, flat.shape[-1])
        )
        self.images = None
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": shorter}
        return (shorter, *args[1:]), kwargs

    def _text_attention(self, hidden: Tensor) -> Tensor:
        """(batch * length,) attention of each prompt's last token in the layer before, with its rotary positions."""
        assert self.watch is not None
        query, key = self.watch.take()
        rotate = getattr(sys.modules[type(self._attention()).__module__], "apply_rotary_pos_emb", None)
        if rotate is not None and self.rotary is not None:
            query, key = rotate(query.transpose(1, 2), key.transpose(1, 2), *self.rotary)
            query, key = query.transpose(1, 2), key.transpose(1, 2)
        batch, length = hidden.shape[:2]
        offsets = torch.arange(batch + 1, dtype=torch.int32, device=hidden.device) * length
        return probe_scores(query[:, -1], key.flatten(0, 1), offsets, self.watch.scale)

    def _attention(self) -> nn.Module:
        language: Any = self.core.language_model
        return attention_of(language.layers[self.at - 1])

    def _shorten(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        """Masks, positions and rotary tables of the layers that see the pruned prompt."""
        prompt = self.prefill
        if prompt is None:
            return None
        change = dict(kwargs)
        mask = kwargs.get("attention_mask")
        if self.pruned_now:
            change["attention_mask"] = _short_mask(mask, prompt)
            if (tables := kwargs.get("position_embeddings")) is not None:
                change["position_embeddings"] = tuple(_pick(table, prompt.keep) for table in tables)
            if isinstance(positions := kwargs.get("position_ids"), Tensor):
                change["position_ids"] = _pick(positions[..., None], prompt.keep)[..., 0]
        elif self.at > 0 and isinstance(mask, Tensor):
            columns = prompt.keep[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1)
            old = mask[..., : prompt.length].expand(len(prompt.keep), -1, -1, -1).gather(-1, columns)
            if prompt.there is not None:
                old = _hide(old, ~prompt.there[:, None, None])
            change["attention_mask"] = torch.cat([old, mask[..., prompt.length :].expand(len(old), -1, -1, -1)], -1)
        elif self.at > 0 and prompt.there is not None:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            cache: Any = kwargs["past_key_values"]
            extra = cache.get_seq_length() + hidden.shape[1] - prompt.length
            ones = prompt.there.new_ones(len(prompt.there), extra)
            change["attention_mask"] = torch.cat([prompt.there, ones], 1)[:, None, None]
        return args, change

    def _leave_language(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not self.pruned_now:
            return None
        self.pruned_now = False
        if self.full_length and self.prefill is not None:
            prompt, hidden = self.prefill, output.last_hidden_state
            if prompt.there is not None:
                hidden = hidden * prompt.there[..., None]
            full = hidden.new_zeros(hidden.shape[0], prompt.length, hidden.shape[2])
            output.last_hidden_state = full.scatter_add(
                1, prompt.keep[..., None].expand(-1, -1, hidden.shape[2]), hidden
            )
        return output


def _places(stay: Tensor) -> Prefill:
    """Where the tokens that stay (batch, length) lie, right-aligned to the longest."""
    counts = stay.sum(1)
    width = int(counts.max()) if counts.numel() else 0
    # A stable sort puts what stays last, in order: its last `width` places are the result.
    keep = torch.sort(stay.to(torch.uint8), dim=1, stable=True).indices[:, stay.shape[1] - width :]
    there = torch.arange(width, device=stay.device) >= width - counts[:, None]
    return Prefill(keep, None if bool(there.all()) else there, stay.shape[1])


def _pick(table: Tensor, keep: Tensor) -> Tensor:
    """Rows ``keep`` (batch, kept) of (..., batch or 1, length, width), on the second axis from the end."""
    table = table.expand(*table.shape[:-3], keep.shape[0], *table.shape[-2:])
    index = keep[..., None].expand(*table.shape[:-2], -1, table.shape[-1])
    return table.gather(-2, index)


def _hide(mask: Tensor, hidden: Tensor) -> Tensor:
    return mask & ~hidden if mask.dtype == torch.bool else mask.masked_fill(hidden, torch.finfo(mask.dtype).min)


def _short_mask(mask: Tensor | None, prompt: Prefill) -> Tensor | None:
    """The causal mask between kept tokens; None stays None (plain causal) when there is no padding."""
    batch, width = prompt.keep.shape
    if mask is None:
        if prompt.there is None:
            return None
        causal = torch.ones(width, width, dtype=torch.bool, device=prompt.keep.device).tril()
        own = torch.eye(width, dtype=torch.bool, device=prompt.keep.device)
        return (causal & prompt.there[:, None, None, :]) | own  # a padding row sees itself: no empty softmax
    full = mask.expand(batch, -1, -1, -1)
    rows = full.gather(2, prompt.keep[:, None, :, None].expand(-1, full.shape[1], -1, full.shape[3]))
    short = rows.gather(3, prompt.keep[:, None, None, :].expand(-1, rows.shape[1], width, -1))
    return short if prompt.there is None else _hide(short, ~prompt.there[:, None, None])
