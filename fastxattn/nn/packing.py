"""Padded tensors and PackedTokens as packed rows, on which all modules work, and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastxattn.ops.checks import check_mask, has_contents, readable
from fastxattn.packed import PackedTokens

Tokens = torch.Tensor | PackedTokens


def pack(tokens: Tokens, mask: torch.Tensor | None = None, *, name: str = "query") -> tuple[PackedTokens, Layout]:
    """Pack ``tokens``; the layout restores a result of the same rows to their form.

    Args:
        tokens: (batch, length, width), or PackedTokens with values (total, width), which are returned as they are.
        mask: (batch, length) boolean, True = valid token; None: all are valid. Not with PackedTokens.
        name: the argument's name, for messages.

    Raises:
        TypeError: ``tokens`` is neither, or ``mask`` is not boolean.
        ValueError: the shapes do not fit, or a mask came with PackedTokens.
    """
    if isinstance(tokens, PackedTokens):
        if mask is not None:
            raise ValueError(f"{name}_mask must be None when {name} is PackedTokens: its lengths mark the valid tokens")
        rows = tokens.values.shape[0]
        if tokens.values.device.type == "cpu" and readable(tokens.cu_seqlens):
            # Rows past the last sequence may hold anything, and 0 * NaN in a weight's gradient is NaN.
            used = int(tokens.cu_seqlens[-1])
            if used != rows:
                tokens = PackedTokens(tokens.values[:used], tokens.cu_seqlens, tokens.max_seqlen)
        return tokens, Layout(tokens, None, None, rows - tokens.values.shape[0])
    if not isinstance(tokens, torch.Tensor):
        raise TypeError(f"{name} must be a tensor (batch, length, width) or PackedTokens; got {type(tokens).__name__}")
    if tokens.ndim != 3:
        raise ValueError(f"{name} must be (batch, length, width); got shape {tuple(tokens.shape)}")
    batch, length, width = tokens.shape
    values = tokens.reshape(batch * length, width)
    if mask is None:
        starts = torch.arange(batch + 1, dtype=torch.int32, device=tokens.device) * length
        packed = PackedTokens(values, starts, length)
        return packed, Layout(packed, (batch, length), None)
    check_mask(f"{name}_mask", mask, tokens)
    starts = torch.nn.functional.pad(mask.sum(1, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))
    if not has_contents(mask):
        # No size may depend on the contents of a mask: valid tokens go to the front, and zeros keep the rows behind
        # them, which no sequence has. They cost their share of the projections.
        flat = mask.reshape(-1)
        order = flat.logical_not().to(torch.int8).argsort(stable=True)
        valid = flat.index_select(0, order)[:, None]
        values = torch.where(valid, values.index_select(0, order), 0)
        packed = PackedTokens(values, starts, length)
        return packed, Layout(packed, (batch, length), order, valid=valid)
    valid_rows = mask.reshape(-1).nonzero().squeeze(1)
    if valid_rows.numel() != batch * length:
        values = values.index_select(0, valid_rows)
    packed = PackedTokens(values, starts, length)
    return packed, Layout(packed, (batch, length), valid_rows)


@dataclass(frozen=True)
class Layout:
    """Form of a module's input: padded, masked or packed."""

    packed: PackedTokens
    padded: tuple[int, int] | None
    """(batch, length) of a padded tensor; None: the input was packed."""
    rows: torch.Tensor | None
    """Flat positions of the valid tokens in the padded tensor; None: every token is valid."""
    unused: int = 0
    """Rows of packed tokens past their last sequence, left out of the work."""
    valid: torch.Tensor | None = None
    """(total, 1) boolean, False in rows of zeros that stand for padding; None: there are none."""

    def restore(self, values: torch.Tensor) -> Tokens:
        """Restore ``values`` (total, width) to the input's form: PackedTokens, or padded with zeros."""
        if self.padded is None:
            if self.unused:
                values = torch.nn.functional.pad(values, (0, 0, 0, self.unused))
            return PackedTokens(values, self.packed.cu_seqlens, self.packed.max_seqlen)
        batch, length = self.padded
        if self.valid is not None:
            values = torch.where(self.valid, values, 0)
        if self.rows is not None and (self.valid is not None or self.rows.numel() != batch * length):
            values = values.new_zeros(batch * length, values.shape[-1]).index_copy(0, self.rows, values)
        return values.reshape(batch, length, values.shape[-1])

    def pack_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows (batch, length, ...) of another tensor that belong to the valid tokens, packed."""
        if self.padded is None:
            return rows[: rows.shape[0] - self.unused]
        flat = rows.reshape(self.padded[0] * self.padded[1], *rows.shape[2:])
        return flat if self.rows is None else flat.index_select(0, self.rows)

    def pack_like(self, tokens: Tokens, name: str) -> torch.Tensor:
        """Pack other tokens of the same form and lengths."""
        if isinstance(tokens, PackedTokens):
            if self.padded is not None:
                raise ValueError(f"{name} must be padded like the tokens it goes with; got PackedTokens")
            check_same_lengths(name, tokens.cu_seqlens, self.packed.cu_seqlens)
            rows = tokens.values
        elif self.padded is None:
            raise ValueError(f"{name} must be PackedTokens like the tokens it goes with; got a padded tensor")
        else:
            rows = tokens
            if tuple(rows.shape[:2]) != self.padded:
                raise ValueError(f"{name} must have batch and length {self.padded}; got {tuple(rows.shape[:2])}")
        packed = self.pack_rows(rows)
        if packed.shape[0] != self.packed.values.shape[0]:
            raise ValueError(f"{name} must have {self.packed.values.shape[0]} rows; got {packed.shape[0]}")
        return packed


def check_same_lengths(name: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    """Refuse offsets that cut rows into other sequences, where they can be read without waiting for a device."""
    if got.shape != expected.shape:
        raise ValueError(f"{name} must have as many sequences as the tokens it goes with; got {got.shape[0] - 1}")
    if readable(got) and readable(expected) and not torch.equal(got, expected):
        lengths = [offsets.diff().tolist()[:8] for offsets in (expected, got)]
        raise ValueError(f"{name} must have the lengths of the tokens it goes with, {lengths[0]}; got {lengths[1]}")


def check_same_batch(query: PackedTokens, context: PackedTokens) -> None:
    """Refuse token sets of different batch sizes."""
    if query.cu_seqlens.numel() != context.cu_seqlens.numel():
        raise ValueError(
            f"query and context must have the same batch size; got {query.cu_seqlens.numel() - 1} and "
            f"{context.cu_seqlens.numel() - 1}"
        )
