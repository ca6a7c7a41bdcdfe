"""InfoNCE and sigmoid losses over many processes: local rows against everybody's columns, gathered or in a ring."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastxattn.distributed import ring
from fastxattn.distributed.agreement import Agreement, Value, agree, announced, plain
from fastxattn.distributed.collectives import GatherRows, GlobalSum, Group, gather_rows, total_count, world_size
from fastxattn.ops import contrastive
from fastxattn.ops.checks import SHARE, check_number
from fastxattn.ops.contrastive import checks
from fastxattn.ops.contrastive.api import Ids
from fastxattn.ops.contrastive.backends import INFONCE
from fastxattn.ops.contrastive.problem import Problem
from fastxattn.ops.contrastive.reference import unit_rows, wide
from fastxattn.runtime.autocast import cast, no_autocast
from fastxattn.runtime.backend import resolve

STRATEGIES = ("gather", "ring")


def infonce_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor = 1 / 0.07,
    *,
    symmetric: bool = True,
    normalize: bool = False,
    label_smoothing: float = 0.0,
    strategy: str = "gather",
    group: Group = None,
    backend: str = "auto",
) -> Tensor:
    """Compute the global InfoNCE loss: row ``i`` of this rank's images belongs to row ``i`` of this rank's texts.

    Args:
        image_features: (n, D), this rank's rows; ``n`` may differ between ranks and be 0. D and the dtype may not.
            Under autocast features are cast as in :func:`fastxattn.infonce_loss`.
        text_features: (n, D), this rank's rows.
        logit_scale: a number or one-element tensor, the same on every rank; of any floating-point dtype. Default
            1 / 0.07.
        symmetric: both directions, or only image to text.
        normalize: unit-length features.
        label_smoothing: share of the target spread over all candidates.
        strategy: ``gather`` holds everybody's features; ``ring`` passes them round in memory O(N D / W).
        group: process group; None for the default one.
        backend: see :func:`fastxattn.infonce_loss`.

    Returns:
        The global mean, the same on every rank; DDP's mean of the gradients is its gradient. Without
        torch.distributed, or on one rank, this is :func:`fastxattn.infonce_loss`. When any rank needs a gradient, the
        loss requires grad on every rank, also where all features are frozen or there are none: the backward pass is
        a collective, and every rank has to call it.

    Raises:
        TypeError, ValueError: an argument breaks a rule; the other ranks raise a RuntimeError that names this rank.
        ValueError: ranks disagree on an argument, or on whether autograd records; on every rank, with one message.
        RuntimeError: the backend cannot run the problem; or another rank left or died, raised within the process
            group's timeout.
    """
    options: dict[str, Any] = {"symmetric": symmetric, "normalize": normalize}
    options |= {"label_smoothing": label_smoothing, "backend": backend}
    if world_size(group) == 1:
        _check(cast(image_features), cast(text_features), strategy)
        return contrastive.infonce_loss(image_features, text_features, logit_scale, **options)
    sides = _Sides(image_features, text_features, logit_scale, strategy=strategy, group=group)
    return _infonce("infonce_loss", sides, **options)


def multi_positive_infonce_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor = 1 / 0.07,
    *,
    groups: Ids,
    symmetric: bool = True,
    normalize: bool = False,
    label_smoothing: float = 0.0,
    strategy: str = "gather",
    group: Group = None,
    backend: str = "auto",
) -> Tensor:
    """Compute the global InfoNCE loss with several positives per row.

    Args:
        image_features: see :func:`infonce_loss` of this module, as for all that is not described here.
        groups: this rank's integer group ids, one (n,) for both sides or a pair; equal ids on two ranks are the same
            group.
    """
    options: dict[str, Any] = {"symmetric": symmetric, "normalize": normalize}
    options |= {"label_smoothing": label_smoothing, "backend": backend}
    if world_size(group) == 1:
        _check(cast(image_features), cast(text_features), strategy)
        several = contrastive.multi_positive_infonce_loss
        return several(image_features, text_features, logit_scale, groups=groups, **options)
    sides = _Sides(image_features, text_features, logit_scale, groups=groups, strategy=strategy, group=group)
    return _infonce("multi_positive_infonce_loss", sides, **options)


def _infonce(
    name: str, sides: _Sides, *, symmetric: bool, normalize: bool, label_smoothing: float, backend: str
) -> Tensor:
    with announced(name, sides.image_features, sides.group):
        label_smoothing = check_number("label_smoothing", label_smoothing, *SHARE)
        symmetric = bool(symmetric)
        call = _Call.of(sides, normalize, backend)
    same: dict[str, Value] = {"symmetric": symmetric, "label_smoothing": label_smoothing}
    group = sides.group
    with no_autocast(call.a.device):
        counts = call.agree(name, same).counts
        columns = call.columns(counts, both=symmetric)
        shares = []
        for own, everybody, ids in zip((call.a, call.b), columns, (call.ids, call.swapped), strict=False):
            if call.strategy == "ring":
                problem = Problem(a=own, b=everybody, scale=call.scale, label_smoothing=label_smoothing)
                rows, has = ring.infonce_rows(problem, ids, counts, group, call.backend)
                shares.append(rows.sum() / total_count(has, group).clamp(min=1))
                continue
            having = sum(counts)
            loss, positives = call.positives(contrastive.infonce_loss, ids, counts)
            if ids is not None:
                everyone = gather_rows(ids[0], counts, group)
                having = int((torch.isin(everyone, positives["groups"][1]) & (everyone >= 0)).sum())
            options = {"symmetric": False, "reduction": "sum", "label_smoothing": label_smoothing, "backend": backend}
            shares.append(loss(own, everybody, call.scale, **options, **positives) / max(having, 1))
        result: Tensor = GlobalSum.apply(sum(shares) / len(shares), group)
    return result


def sigmoid_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor = 10.0,
    logit_bias: float | Tensor | None = 0.0,
    *,
    groups: Ids | None = None,
    normalize: bool = False,
    strategy: str = "gather",
    group: Group = None,
    backend: str = "auto",
) -> Tensor:
    """Compute the global sigmoid loss.

    Arguments, results and errors are those of :func:`infonce_loss` of this module and of
    :func:`fastxattn.sigmoid_loss`.
    """
    if world_size(group) == 1:
        _check(cast(image_features), cast(text_features), strategy)
        sides = image_features, text_features, logit_scale, logit_bias
        return contrastive.sigmoid_loss(*sides, groups=groups, normalize=normalize, backend=backend)
    with announced("sigmoid_loss", image_features, group):
        bias = 0.0 if logit_bias is None else logit_bias
        given = _Sides(image_features, text_features, logit_scale, bias, groups, strategy, group)
        call = _Call.of(given, normalize, backend)
    assert call.bias is not None
    with no_autocast(call.a.device):
        counts = call.agree("sigmoid_loss", {}).counts
        (everybody,) = call.columns(counts, both=False)
        if strategy == "ring":
            problem = Problem(a=call.a, b=everybody, scale=call.scale, bias=call.bias)
            total = ring.sigmoid_total(problem, call.ids, counts, group, call.backend)
        else:
            loss, positives = call.positives(contrastive.sigmoid_loss, call.ids, counts)
            total = loss(call.a, everybody, call.scale, call.bias, reduction="sum", backend=backend, **positives)
        result: Tensor = GlobalSum.apply(total / max(sum(counts), 1), group)
    return result


class _Sides(NamedTuple):
    """One rank's arguments as they came."""

    image_features: Tensor
    text_features: Tensor
    logit_scale: float | Tensor
    logit_bias: float | Tensor | None = None
    groups: Ids | None = None
    strategy: str = "gather"
    group: Group = None


@dataclass
class _Call:
    """One rank's checked arguments. ``scale`` and ``bias`` are float32 beside all features but float64 ones."""

    a: Tensor
    b: Tensor
    scale: Tensor
    bias: Tensor | None
    ids: tuple[Tensor, Tensor] | None
    normalize: bool
    strategy: str
    group: Group
    backend: str
    wanted: tuple[bool, ...] = ()

    @staticmethod
    def of(sides: _Sides, normalize: bool, backend: str) -> _Call:
        for name, x in sides._asdict().items():
            plain(name, x)
        _, _, scale, bias, groups, strategy, group = sides
        a, b = _check(cast(sides.image_features), cast(sides.text_features), strategy)
        if a.is_meta:
            raise ValueError("image_features must hold data; got a tensor on the meta device")
        if a.shape[1] == 0:
            raise ValueError("image_features must have at least 1 feature; got 0")
        n, device = a.shape[0], a.device
        dtype = checks.computed_in(a.dtype)
        numbers = [checks.one_element("logit_scale", scale, device, dtype)]
        if bias is not None:
            numbers.append(checks.one_element("logit_bias", bias, device, dtype))
        ids = None
        if groups is not None:
            # Of one width on every rank, as they are sent.
            id_a, id_b = checks.both_sides("groups", groups, n, n, device)
            ids = (id_a.long(), id_b.long())
        if strategy == "ring":
            backend = ring.fused_backend(Problem(a=a, b=b, scale=numbers[0]), backend)
        else:  # refused here, before other ranks wait
            resolve("distributed gather", INFONCE, Problem(a=a, b=b, scale=numbers[0]), backend)
        bias = numbers[1] if bias is not None else None
        return _Call(a, b, numbers[0], bias, ids, bool(normalize), strategy, group, backend)

    @property
    def swapped(self) -> tuple[Tensor, Tensor] | None:
        return None if self.ids is None else (self.ids[1], self.ids[0])

    def agree(self, name: str, same: Mapping[str, Value]) -> Agreement:
        """Compare with the other ranks; afterwards the features are as they are sent."""
        tensors = [self.a, self.b, self.scale, *([] if self.bias is None else [self.bias])]
        shared: dict[str, Value] = {
            "the number of features": self.a.shape[1],
            "the dtype of the features": self.a.dtype,
            "groups (given or not)": self.ids is not None,
            "normalize": self.normalize,
            "strategy": self.strategy,
            **same,
        }
        agreement = agree(name, self.a.shape[0], tensors, shared, self.a.device, self.group)
        # The scale is an input of every node whose backward pass is a collective: it takes this rank there.
        self.scale = agreement.joined(self.scale)
        self.wanted = agreement.wanted
        if self.normalize:
            # Before sending, so that the gradient is projected where it belongs.
            self.a, self.b = unit_rows(wide(self.a)), unit_rows(wide(self.b))
        return agreement

    def columns(self, counts: list[int], both: bool) -> list[Tensor]:
        """The candidates of ``a``, then with ``both`` those of ``b``: everybody's, or where the ring starts."""
        if self.strategy == "ring":
            return [self.b, self.a][: 1 + both]
        gathered = [1, 0][: 1 + both]
        bias = [] if self.bias is None else [self.bias]
        self.a, self.b, self.scale, *rest = GatherRows.apply(
            counts, self.group, gathered, [i for i in (0, 1) if self.wanted[i]], self.a, self.b, self.scale, *bias
        )
        if bias:
            self.bias, *rest = rest
        return rest

    def positives(
        self, loss: Callable[..., Any], ids: tuple[Tensor, Tensor] | None, counts: list[int]
    ) -> tuple[Callable[..., Any], dict[str, Any]]:
        """The loss to call, and which of everybody's columns are positive in it."""
        if ids is not None:
            several = contrastive.multi_positive_infonce_loss if loss is contrastive.infonce_loss else loss
            return several, {"groups": (ids[0], gather_rows(ids[1], counts, self.group))}
        first = sum(counts[: dist.get_rank(self.group)])
        return loss, {"targets": torch.arange(first, first + self.a.shape[0], device=self.a.device)}


def _check(a: Tensor, b: Tensor, strategy: str) -> tuple[Tensor, Tensor]:
    checks.choice("strategy", strategy, STRATEGIES)
    a = checks.features("image_features", a)
    b = checks.features("text_features", b, a)
    if a.shape[0] != b.shape[0]:
        raise ValueError(
            f"text_features must have as many rows as image_features on each rank ({a.shape[0]}); got {b.shape[0]}"
        )
    return a, b
