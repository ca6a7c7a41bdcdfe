"""Pruning image tokens on their way into a decoder layer of a vision-language model."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from fastxattn.integrations.pruning.cache import Held, held_by, mask_offset, own_sizes, shorten
from fastxattn.integrations.pruning.handle import PerThread, Pruning
from fastxattn.integrations.pruning.images import Images, ImageTokens, vision_attention
from fastxattn.integrations.pruning.probe import Arguments, QueriesAndKeys, attention_of, check_layer
from fastxattn.ops.pruning import Budget, Selection, Strategy, probe_scores
from fastxattn.ops.pruning.segments import offsets_of

_OTHER_TOKENS = ("per_layer_input", "cross_attention_states", "encoder_hidden_states", "vision_hidden_states")
"""Arguments of decoder layers that hold something for every token of the prompt, or tokens that are not in it."""


@dataclass
class Kept:
    """What one forward pass keeps of its tokens."""

    keep: Tensor  # (batch, kept) int64 places among the tokens of the pass, right-aligned
    valid: Tensor | None  # (batch, kept) bool; None: every place holds a token
    length: int  # of the pass without pruning
    seats: Tensor  # (kept image tokens,) places in the flattened batch
    selection: Selection

    def pick(self, table: Tensor) -> Tensor:
        """Rows of (..., batch or 1, length, width)."""
        table = table.expand(*table.shape[:-3], self.keep.shape[0], *table.shape[-2:])
        index = self.keep[..., None].expand(*table.shape[:-2], -1, table.shape[-1])
        return table.gather(-2, index)


@dataclass
class Pass:
    """One forward pass of the language model."""

    read: int  # tokens that the cache has seen before
    length: int
    images: Images | None
    offsets: tuple[int, int]  # place of the masks' first column, for layers with full and with sliding attention
    mask: Any = None  # of the layer before the pruned one
    rotary: Any = None
    kept: Kept | None = None
    held: Held | None = None  # the keys of a pruned layer after this pass
    cache: Any = None


class _State(PerThread):
    current: Pass | None = None


class LanguagePruning:
    """The hooks of one pruned language model. What they remember of a prompt is in its cache."""

    def __init__(
        self, core: nn.Module, pruning: Pruning, budget: Budget, strategy: Strategy, at: int, full_length: bool
    ) -> None:
        language = language_model(core)
        check_layer(at, language.layers, 0)
        _check_layers(core, language)
        pruning.claim(language.layers)
        self.core, self.language, self.pruning, self.budget, self.strategy = core, language, pruning, budget, strategy
        self.at, self.full_length, self._state = at, full_length, _State()
        scored = "attention" in strategy.needs
        self.images = ImageTokens(core, pruning, scored and at == 0)
        self.watch = QueriesAndKeys(attention_of(language.layers[at - 1]), pruning) if scored and at > 0 else None

    def attach(self) -> None:
        """Register the hooks; the handle removes them."""
        language, layers = self.language, self.language.layers
        hooks = [
            language.register_forward_pre_hook(self._enter_language, with_kwargs=True),
            layers[self.at].register_forward_pre_hook(self._enter_layer, with_kwargs=True),
            language.register_forward_hook(self._leave_language),
        ]
        if self.watch is not None:
            hooks.append(layers[self.at - 1].register_forward_pre_hook(self._keep_mask, with_kwargs=True))
        for number, layer in enumerate(layers):
            if number >= self.at:
                hook = _Layer(self, number)
                hooks.append(layer.register_forward_pre_hook(hook.shorten, with_kwargs=True))
        self.pruning.at_restore(*(hook.remove for hook in hooks))
        if hasattr(language, "_deepstack_process"):
            self.pruning.override(language, "_deepstack_process", MethodType(_deepstack, self))

    # Hooks, in the order in which a forward pass meets them ---------------------------------------------------

    def _enter_language(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache, embeds = kwargs.get("past_key_values"), kwargs.get("inputs_embeds")
        tokens = next(t for t in (embeds, kwargs.get("input_ids"), *args) if isinstance(t, Tensor))
        length = tokens.shape[1]
        read = 0 if cache is None else int(cache.get_seq_length())
        offsets = (mask_offset(cache, False, length), mask_offset(cache, True, length))
        self._state.current = Pass(read, length, self.images.take(), offsets)
        if self.watch is not None:
            self.watch.forget()

    def _keep_mask(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if (now := self._state.current) is not None and now.images is not None:
            now.mask, now.rotary = kwargs.get("attention_mask"), kwargs.get("position_embeddings")

    def _enter_layer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        now = self._state.current
        if now is None or now.images is None:
            return None
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        images, (batch, length) = now.images.everywhere(), hidden.shape[:2]
        if not bool(images.any()):
            return None
        flat, rows = hidden.reshape(batch * length, -1), images.flatten().nonzero().squeeze(1)
        tokens, lengths = flat.index_select(0, rows), now.images.lengths()
        needs: dict[str, Any] = {}
        if self.watch is not None:
            needs["attention"] = self._text_attention(now, images)[rows]
        elif "attention" in self.strategy.needs:
            needs["attention"] = now.images.vision_attention()
        longest = int(lengths.max())
        selection = self.strategy(tokens, offsets_of(lengths), self.budget, protected=None, max_seqlen=longest, **needs)
        self.pruning.last = selection
        seats = rows[selection.keep_index.long()]
        # Padding goes too, so that a batch is as wide as its longest pruned prompt.
        valid, _ = _validity(kwargs.get("attention_mask"), images, now.read - now.offsets[self._sliding(self.at)])
        stay = (valid & ~images).flatten()
        stay[seats] = True
        if selection.weight is not None:
            flat = flat.index_copy(0, seats, selection.reduce(tokens))
        now.kept = kept = _kept(stay.unflatten(0, (batch, length)), seats, selection)
        shorter = kept.pick(flat.unflatten(0, (batch, length)))
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": shorter}
        return (shorter, *args[1:]), kwargs

    def _text_attention(self, now: Pass, images: Tensor) -> Tensor:
        """(batch * length,) attention of each prompt's last text token in the layer before."""
        assert self.watch is not None
        query, key = self.watch.take()
        batch, length = images.shape
        module = sys.modules[type(attention_of(self.language.layers[self.at - 1])).__module__]
        rotate = getattr(module, "apply_rotary_pos_emb", None)
        if rotate is not None and isinstance(now.rotary, tuple):
            query, key = rotate(query.transpose(1, 2), key.transpose(1, 2), *now.rotary)
            query, key = query.transpose(1, 2), key.transpose(1, 2)
        valid, visible = _validity(now.mask, images, now.read - now.offsets[self._sliding(self.at - 1)])
        text = valid & ~images
        place = torch.arange(length, device=images.device)
        last = torch.where(text, place, -1).amax(1)
        if bool((torch.where(images, place, -1).amax(1) > last).any()):
            raise ValueError(
                f"strategy {self.strategy.name} ranks by the last text token at layer {self.at}, and image tokens "
                "come after it: end prompts with text, generate without prefill_chunk_size (which cuts prompts), or "
                "take divprune, cdpruner or norm"
            )
        sample = torch.arange(batch, device=images.device)
        seen = valid & (place <= last[:, None])
        if visible is not None:
            seen = visible[sample, last] & seen
        scores = probe_scores(query[sample, last], key[seen], offsets_of(seen.sum(1)), self.watch.scale)
        return scores.new_zeros(batch, length).masked_scatter(seen, scores).flatten()

    def _sliding(self, number: int) -> bool:
        kinds = getattr(self.language.config, "layer_types", None)
        return kinds is not None and kinds[number] != "full_attention"

    def shorten(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        """Mask, positions and rotary tables of a layer that holds, or is about to hold, a pruned prompt."""
        now = self._state.current
        if now is None:
            return None
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        cache, change = kwargs.get("past_key_values"), dict(kwargs)
        layers = getattr(cache, "layers", ())
        layer = layers[number] if number < len(layers) else None
        before = held_by(layer)
        if now.kept is None and before is None:
            return None
        kept, batch, width = now.kept, hidden.shape[0], hidden.shape[1]
        if kept is None:
            assert before is not None
            held, past = before, now.read - before.dropped
        else:
            if now.held is None:
                start = before or Held.everything(batch, now.read, hidden.device)
                now.held, now.cache = start.then(kept.keep, kept.valid, now.read, kept.length), cache
            held = now.held
            past = held.positions.shape[1] - width
            tables = kwargs.get("position_embeddings")
            if isinstance(tables, tuple):
                change["position_embeddings"] = tuple(kept.pick(table) for table in tables)
            elif isinstance(tables, Tensor):
                change["position_embeddings"] = kept.pick(tables)
            if isinstance(positions := kwargs.get("position_ids"), Tensor):
                change["position_ids"] = kept.pick(positions[..., None])[..., 0]
        if isinstance(kwargs.get("cache_position"), Tensor):  # of older Transformers
            change["cache_position"] = torch.arange(width, device=hidden.device) + past
        sizes = (past + width, 0) if layer is None else own_sizes(layer, width)
        causal = getattr(attention_of(self.language.layers[number]), "is_causal", True)
        change["attention_mask"] = _mask(
            kwargs.get("attention_mask"), held, kept, past, width, sizes, now.offsets[_is_sliding(layer)], causal
        )
        return args, change

    def _leave_language(self, module: nn.Module, args: Any, output: Any) -> Any:
        now, self._state.current = self._state.current, None
        if now is None or now.kept is None:
            return None
        for layer in getattr(now.cache, "layers", ())[self.at :]:
            if now.held is not None and hasattr(layer, "keys"):
                shorten(layer, now.held)
        if self.full_length:
            kept, hidden = now.kept, output.last_hidden_state
            if kept.valid is not None:
                hidden = hidden * kept.valid[..., None]
            full = hidden.new_zeros(hidden.shape[0], kept.length, hidden.shape[2])
            output.last_hidden_state = full.scatter_add(1, kept.keep[..., None].expand(-1, -1, hidden.shape[2]), hidden)
        return output


class _Layer:
    """The hook of one pruned layer, which knows its number."""

    def __init__(self, owner: LanguagePruning, number: int) -> None:
        self.owner, self.number = owner, number

    def shorten(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        return self.owner.shorten(self.number, args, kwargs)


def _deepstack(self: LanguagePruning, hidden_states: Tensor, visual_pos_masks: Tensor, visual_embeds: Tensor) -> Tensor:
    """Add a vision layer's features to the image tokens that are left (DeepStack, arXiv 2406.04334)."""
    now = self._state.current
    kept = None if now is None else now.kept
    if kept is None:
        added: Tensor = type(self.language)._deepstack_process(
            self.language, hidden_states, visual_pos_masks, visual_embeds
        )
        return added
    embeds = visual_embeds.to(hidden_states)
    flat = embeds.new_zeros(visual_pos_masks.numel(), embeds.shape[-1])
    flat = flat.index_copy(0, kept.seats, kept.selection.reduce(embeds))
    more = kept.pick(flat.unflatten(0, visual_pos_masks.shape))
    return hidden_states + (more if kept.valid is None else more * kept.valid[..., None])


def language_model(core: Any) -> Any:
    """The language model inside a vision-language model, or None."""
    for name in ("language_model", "text_model"):
        found = getattr(core, name, None)
        if isinstance(getattr(found, "layers", None), nn.ModuleList):
            return found
    return None


def default_strategy(core: Any, at: int) -> str:
    """``attention`` where ``core`` computes attention over its image tokens, else ``divprune``."""
    try:
        if at == 0:
            layer, _ = vision_attention(core)
        else:
            layer = language_model(core).layers[at - 1]
        attention = attention_of(layer)
    except (ValueError, IndexError, TypeError):
        return "divprune"
    return "attention" if hasattr(attention, "q_proj") and hasattr(attention, "k_proj") else "divprune"


def _check_layers(core: Any, language: Any) -> None:
    """Refuse language models whose layers need every token of the prompt."""
    name = type(core).__name__
    takes = {n for layer in language.layers for n in inspect.signature(layer.forward).parameters}
    if found := [n for n in _OTHER_TOKENS if n in takes]:
        raise ValueError(
            f"model must not give layers tokens besides the hidden states; those of {name} take {found[0]}"
        )
    kinds = {k for k in getattr(language.config, "layer_types", None) or () if not k.endswith("_attention")}
    linear = [k for k in getattr(language.config, "layer_types", None) or () if k.startswith("linear")]
    if kinds or linear:
        raise ValueError(
            f"model must have attention layers only; {name} has {', '.join(sorted({*kinds, *linear}))} layers"
        )
    if "deepstack_visual_embeds" in inspect.signature(language.forward).parameters and not hasattr(
        language, "_deepstack_process"
    ):
        raise ValueError(f"model must add deepstack features in _deepstack_process; {name} does not")


def _is_sliding(layer: Any) -> bool:
    return bool(getattr(layer, "is_sliding", False))


def _kept(stay: Tensor, seats: Tensor, selection: Selection) -> Kept:
    """Where the tokens that stay (batch, length) lie, right-aligned to the longest."""
    counts = stay.sum(1)
    width = int(counts.max()) if counts.numel() else 0
    # A stable sort puts what stays last, in order: its last `width` places are the result.
    keep = torch.sort(stay.to(torch.uint8), dim=1, stable=True).indices[:, stay.shape[1] - width :]
    valid = torch.arange(width, device=stay.device) >= width - counts[:, None]
    return Kept(keep, None if bool(valid.all()) else valid, stay.shape[1], seats, selection)


def _validity(mask: Any, images: Tensor, start: int) -> tuple[Tensor, Tensor | None]:
    """Which tokens (batch, length) of a pass are no padding, and what each sees of the others (None: no mask).

    Column ``start`` of the mask is of the first token of the pass.
    """
    batch, length = images.shape
    if not isinstance(mask, Tensor):
        return torch.ones_like(images), None
    if mask.ndim == 2:
        return mask[:, start : start + length] > 0, None
    visible = _visible(mask[..., start : start + length]).any(1).expand(batch, -1, -1)
    return visible.any(1), visible


def _visible(mask: Tensor) -> Tensor:
    """Where a mask lets tokens attend."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _mask(
    mask: Any,
    held: Held,
    kept: Kept | None,
    past: int,
    width: int,
    sizes: tuple[int, int],
    offset: int,
    causal: bool,
) -> Any:
    """The mask between ``width`` queries and the keys that a layer holds, from the mask between all tokens.

    ``past`` keys were held before; the layer attends to ``sizes[0]`` keys from number ``sizes[1]`` on. Column j of the
    mask given is of token ``offset + j``; its rows are the pass's tokens without pruning.
    """
    count, start = sizes
    every = held.extended(start + count)
    positions = every.positions[:, start : start + count]
    valid = None if every.valid is None else every.valid[:, start : start + count]
    numbers = torch.arange(start, start + count, device=positions.device)
    if mask is None:
        if valid is None and count == past + width:
            return None
        allowed = numbers < past + width
        if causal:
            allowed = numbers <= torch.arange(past, past + width, device=positions.device)[:, None]
        allowed = allowed.expand(len(positions), 1, width, -1)
        return allowed if valid is None else _with_padding(allowed, valid, kept, past, numbers)
    if not isinstance(mask, Tensor):
        raise ValueError(
            f"attention masks must be tensors in a pruned model; got {type(mask).__name__} (flex_attention): "
            'take attn_implementation="sdpa", "eager" or "fastxattn"'
        )
    column = positions - offset
    outside = (column < 0) | (column >= mask.shape[-1])
    valid = ~outside if valid is None else valid & ~outside
    column = column.clamp(0, mask.shape[-1] - 1)
    if mask.ndim == 2:  # of padding only, as flash_attention takes
        return mask.gather(1, column) * valid
    rows = mask.expand(len(positions), -1, -1, -1)
    if kept is not None:
        rows = rows.gather(2, kept.keep[:, None, :, None].expand(-1, rows.shape[1], -1, rows.shape[3]))
    short = rows.gather(3, column[:, None, None].expand(-1, rows.shape[1], rows.shape[2], -1))
    return _with_padding(short, valid, kept, past, numbers)


def _with_padding(mask: Tensor, valid: Tensor, kept: Kept | None, past: int, numbers: Tensor) -> Tensor:
    """Hide keys of padding; a query of padding sees itself, so that no softmax is empty."""
    hidden = ~valid[:, None, None]
    if kept is not None and kept.valid is not None:
        own = numbers == torch.arange(past, past + kept.keep.shape[1], device=numbers.device)[:, None]
        hidden = hidden & ~(own & ~kept.valid[:, None, :, None])
        self_seen = own & ~kept.valid[:, None, :, None]
        mask = mask | self_seen if mask.dtype == torch.bool else mask.masked_fill(self_seen, 0.0)
    return mask & ~hidden if mask.dtype == torch.bool else mask.masked_fill(hidden, torch.finfo(mask.dtype).min)
