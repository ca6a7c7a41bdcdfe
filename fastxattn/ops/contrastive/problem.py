"""What a contrastive loss is asked to do, after checking: one object for every backend."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastxattn.ops.numbers import check_count


@dataclass(frozen=True)
class Metrics:
    """Retrieval figures of one direction, from the loss's own pass. Each is a tensor on the features' device.

    ``rank`` (N,) is that of a row's best positive among its negatives in the batch: 1 when it is ahead of them all. Tie
    rule: a negative whose logit equals the positive's counts as ahead of it, and so does every negative when the
    positive's is NaN. ``mean_positive`` is the mean over rows of the mean of a row's positives, which are several where
    targets repeat. Rows without a positive have rank 0 and take part in no figure; neither do excluded pairs, queues
    and hard negatives. Figures of no rows are 0.
    """

    rank: torch.Tensor
    mean_positive: torch.Tensor
    mean_negative: torch.Tensor

    @staticmethod
    def of(rank: torch.Tensor, at: torch.Tensor, mean_neg: torch.Tensor, has: torch.Tensor) -> Metrics:
        """From per-row ranks, positive logits and mean negative logits of the rows in ``has``."""
        number = has.sum().clamp(min=1)

        def mean(x: torch.Tensor) -> torch.Tensor:
            return torch.where(has, x, 0.0).sum().detach() / number

        return Metrics(torch.where(has, rank, 0).long(), mean(at), mean(mean_neg))

    def recall(self, k: int) -> torch.Tensor:
        """The share of rows whose best positive is among the first ``k``, a whole number of at least 1."""
        check_count("k", k)
        valid = self.rank > 0
        return (valid & (self.rank <= k)).sum() / valid.sum().clamp(min=1)

    @property
    def top1(self) -> torch.Tensor:
        """The share of rows whose best positive comes first."""
        return self.recall(1)

    @property
    def median_rank(self) -> torch.Tensor:
        """The median rank over rows with a positive (the lower of two middles); NaN when there is none."""
        return torch.where(self.rank > 0, self.rank.double(), torch.nan).nanmedian()


@dataclass
class Problem:
    """A checked call; see :func:`fastxattn.infonce_loss` for what the options mean."""

    a: torch.Tensor
    b: torch.Tensor
    scale: torch.Tensor  # one element, no dimensions; float64 for float64 features, else float32
    bias: torch.Tensor | None = None
    targets: torch.Tensor | None = None
    groups: tuple[torch.Tensor, torch.Tensor] | None = None
    hard_negatives: torch.Tensor | None = None
    queue_a: torch.Tensor | None = None
    queue_b: torch.Tensor | None = None
    teacher: tuple[torch.Tensor, torch.Tensor] | None = None
    """Detached features in the dtype of ``scale``, the teacher's own scale inside the first."""
    ignore_ids: tuple[torch.Tensor, torch.Tensor] | None = None
    margin: float | None = None
    exclude_self: bool = False
    label_smoothing: float = 0.0
    decoupled: bool = False
    symmetric: bool = True
    normalize: bool = False
    metrics: bool = False
