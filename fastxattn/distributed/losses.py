"""InfoNCE and sigmoid losses over many processes: local rows against everybody's columns, gathered or in a ring."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from fastxattn.distributed import ring
from fastxattn.distributed.agreement import Agreement, Value, agree, announced, plain
from fastxattn.distributed.collectives import GatherRows, GlobalSum, Group, gather_rows, total_count, world_size
from fastxattn.ops import contrastive
from fastxattn.ops.contrastive import checks
from fastxattn.ops.contrastive.api import BACKENDS, Ids
from fastxattn.ops.contrastive.problem import Problem
from fastxattn.ops.contrastive.reference import unit_rows, wide
from fastxattn.ops.numbers import SHARE, check_number
from fastxattn.runtime import backend as choose
from fastxattn.runtime.autocast import cast, no_autocast

STRATEGIES = ("gather", "ring")


def infonce_loss(
    a: torch.Tensor,
    b: torch.Tensor,
    logit_scale: float | torch.Tensor,
    *,
    groups: Ids | None = None,
    symmetric: bool = True,
    normalize: bool = False,
    label_smoothing: float = 0.0,
    strategy: str = "gather",
    group: Group = None,
    backend: str = "auto",
) -> torch.Tensor:
    """The global InfoNCE loss: row ``i`` of this rank's ``a`` belongs to row ``i`` of this rank's ``b``.

    Args:
        a: (n, D), this rank's rows; ``n`` may differ between ranks and be 0. D and the dtype may not. Under autocast
            features are cast as in :func:`fastxattn.infonce_loss`.
        b: (n, D), this rank's rows.
        logit_scale: a number or one-element tensor, the same on every rank; of any floating-point dtype.
        groups: this rank's integer group ids, one (n,) for both sides or a pair; equal ids on two ranks are the same
            group.
        symmetric: both directions, or only a to b.
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
    if world_size(group) == 1:
        _check(cast(a), cast(b), strategy)
        return contrastive.infonce_loss(
            a, b, logit_scale, groups=groups, symmetric=symmetric, normalize=normalize,
            label_smoothing=label_smoothing, backend=backend,
        )  # fmt: skip
    with announced("infonce_loss", a, group):
        label_smoothing = check_number("label_smoothing", label_smoothing, *SHARE)
        symmetric = bool(symmetric)
        call = _Call.of(a, b, logit_scale, None, groups, normalize, strategy, group, backend)
    same: dict[str, Value] = {"symmetric": symmetric, "label_smoothing": label_smoothing}
    with no_autocast(call.a.device):
        counts = call.agree("infonce_loss", same).counts
        columns = call.columns(counts, both=symmetric)
        shares = []
        for own, everybody, ids in zip((call.a, call.b), columns, (call.ids, call.swapped), strict=False):
            if strategy == "ring":
                rows, has = ring.infonce_rows(
                    own, everybody, call.scale, ids, label_smoothing, counts, group, call.backend
                )
                shares.append(rows.sum() / total_count(has, group).clamp(min=1))
                continue
            having = sum(counts)
            positives = call.positives(ids, counts)
            if ids is not None:
                everyone = gather_rows(ids[0], counts, group)
                having = int((torch.isin(everyone, positives["groups"][1]) & (everyone >= 0)).sum())
            total = contrastive.infonce_loss(
                own, everybody, call.scale, symmetric=False, reduction="sum", label_smoothing=label_smoothing,
                backend=backend, **positives,
            )  # fmt: skip
            shares.append(total / max(having, 1))
        result: torch.Tensor = GlobalSum.apply(sum(shares) / len(shares), group)
    return result


def sigmoid_loss(
    a: torch.Tensor,
    b: torch.Tensor,
    logit_scale: float | torch.Tensor,
    logit_bias: float | torch.Tensor | None = 0.0,
    *,
    groups: Ids | None = None,
    normalize: bool = False,
    strategy: str = "gather",
    group: Group = None,
    backend: str = "auto",
) -> torch.Tensor:
    """The global sigmoid loss; arguments, returns and errors as in :func:`infonce_loss` of this module."""
    if world_size(group) == 1:
        _check(cast(a), cast(b), strategy)
        return contrastive.sigmoid_loss(
            a, b, logit_scale, logit_bias, groups=groups, normalize=normalize, backend=backend
        )
    with announced("sigmoid_loss", a, group):
        bias = 0.0 if logit_bias is None else logit_bias
        call = _Call.of(a, b, logit_scale, bias, groups, normalize, strategy, group, backend)
    assert call.bias is not None
    with no_autocast(call.a.device):
        counts = call.agree("sigmoid_loss", {}).counts
        (everybody,) = call.columns(counts, both=False)
        if strategy == "ring":
            total = ring.sigmoid_total(call.a, everybody, call.scale, call.bias, call.ids, counts, group, call.backend)
        else:
            total = contrastive.sigmoid_loss(
                call.a, everybody, call.scale, call.bias, reduction="sum", backend=backend,
                **call.positives(call.ids, counts),
            )  # fmt: skip
        result: torch.Tensor = GlobalSum.apply(total / max(sum(counts), 1), group)
    return result


@dataclass
class _Call:
    """One rank's checked arguments. ``scale`` and ``bias`` are float32 beside all features but float64 ones."""

    a: torch.Tensor
    b: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None
    ids: tuple[torch.Tensor, torch.Tensor] | None
    normalize: bool
    strategy: str
    group: Group
    backend: str
    wanted: tuple[bool, ...] = ()

    @staticmethod
    def of(
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float | torch.Tensor,
        bias: float | torch.Tensor | None,
        groups: Ids | None,
        normalize: bool,
        strategy: str,
        group: Group,
        backend: str,
    ) -> _Call:
        for name, x in (("a", a), ("b", b), ("logit_scale", scale), ("logit_bias", bias)):
            plain(name, x)
        a, b = cast(a), cast(b)
        a, b = _check(a, b, strategy)
        if a.is_meta:
            raise ValueError("a must hold data; got a tensor on the meta device")
        if a.shape[1] == 0:
            raise ValueError("a must have at least 1 feature; got 0")
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
            backend = ring.fused_backend(a, b, numbers[0], backend)
        else:  # refused here, before other ranks wait
            choose.resolve("distributed gather", BACKENDS, Problem(a, b, numbers[0]), backend)
        return _Call(
            a, b, numbers[0], numbers[1] if bias is not None else None, ids, bool(normalize), strategy, group, backend
        )

    @property
    def swapped(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        return None if self.ids is None else (self.ids[1], self.ids[0])

    def agree(self, name: str, same: Mapping[str, Value]) -> Agreement:
        """Compare with the other ranks; afterwards the features are as they are sent."""
        tensors = [self.a, self.b, self.scale, *([] if self.bias is None else [self.bias])]
        shared: dict[str, Value] = {
            "the number of features of a and b": self.a.shape[1], "the dtype of a and b": self.a.dtype,
            "groups (given or not)": self.ids is not None, "normalize": self.normalize, "strategy": self.strategy,
            **same,
        }  # fmt: skip
        agreement = agree(name, self.a.shape[0], tensors, shared, self.a.device, self.group)
        # The scale is an input of every node whose backward pass is a collective: it takes this rank there.
        self.scale = agreement.joined(self.scale)
        self.wanted = agreement.wanted
        if self.normalize:
            # Before sending, so that the gradient is projected where it belongs.
            self.a, self.b = unit_rows(wide(self.a)), unit_rows(wide(self.b))
        return agreement

    def columns(self, counts: list[int], both: bool) -> list[torch.Tensor]:
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

    def positives(self, ids: tuple[torch.Tensor, torch.Tensor] | None, counts: list[int]) -> dict[str, Any]:
        """Which of everybody's columns are positive."""
        if ids is not None:
            return {"groups": (ids[0], gather_rows(ids[1], counts, self.group))}
        first = sum(counts[: dist.get_rank(self.group)])
        return {"targets": torch.arange(first, first + self.a.shape[0], device=self.a.device)}


def _check(a: torch.Tensor, b: torch.Tensor, strategy: str) -> tuple[torch.Tensor, torch.Tensor]:
    checks.choice("strategy", strategy, STRATEGIES)
    a = checks.features("a", a)
    b = checks.features("b", b, a)
    if a.shape[0] != b.shape[0]:
        raise ValueError(f"b must have as many rows as a on each rank ({a.shape[0]}); got {b.shape[0]}")
    return a, b
