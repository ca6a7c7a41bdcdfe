"""Contrastive losses as modules, with the call signatures of the modules they replace."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastxattn import distributed
from fastxattn.ops.checks import SHARE, check_number
from fastxattn.ops.contrastive import checks, infonce_loss, sigmoid_loss
from fastxattn.ops.late_interaction import late_interaction_loss, maxsim
from fastxattn.runtime.autocast import cast


class InfoNCELoss(nn.Module):
    """CLIP's loss, called as open_clip's ``ClipLoss``, without the logits in memory.

    Args:
        local_loss: accepted for open_clip's signature; local rows with gathered columns is what always happens.
        gather_with_grad: accepted for open_clip's signature; gradients always cross ranks.
        cache_labels: accepted for open_clip's signature; there are no labels to cache.
        rank: accepted for open_clip's signature; the process group knows it.
        world_size: above 1 the loss is global over ``group`` (:func:`fastxattn.distributed.infonce_loss`).
        group: process group; None for the default one.
        options: further arguments of :func:`fastxattn.infonce_loss`, or of the distributed loss.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        *,
        group: Any = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.world_size, self.group, self.options = world_size, group, options

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of (N, D) features; ``logit_bias`` is accepted and cancels in a softmax: its gradient is 0.

        (0 and not None, so that DistributedDataParallel finds the parameter used.)
        """
        if self.world_size > 1:
            loss = distributed.infonce_loss(
                image_features, text_features, logit_scale, group=self.group, **self.options
            )
        else:
            loss = infonce_loss(image_features, text_features, logit_scale, **self.options)
        if isinstance(logit_bias, Tensor):
            checks.one_element("logit_bias", logit_bias, image_features.device)
            loss = _using(loss, logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss


def _using(result: Any, unused: Tensor) -> Any:
    """``result`` (a loss, or a tuple that starts with one) with a gradient of 0 for ``unused``, whatever that holds."""
    if isinstance(result, tuple):
        return (_using(result[0], unused), *result[1:])
    return result + unused.flatten()[:0].sum().to(result)


class SigmoidLoss(nn.Module):
    """SigLIP's loss, called as open_clip's ``SigLipLoss``, without the logits in memory.

    Args:
        cache_labels: accepted for open_clip's signature; there are no labels to cache.
        rank: accepted for open_clip's signature; the process group knows it.
        world_size: above 1 the loss is global over ``group`` (:func:`fastxattn.distributed.sigmoid_loss`).
        dist_impl: ``gather`` for everybody's features at once; any other of open_clip's names is the ring.
        group: process group; None for the default one.
        options: further arguments of :func:`fastxattn.sigmoid_loss`, or of the distributed loss.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        *,
        group: Any = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.world_size, self.group, self.options = world_size, group, options
        self.strategy = "gather" if dist_impl == "gather" else "ring"

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = 0.0,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of (N, D) features; a ``logit_bias`` of None is 0."""
        logit_bias = 0.0 if logit_bias is None else logit_bias
        if self.world_size > 1:
            ranks = {"strategy": self.strategy, "group": self.group}
            loss = distributed.sigmoid_loss(
                image_features, text_features, logit_scale, logit_bias, **ranks, **self.options
            )
        else:
            loss = sigmoid_loss(image_features, text_features, logit_scale, logit_bias, **self.options)
        return {"contrastive_loss": loss} if output_dict else loss


class FILIPLoss(nn.Module):
    """FILIP's token-wise loss over packed token sets (:func:`fastxattn.ops.late_interaction.late_interaction_loss`)."""

    def __init__(self, reduction: str = "mean", smooth: float | None = None) -> None:
        super().__init__()
        self.reduction, self.smooth = reduction, smooth

    def forward(
        self,
        image_tokens: Tensor,
        text_tokens: Tensor,
        cu_seqlens_image: Tensor,
        cu_seqlens_text: Tensor,
        logit_scale: float | Tensor,
    ) -> Tensor:
        """The loss of (tokens, D) sides whose sets belong together in order."""
        sides = image_tokens, text_tokens, cu_seqlens_image, cu_seqlens_text
        return late_interaction_loss(*sides, logit_scale, reduction=self.reduction, smooth=self.smooth)


class BLIP2ITCLoss(nn.Module):
    """BLIP-2's image-text contrast: a text against an image scores the best of the image's query tokens.

    Args:
        label_smoothing: as in BLIP-2, 0.1.
    """

    def __init__(self, label_smoothing: float = 0.1) -> None:
        super().__init__()
        self.label_smoothing = check_number("label_smoothing", label_smoothing, *SHARE)

    def forward(self, image_queries: Tensor, text_features: Tensor, logit_scale: float | Tensor) -> Tensor:
        """The loss of ``image_queries`` (N, queries, D) and ``text_features`` (N, D), pairs in order; 0 without pairs.

        Raises:
            TypeError, ValueError: the shapes, dtypes or devices do not go together.
        """
        image_queries, text_features = cast(image_queries), cast(text_features)
        if image_queries.dim() != 3 or text_features.shape != (image_queries.shape[0], image_queries.shape[2]):
            raise ValueError(
                "text_features must have shape (N, D) for image_queries (N, queries, D); got "
                f"{tuple(text_features.shape)} for {tuple(image_queries.shape)}"
            )
        checks.features("text_features", text_features, checks.features("image_queries", image_queries, dims=3))
        n, queries, _ = image_queries.shape
        device = image_queries.device
        cu_text = torch.arange(n + 1, dtype=torch.int32, device=device)
        scores = maxsim(text_features, image_queries.flatten(0, 1), cu_text, cu_text * queries)
        logits = scores * checks.one_element("logit_scale", logit_scale, device, scores.dtype)
        labels = torch.arange(n, device=device)
        if n == 0:
            return logits.sum()
        loss = nn.functional.cross_entropy
        return (
            loss(logits, labels, label_smoothing=self.label_smoothing)
            + loss(logits.T, labels, label_smoothing=self.label_smoothing)
        ) / 2


class MultiTaskLoss(nn.Module):
    """A weighted sum of task losses, with weights per task and per modality, and modality dropout.

    One modality that learns faster than the others starves them: its share of the gradient is set here, and in
    training each modality can be left out of a step at random, so that no task comes to lean on it alone.

    Args:
        tasks: weight of each task.
        modalities: which modalities each task looks at; a task without an entry looks at none in particular.
        modality_weights: weight of each modality; a task's weight is multiplied by the mean of its modalities'.
        modality_dropout: probability, per modality and training step, that tasks which need it are left out; the
            tasks that stay are not rescaled. At least one modality always stays.
    """

    def __init__(
        self,
        tasks: Mapping[str, float],
        modalities: Mapping[str, tuple[str, ...]] | None = None,
        modality_weights: Mapping[str, float] | None = None,
        modality_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_number("modality_dropout", modality_dropout, *SHARE)
        for name, weight in {**tasks, **(modality_weights or {})}.items():
            check_number(f"the weight of {name!r}", weight)
        for task, group in (modalities or {}).items():
            if isinstance(group, str):
                raise TypeError(f"modalities must map {task!r} to a tuple of names, as ({group!r},); got {group!r}")
        unknown = set(modalities or {}) - set(tasks)
        if unknown:
            raise ValueError(f"modalities must name tasks only; got {sorted(unknown)}")
        self.tasks, self.modalities = dict(tasks), dict(modalities or {})
        self.modality_weights = dict(modality_weights or {})
        self.modality_dropout = modality_dropout
        self.names = sorted({name for group in self.modalities.values() for name in group})

    def weight(self, task: str) -> float:
        """The task's weight with its modalities' in it."""
        group = self.modalities.get(task, ())
        factor = sum(self.modality_weights.get(name, 1.0) for name in group) / len(group) if group else 1.0
        return self.tasks[task] * factor

    def dropped(self, generator: torch.Generator | None = None) -> set[str]:
        """The modalities left out of this step: none outside of training."""
        if not self.training or self.modality_dropout == 0.0 or not self.names:
            return set()
        device = "cpu" if generator is None else generator.device
        chance = torch.rand(len(self.names), generator=generator, dtype=torch.float32, device=device)
        gone = {name for name, c in zip(self.names, chance.tolist(), strict=True) if c < self.modality_dropout}
        return gone - {self.names[int(chance.argmax())]}

    def forward(self, losses: Mapping[str, Tensor], generator: torch.Generator | None = None) -> Tensor:
        """The weighted sum of ``losses``, one scalar per task; a task that a dropped modality serves counts as 0.

        Raises:
            ValueError: a loss is given for an unknown task, or none is given at all.
        """
        unknown = set(losses) - set(self.tasks)
        if unknown or not losses:
            raise ValueError(f"losses must be named after tasks {sorted(self.tasks)}; got {sorted(losses)}")
        gone = self.dropped(generator)
        total: Tensor | None = None
        for task, loss in losses.items():
            if gone.intersection(self.modalities.get(task, ())):
                # A factor of 0 keeps the graph, so that DDP finds every parameter used; NaN times 0 would be NaN.
                part = loss.nan_to_num(0.0, 0.0, 0.0) * 0.0
            else:
                part = loss * self.weight(task)
            total = part if total is None else total + part
        assert total is not None
        return total
