"""The six operations of pruning, each one's arguments as a frozen dataclass.

All work on packed tokens: rows of all sequences end to end, ``cu_seqlens`` (batch + 1,) int32. Rows of results that
stand for nothing are 0, indices that stand for nothing are -1. The functions of
:mod:`fastxattn.ops.pruning.reference` define what each operation computes.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from fastxattn.ops.arguments import Arguments, problem, size

MAX_MIN, DETERMINANT = 0, 1
"""``mode`` of :class:`Greedy`."""


class Problem(Arguments):
    """Base of the six."""

    operation: ClassVar[str]
    """Its name: of the reference's function, the kernels' launchers, and in ``fastxattn::pruning_<name>_<backend>``."""
    results: ClassVar[str] = "Tensor"
    """What its operators return, as a schema spells it."""
    compiled: ClassVar[tuple[str, ...]] = ("cpu", "triton")
    """Backends that have a kernel."""

    @property
    def data(self) -> Tensor:
        """The tensor whose device and dtype decide which backends run."""
        return self.x  # type: ignore[attr-defined, no-any-return]


@problem
class Select(Problem):
    """The ``counts[b]`` best rows of each sequence by (total,) float32 ``scores``, with their rows of ``x``."""

    operation = "select"
    results = "(Tensor keep_index, Tensor cu_keep, Tensor assignment, Tensor gathered)"
    compiled = ("cpu", "triton", "cuda")

    scores: Tensor
    cu_seqlens: Tensor
    counts: Tensor
    protected: Tensor | None
    x: Tensor | None
    capacity: int = size()

    @property
    def data(self) -> Tensor:
        """The rows to gather; the scores where none are."""
        return self.scores if self.x is None else self.x


@problem
class Gather(Problem):
    """``out[j] = coefficient[j] * x[index[j]]``."""

    operation = "gather"

    x: Tensor
    index: Tensor
    coefficient: Tensor | None


@problem
class Merge(Problem):
    """``out[a] = sum of coefficient[i] * x[i] over assignment[i] == a``, in ascending ``i``: gather's transpose."""

    operation = "merge"
    compiled = ("cpu", "triton", "cuda")

    x: Tensor
    assignment: Tensor
    coefficient: Tensor | None
    rows: int = size()


@problem
class Match(Problem):
    """For each row of A the most similar row of B of the same sequence."""

    operation = "match"
    results = "(Tensor best, Tensor similarity)"
    compiled = ("cpu", "triton", "cuda")

    x: Tensor
    a_index: Tensor
    cu_a: Tensor
    b_index: Tensor
    cu_b: Tensor


@problem
class Greedy(Problem):
    """The order in which a greedy search picks rows.

    No sequence gets more than ``max_count`` picks, which bounds scratch memory by a number known beforehand.
    """

    operation = "greedy"

    x: Tensor
    quality: Tensor | None
    cu_seqlens: Tensor
    counts: Tensor
    protected: Tensor | None
    mode: int
    max_count: int


@problem
class Quantile(Problem):
    """Quantiles ``q`` of each sequence's scores."""

    operation = "quantile"

    scores: Tensor
    cu_seqlens: Tensor
    q: Tensor

    @property
    def data(self) -> Tensor:
        """The scores."""
        return self.scores


PROBLEMS: dict[str, type[Problem]] = {p.operation: p for p in (Select, Gather, Merge, Match, Greedy, Quantile)}
