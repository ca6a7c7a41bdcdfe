"""What a pruning step kept: everything needed to reduce tokens, feed attention and go back."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fastxattn.ops.checks import check_contents, readable
from fastxattn.ops.fields import TensorFields, describe_lengths
from fastxattn.ops.pruning import segments
from fastxattn.ops.pruning.budget import Budget, counts_of
from fastxattn.ops.pruning.checks import check_rows
from fastxattn.ops.pruning.rows import gather_rows, merge_rows
from fastxattn.runtime import html

FILLS = ("copy", "zero", "residual")
POSITIONS = ("keep", "compact", "mean")
_KEPT, _COLORS = "#1f6f8b", ("#e3e3e3", "#a8d0db")  # dropped, merged into a kept token


@dataclass(frozen=True, eq=False, repr=False)
class Selection(TensorFields):
    """Which tokens of each sequence stay, and where every token went.

    ::

        tokens       a0 a1 a2 a3 | b0 b1         source_cu_seqlens  0 4 6
        keep_index   0  2        | 4             cu_seqlens         0 2 3
        assignment   0 -1  1 -1  | 2 -1          place of the row that stands for the token; -1: nothing does

    On GPUs and under ``torch.compile`` ``keep_index`` may be longer than ``cu_seqlens[-1]``; the entries beyond are -1,
    and rows gathered there are 0. Attention over the kept tokens needs no gathered copy: pass ``keep_index`` as
    ``key_index``, ``cu_seqlens`` as ``cu_seqlens_k``.

    ``to`` and ``pin_memory`` move all tensors, ``len`` is the number of sequences. ``pickle`` and, after
    ``fastxattn.Selection`` was imported, ``torch.load(weights_only=True)`` read what was saved.

    Attributes:
        keep_index: (kept,) int32 rows of the packed tokens, ascending.
        cu_seqlens: (batch + 1,) int32 offsets of the kept rows.
        assignment: (total,) int32.
        source_cu_seqlens: (batch + 1,) int32 offsets of the tokens.
        max_seqlen: a bound on the kept rows of one sequence.
        scores: (total,) float32 that decided.
        protected: (total,) bool or None.
        weight: (total,) float32 or None: each token's weight in the average that its kept row becomes; None drops
            every other token.
        average: whether weights are divided by their sum over each kept row; False for the weighted sum of EViT.
    """

    _lead: ClassVar[str] = "keep_index"
    _casts: ClassVar[bool] = False

    keep_index: Tensor
    cu_seqlens: Tensor
    assignment: Tensor
    source_cu_seqlens: Tensor
    max_seqlen: int
    scores: Tensor
    protected: Tensor | None = None
    weight: Tensor | None = None
    average: bool = True

    def __len__(self) -> int:
        """The number of sequences."""
        return self.cu_seqlens.shape[0] - 1

    def __repr__(self) -> str:
        merging = "" if self.weight is None else ", merging"
        kept = f"{describe_lengths(self.cu_seqlens)} kept of {self.assignment.shape[0]} tokens{merging}"
        return f"Selection({kept}, max_seqlen={self.max_seqlen}, device={self.device})"

    def _repr_html_(self) -> str:
        """Kept (dark), merged (light) and dropped tokens of the first sequences; waits for a GPU."""
        if self.device.type == "meta" or type(self.keep_index) is not Tensor:
            return html.table(repr(self), (), ())
        offsets, kept = self.source_cu_seqlens[:9].tolist(), self.cu_seqlens[:9].diff().tolist()
        colors = [_COLORS[at >= 0] for at in self.assignment[: offsets[-1]].tolist()]
        for row in self.keep_index.tolist():
            if 0 <= row < len(colors):
                colors[row] = _KEPT
        rows = [
            (b, end - start, kept[b], html.strip(colors[start:end]) if end - start <= 4096 else "")
            for b, (start, end) in enumerate(itertools.pairwise(offsets))
        ]
        return html.table(repr(self), ("sequence", "tokens", "kept", "which"), rows)

    @property
    def rows(self) -> int:
        """Rows of a reduced tensor."""
        return self.keep_index.shape[0]

    @property
    def rank(self) -> Tensor:
        """(kept,) int32: place of each kept token in its sequence's order, 0 for the best; -1 beyond the last."""
        total = self.scores.shape[0]
        ranked = segments.best_first(self.scores, self.source_cu_seqlens, self.protected)
        start = torch.nn.functional.pad(self.source_cu_seqlens, (0, 1))[
            segments.sequence_ids(self.source_cu_seqlens, total)
        ]
        place = torch.empty(total, dtype=torch.int32, device=ranked.device)
        place[ranked] = torch.arange(total, dtype=torch.int32, device=ranked.device) - start
        if total == 0:
            return torch.full_like(self.keep_index, -1)
        return torch.where(self.keep_index >= 0, place[self.keep_index.clamp_min(0).long()], -1)

    @property
    def coefficient(self) -> Tensor | None:
        """(total,) float32 factors of the tokens in their row's sum; None when tokens are dropped.

        They sum to 1 for each row, except without :attr:`average`, where they are the weights. A row whose weights sum
        to 0 becomes the plain average. NaN and negative weights count as 0.
        """
        if self.weight is None:
            return None
        weight = torch.where(self.weight > 0, self.weight, 0.0)
        return self._shares(weight) if self.average else weight

    def _shares(self, weight: Tensor) -> Tensor:
        """``weight`` (total,), not negative, divided by its sum over each kept row."""
        ones = torch.ones_like(weight)
        sums = merge_rows(weight, self.assignment, None, self.rows)
        counts = merge_rows(ones, self.assignment, None, self.rows)
        mine = gather_rows(sums, self.assignment)
        # Denominators of 1 where there is no row or no weight: 0 / 0 would put NaN into the gradient of the weights.
        share = weight / torch.where(mine > 0, mine, 1.0)
        equal = 1 / gather_rows(counts, self.assignment).clamp_min(1.0)
        return torch.where(mine > 0, share, equal)

    def gather(self, x: Tensor) -> Tensor:
        """Kept rows of ``x`` (total, ...), in order: (kept, ...). Differentiable."""
        check_rows("x", x, self.assignment.shape[0])
        return gather_rows(x, self.keep_index)

    def reduce(self, x: Tensor) -> Tensor:
        """Rows of ``x`` as this selection reduces them: gathered, or merged by :attr:`weight`. Differentiable."""
        check_rows("x", x, self.assignment.shape[0])
        if self.weight is None:
            return gather_rows(x, self.keep_index)
        return merge_rows(x, self.assignment, self.coefficient, self.rows)

    def sizes(self, sizes: Tensor | None = None) -> Tensor:
        """(kept,) float32: how many original tokens each kept row stands for, given those of the tokens (1 each)."""
        if sizes is None:
            sizes = torch.ones(self.assignment.shape[0], dtype=torch.float32, device=self.assignment.device)
        if self.weight is None:
            return gather_rows(sizes.float(), self.keep_index)
        return merge_rows(sizes.float(), self.assignment, None, self.rows)

    def key_bias(self, sizes: Tensor | None = None) -> Tensor:
        """(kept,) float32 ``log(size)``: added to attention scores, a merged token weighs as its members (ToMe)."""
        return self.sizes(sizes).clamp_min(1.0 if sizes is None else 1e-30).log()

    def scatter_back(self, y: Tensor, source: Tensor | None = None, *, fill: str = "copy") -> Tensor:
        """Bring reduced rows ``y`` (kept, ...) back to all tokens: (total, ...). Differentiable.

        Every token takes the row that stands for it. ``fill`` says what the others hold: "zero"; "copy": their row of
        ``source`` (total, ...); "residual": every token is ``source`` plus what happened to its row,
        ``y - reduce(source)``, and the others stay as they were.
        """
        if fill not in FILLS:
            raise ValueError(f"fill must be one of {', '.join(FILLS)}; got {fill!r}")
        check_rows("y", y, self.rows)
        if fill == "zero":
            return gather_rows(y, self.assignment)
        if source is None:
            raise ValueError(f"source must be given for fill={fill!r}; got None")
        check_rows("source", source, self.assignment.shape[0])
        if fill == "residual":
            return source + gather_rows(y - self.reduce(source).to(y.dtype), self.assignment)
        shown = (self.assignment >= 0).reshape(-1, *(1 for _ in source.shape[1:]))
        return torch.where(shown, gather_rows(y, self.assignment), source)

    def positions(
        self, positions: Tensor | None = None, *, mode: str | Callable[[Selection, Tensor], Tensor] = "keep"
    ) -> Tensor:
        """Positions of the kept rows.

        Args:
            positions: (total, ...) of the tokens, for example (total, 2) or (total, 3) for rotary positions of images
                and videos; places in the sequence when None.
            mode: "keep" their own; "compact": 0, 1, 2, ... in each sequence (as if nothing had been there); "mean":
                the average over the tokens each row stands for, float32; or a function ``(selection, positions) ->
                (kept, ...)``, for rotary schemes of a model's own (it is given the places when positions are None).
        """
        if not callable(mode) and mode not in POSITIONS:
            raise ValueError(f"mode must be a function or one of {', '.join(POSITIONS)}; got {mode!r}")
        if mode == "compact":
            return _places(self.cu_seqlens, self.rows)
        if positions is None:
            positions = _places(self.source_cu_seqlens, self.assignment.shape[0])
        if positions.shape[0] != self.assignment.shape[0]:
            raise ValueError(f"positions must have {self.assignment.shape[0]} rows; got shape {tuple(positions.shape)}")
        if callable(mode):
            return mode(self, positions)
        if mode == "mean":
            return (self if self.average else replace(self, average=True)).reduce(positions.float())
        if positions.shape[0] == 0:
            return positions.new_zeros(self.rows, *positions.shape[1:])
        return positions.index_select(0, self.keep_index.clamp_min(0).long())

    def merged(self, assignment: Tensor, weight: Tensor, *, average: bool = True) -> Selection:
        """The same kept rows, with other tokens merged into them: (total,) int32 places and float32 weights."""
        return replace(self, assignment=assignment, weight=weight, average=average)


def _places(cu_seqlens: Tensor, rows: int) -> Tensor:
    at = torch.arange(rows, device=cu_seqlens.device)
    return at - torch.nn.functional.pad(cu_seqlens, (0, 1))[segments.sequence_ids(cu_seqlens, rows)]


def check_selection(
    name: str,
    selection: object,
    cu_seqlens: Tensor,
    total: int,
    budget: Budget | Tensor | None = None,
    protected: Tensor | None = None,
) -> None:
    """Refuse a selection that the strategy ``name`` should not have made.

    Where contents cannot be read without waiting for a device, only shapes are checked, and that the selection names
    protected tokens.

    Args:
        name: of the strategy, for messages.
        selection: what it returned.
        cu_seqlens: (batch + 1,) int32 offsets of the tokens that it was given.
        total: how many these were.
        budget: what it was given; bounds the rows of each sequence where lengths decide and nothing is merged.
        protected: (total,) bool or None.

    Raises:
        TypeError: not a selection.
        ValueError: it is of other tokens, its rows are out of order or too many, or a sequence lost a protected token
            and kept an unprotected one.
    """
    if not isinstance(selection, Selection):
        raise TypeError(f"strategy {name} must return a Selection; got {type(selection).__name__}")
    if selection.assignment.shape[0] != total or selection.cu_seqlens.shape != cu_seqlens.shape:
        raise ValueError(
            f"strategy {name} must select among the {total} tokens of {cu_seqlens.shape[0] - 1} sequences that it got; "
            f"its selection is of {selection.assignment.shape[0]} tokens of {len(selection)} sequences"
        )
    advice = "pass `protected` on, as in select_tokens(..., protected=protected)"
    source, offsets, index = selection.source_cu_seqlens, selection.cu_seqlens, selection.keep_index
    contents = (cu_seqlens, source, offsets, index, *(() if protected is None else (protected,)))
    if not all(readable(t) for t in contents):
        if protected is not None and selection.protected is None:
            raise ValueError(f"strategy {name} must keep protected tokens; its selection names none: {advice}")
        return
    if not torch.equal(source, cu_seqlens):
        raise ValueError(f"strategy {name} must select within the sequences that it got; its selection is of others")
    check_contents(f"cu_seqlens of the selection of strategy {name}", offsets, index.shape[0], "kept rows")
    rows = index[: int(offsets[-1])].long()
    sequence = segments.sequence_ids(offsets, rows.shape[0])
    wrong = (rows < source[sequence]) | (rows >= source[sequence + 1])
    wrong[1:] |= rows.diff() <= 0
    if bool(wrong.any()):
        at = int(wrong.to(torch.uint8).argmax())
        raise ValueError(
            f"strategy {name} must keep rows of each sequence, in ascending order; keep_index has {int(rows[at])} at "
            f"place {at}, of sequence {int(sequence[at])}"
        )
    if selection.weight is None and (isinstance(budget, Tensor) or (isinstance(budget, Budget) and budget.by_length)):
        kept = offsets.diff()
        limit = counts_of(budget, selection.scores, cu_seqlens, None, "auto").clamp_min(0)
        if bool((kept > limit).any()):
            at = int((kept - limit).argmax())
            raise ValueError(
                f"strategy {name} must keep no more than the budget; it kept {int(kept[at])} of sequence {at}, where "
                f"the budget is {int(limit[at])}"
            )
    if protected is None:
        return
    stays = torch.zeros_like(protected)
    stays[rows] = True
    lost = segments.segment_count(protected & ~stays, source)
    dropped = (lost > 0) & (segments.segment_count(stays & ~protected, source) > 0)
    if bool(dropped.any()):
        at = int(dropped.to(torch.uint8).argmax())
        raise ValueError(
            f"strategy {name} must keep protected tokens; it dropped {int(lost[at])} of sequence {at}: {advice}"
        )


torch.serialization.add_safe_globals([Selection])
