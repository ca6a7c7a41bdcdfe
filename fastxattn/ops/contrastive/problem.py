"""The arguments of the contrastive losses, once for every backend, and the figures that InfoNCE measures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from typing_extensions import Self

from fastxattn.ops.arguments import Arguments, differentiable, problem
from fastxattn.ops.checks import check_count

_Kind = TypeVar("_Kind", bound="Pairs")


@problem
class Problem(Arguments):
    """A checked call; :func:`fastxattn.infonce_loss` and its siblings describe the options."""

    a: Tensor
    b: Tensor
    scale: Tensor  # one element, no dimensions; float64 for float64 features, else float32
    bias: Tensor | None = None
    targets: Tensor | None = None
    group_a: Tensor | None = None
    group_b: Tensor | None = None
    ignore_a: Tensor | None = None
    ignore_b: Tensor | None = None
    hard_negatives: Tensor | None = None
    queue_a: Tensor | None = None
    queue_b: Tensor | None = None
    teacher_a: Tensor | None = None  # detached, in the dtype of scale, the teacher's own scale inside
    teacher_b: Tensor | None = None
    weight_a: Tensor | None = None
    weight_b: Tensor | None = None
    margin: float | None = None
    exclude_self: bool = False
    label_smoothing: float = 0.0
    decoupled: bool = False
    symmetric: bool = True
    normalize: bool = False
    metrics: bool = False
    reduction: str = "mean"


@problem
class Pairs(Arguments):
    """A similarity matrix that is never stored, and which of its pairs are positive: what every operator takes.

    Logits are ``scale * norm_a * norm_b * <a, b> + bias``. A pair is positive where ``id_a`` and ``id_b`` are equal,
    ignored where it is not positive and ``skip_a`` equals ``skip_b``.
    """

    a: Tensor = differentiable()  # (N, D)
    b: Tensor = differentiable()  # (M, D)
    scale: Tensor = differentiable()  # one element, float32
    bias: Tensor | None = differentiable(default=None)
    norm_a: Tensor | None = None  # (N,) factor of each row, float32
    norm_b: Tensor | None = None
    id_a: Tensor | None  # (N,) int32
    id_b: Tensor | None
    skip_a: Tensor | None = None  # (N,) int32
    skip_b: Tensor | None = None
    exact: Tensor | None = None  # (N,) the precise logit of each row's only positive
    exclude_self: bool = False

    def matrix(self) -> tuple[Tensor | None, ...]:
        """The tensors that make the matrix, as kernels take them."""
        return tuple([getattr(self, name) for name in Pairs.tensors])

    def swapped(self) -> Self:
        """The transposed matrix; ``exact`` stays as it is, by rows of the original."""
        return self.replace(**{x: getattr(self, y) for x, y in _SWAPPED.items() if x in self.names})

    def into(self, kind: type[_Kind], **more: Any) -> _Kind:
        """The arguments of an operator over this matrix."""
        return kind(**dict(zip(self.names, self.values(), strict=True)), **more)


@problem
class Statistics(Pairs):
    """What statistics of rows and columns take: limits of a negative's logit, and the logit that ranks count from."""

    limit_row: Tensor | None = None
    limit_col: Tensor | None = None
    rank_row: Tensor | None = None
    rank_col: Tensor | None = None
    rows: bool = True
    columns: bool = True
    means: bool = False


@problem
class Slopes(Pairs):
    """What the derivative of statistics takes."""

    limit_row: Tensor | None = None
    limit_col: Tensor | None = None
    rows: bool = True
    columns: bool = True


@problem
class Sigmoid(Pairs):
    """What the sigmoid loss takes: weights of the rows, for the gradient."""

    weight: Tensor | None = None


_PAIRED = ("a b", "norm_a norm_b", "id_a id_b", "skip_a skip_b", "limit_row limit_col", "rank_row rank_col")
_SWAPPED = {x: y for pair in _PAIRED for x, y in (pair.split(), pair.split()[::-1])}


@dataclass(frozen=True)
class Metrics:
    """Retrieval figures of one direction, from the loss's own pass. Each is a tensor on the features' device.

    ``rank`` (N,) is that of a row's best positive among its negatives in the batch: 1 when it is ahead of them all. Tie
    rule: a negative whose logit equals the positive's counts as ahead of it, and so does every negative when the
    positive's is NaN. ``mean_positive`` is the mean over rows of the mean of a row's positives, which are several where
    targets repeat. Rows without a positive have rank 0 and take part in no figure; neither do excluded pairs, queues
    and hard negatives. Figures of no rows are 0.
    """

    rank: Tensor
    mean_positive: Tensor
    mean_negative: Tensor

    @staticmethod
    def of(rank: Tensor, at: Tensor, mean_neg: Tensor, has: Tensor) -> Metrics:
        """From per-row ranks, positive logits and mean negative logits of the rows in ``has``."""
        number = has.sum().clamp(min=1)

        def mean(x: Tensor) -> Tensor:
            return torch.where(has, x, 0.0).sum().detach() / number

        return Metrics(torch.where(has, rank, 0).long(), mean(at), mean(mean_neg))

    def recall(self, k: int) -> Tensor:
        """The share of rows whose best positive is among the first ``k``, a whole number of at least 1."""
        check_count("k", k)
        valid = self.rank > 0
        return (valid & (self.rank <= k)).sum() / valid.sum().clamp(min=1)

    @property
    def top1(self) -> Tensor:
        """The share of rows whose best positive comes first."""
        return self.recall(1)

    @property
    def median_rank(self) -> Tensor:
        """The median rank over rows with a positive (the lower of two middles); NaN when there is none."""
        return torch.where(self.rank > 0, self.rank.double(), torch.nan).nanmedian()
