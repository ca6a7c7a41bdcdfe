"""How many tokens to keep: a budget turns scores into a count for each sequence."""

from __future__ import annotations

import math
import numbers
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from fastxattn.ops.pruning import checks, segments
from fastxattn.ops.pruning.backends import run
from fastxattn.ops.pruning.problem import Quantile

STATIC = ("count", "ratio", "total")
RANGES = {
    "count": ("k", 0.0, math.inf),
    "ratio": ("r", 0.0, 1.0),
    "total": ("n", 0.0, math.inf),
    "threshold": ("t", -math.inf, math.inf),
    "mass": ("p", 0.0, 1.0),
    "adaptive": ("factor", 0.0, sys.float_info.max),
}
"""Of each kind: the name of its value in its class method, and the range of it."""
KINDS = tuple(RANGES)
SLACK = 1e-6
"""A share that exceeds a whole number of tokens by less than this is that number: 0.1 * 30 is 3, not 4."""


@dataclass(frozen=True)
class Budget:
    """A rule for the number of tokens to keep; build one with its class methods.

    ====================  ==========================================================  =======
    ``Budget.count``      ``k`` of each sequence (all, where it has fewer)            static
    ``Budget.ratio``      ``ceil(r * length)`` of each sequence                       static
    ``Budget.total``      ``n`` in all, shared over the batch (or a video's frames)   static
    ``Budget.threshold``  scores of at least ``t``                                    dynamic
    ``Budget.mass``       the fewest tokens that hold a share ``p`` of the score sum  dynamic
    ``Budget.adaptive``   outliers: scores above ``q3 + factor * (q3 - q1)``          dynamic
    ====================  ==========================================================  =======

    A *static* budget bounds the number of kept rows by shapes alone, so that it costs no synchronisation; a *dynamic*
    one only by the number of tokens. Protected tokens count towards ``count``, ``ratio`` and ``total``; dynamic budgets
    keep them in addition. ``minimum`` and ``maximum`` clip every sequence's count.
    """

    kind: str
    value: float
    by: str = "length"
    minimum: int = 0
    maximum: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {self.kind!r}")
        name, low, high = RANGES[self.kind]
        check = _natural if self.kind in ("count", "total") else _within
        object.__setattr__(self, "value", check(name, self.value, low, high))
        if self.by not in ("length", "score") or (self.by == "score" and self.kind != "total"):
            raise ValueError(f"by must be length or score (score for a total only); got {self.by!r} for {self.kind}")
        object.__setattr__(self, "minimum", _natural("minimum", self.minimum))
        if self.maximum is not None:
            object.__setattr__(self, "maximum", _natural("maximum", self.maximum))
            if self.maximum < self.minimum:
                raise ValueError(f"maximum must be at least the minimum, {self.minimum}; got {self.maximum}")
        if self.kind in ("count", "total") and (self.minimum or self.maximum is not None):
            raise ValueError(
                f"minimum and maximum are not for a budget of {self.kind}; got {self.minimum}, {self.maximum}"
            )

    @classmethod
    def count(cls, k: int) -> Budget:
        """Keep ``k`` tokens of each sequence."""
        return cls("count", k)

    @classmethod
    def ratio(cls, r: float, *, minimum: int = 0) -> Budget:
        """Keep ``ceil(r * length)`` tokens of each sequence."""
        return cls("ratio", r, minimum=minimum)

    @classmethod
    def total(cls, n: int, *, by: str = "length") -> Budget:
        """Keep ``n`` tokens in all, shared ``by`` "length", or by "score": the ``n`` best of the whole batch."""
        return cls("total", n, by)

    @classmethod
    def threshold(cls, t: float, *, minimum: int = 0, maximum: int | None = None) -> Budget:
        """Keep tokens that score at least ``t``."""
        return cls("threshold", t, minimum=minimum, maximum=maximum)

    @classmethod
    def mass(cls, p: float, *, minimum: int = 0, maximum: int | None = None) -> Budget:
        """Keep the fewest tokens whose scores (negative ones as 0) sum to a share ``p`` of the sequence's sum.

        Scores count down to 2**-40 of the sequence's largest. Infinite scores hold the whole mass in equal parts.
        """
        return cls("mass", p, minimum=minimum, maximum=maximum)

    @classmethod
    def adaptive(cls, factor: float = 1.5, *, minimum: int = 1, maximum: int | None = None) -> Budget:
        """Keep outliers by the interquartile range, as PruMerge (arXiv 2403.15388) does."""
        return cls("adaptive", factor, minimum=minimum, maximum=maximum)

    @property
    def by_length(self) -> bool:
        """Whether lengths alone decide the counts, whatever the scores."""
        return self.static and self.by == "length"

    @property
    def static(self) -> bool:
        """Whether shapes alone bound the number of kept rows."""
        return self.kind in STATIC

    def capacity(self, total: int, batch: int, max_seqlen: int | None = None) -> int:
        """A bound on the rows kept of ``total`` tokens in ``batch`` sequences; exact for sequences of one length."""
        bounds = [total]
        if self.kind == "count":
            bounds.append(batch * int(self.value))
        elif self.kind == "total":
            bounds.append(int(self.value))
        elif self.kind == "ratio":
            bounds.append(math.floor(self.value * total) + batch * (1 + self.minimum))
            if max_seqlen is not None:
                bounds.append(batch * max(_ceil(self.value * max_seqlen), self.minimum))
        if self.maximum is not None:
            bounds.append(batch * self.maximum)
        return min(bounds)

    def per_sequence(self, total: int, max_seqlen: int | None = None) -> int:
        """A bound on the rows kept of one sequence."""
        return self.capacity(total, 1, max_seqlen)

    def counts(
        self, scores: Tensor, cu_seqlens: Tensor, protected: Tensor | None = None, *, backend: str = "auto"
    ) -> Tensor:
        """(batch,) int32: tokens to keep of each sequence, within [0, length].

        Args:
            scores: (total,) float32; NaN ranks last and never reaches a threshold.
            cu_seqlens: (batch + 1,) int32.
            protected: (total,) bool or None.
            backend: of the quantiles that ``adaptive`` needs.
        """
        lengths = cu_seqlens.diff()
        if self.kind == "count":
            counts = torch.full_like(lengths, min(int(self.value), 2**31 - 1))
        elif self.kind == "ratio":
            wanted = lengths.double() * self.value
            counts = (wanted - (wanted / 2).clamp_max(SLACK)).ceil()
        elif self.kind == "total":
            counts = self._shared(scores, cu_seqlens, protected)
        elif self.kind == "threshold":
            counts = _passing(scores >= self.value, cu_seqlens, protected)
        elif self.kind == "mass":
            counts = self._mass(scores, cu_seqlens, protected)
        else:
            shares = scores.new_tensor([0.25, 0.75])
            quartiles = run(Quantile(scores=scores, cu_seqlens=cu_seqlens, q=shares), backend)
            cut = quartiles[:, 1] + self.value * (quartiles[:, 1] - quartiles[:, 0])
            counts = _passing(scores > segments.spread(cut, cu_seqlens, scores.shape[0]), cu_seqlens, protected)
        if self.minimum:
            counts = counts.clamp_min(self.minimum)
        if self.maximum is not None:
            counts = counts.clamp_max(self.maximum)
        return torch.minimum(counts, lengths).clamp_min(0).to(torch.int32)

    def _shared(self, scores: Tensor, cu_seqlens: Tensor, protected: Tensor | None) -> Tensor:
        lengths = cu_seqlens.diff()
        if self.by == "length":
            return segments.share(int(self.value), lengths, lengths)
        # The n best of all: one selection over everything, then who got how many.
        everything = torch.stack([torch.zeros_like(cu_seqlens[-1]), cu_seqlens[-1]])
        ranked = segments.best_first(scores, everything, protected)
        kept = torch.zeros_like(scores, dtype=torch.bool)
        kept[ranked[: int(self.value)]] = True
        return segments.segment_count(kept, cu_seqlens)

    def _mass(self, scores: Tensor, cu_seqlens: Tensor, protected: Tensor | None) -> Tensor:
        # Whole numbers: running sums are exact, so that the difference of two of them does not depend on the batch.
        mass = segments.relative_to_largest(
            scores if protected is None else torch.where(protected, 0.0, scores), cu_seqlens
        )
        total, inside = scores.shape[0], segments.inside(cu_seqlens, scores.shape[0])
        ranked = segments.best_first(scores, cu_seqlens, protected)
        ordered = torch.where(inside, segments.fixed_point(mass[ranked]), 0)
        running = torch.nn.functional.pad(ordered.cumsum(0), (1, 0))
        before = running[:-1] - segments.spread(running[cu_seqlens[:-1].long()], cu_seqlens, total)
        wanted = self.value * segments.segment_count(ordered, cu_seqlens).double()
        # A token is needed when the mass before it falls short of the share (by more than rounding).
        needed = before < segments.spread(wanted, cu_seqlens, total) * (1 - 1e-12)
        guarded = torch.zeros_like(needed) if protected is None else protected[ranked]
        return segments.segment_count(needed | guarded, cu_seqlens)


def counts_of(
    budget: Budget | Tensor, scores: Tensor, cu_seqlens: Tensor, protected: Tensor | None, backend: str
) -> Tensor:
    """(batch,) int32 counts of a budget, or the counts given in its place.

    Raises:
        TypeError: neither a budget nor an int32 tensor.
        ValueError: counts of another shape or on another device.
    """
    if isinstance(budget, Budget):
        return budget.counts(scores, cu_seqlens, protected, backend=backend)
    if isinstance(budget, Tensor):
        checks.check_vector("budget", budget, cu_seqlens.shape[0] - 1, torch.int32)
        checks.check_device("budget", budget, "cu_seqlens", cu_seqlens)
        return budget.contiguous()
    hint = ""
    if isinstance(budget, numbers.Real) and not isinstance(budget, bool):
        kind = "count" if isinstance(budget, numbers.Integral) else "ratio"
        hint = f"; write Budget.{kind}({budget})"
    raise TypeError(f"budget must be a Budget or an int32 tensor of counts; got {type(budget).__name__}{hint}")


def _passing(passes: Tensor, cu_seqlens: Tensor, protected: Tensor | None) -> Tensor:
    return segments.segment_count(passes if protected is None else passes | protected, cu_seqlens)


def _ceil(value: float) -> int:
    return math.ceil(value - torch.sym_min(SLACK, value / 2))  # without a branch: sizes may be symbols


def _natural(name: str, value: float, low: float = 0, high: float = math.inf) -> int:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int; got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{name} must not be negative; got {value}")
    return int(value)


def _within(name: str, value: float, low: float, high: float) -> float:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number; got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name} must lie in [{low}, {high}]; got {value}")
    return float(value)
