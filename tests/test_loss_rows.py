"""Which rows of a loss count, and how much: weights, several positives, excluded pairs, teachers, empty sides."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fastxattn import infonce_loss, late_interaction_loss, recall_at_k, sigmoid_loss
from fastxattn.nn import BLIP2ITCLoss, InfoNCELoss, MultiTaskLoss, SigmoidLoss
from tests.loss_calls import infonce
from tests.test_loss_rules import TEACHER, A, B, D, G, M, N, backend

__all__ = ["backend"]

WRONG_WEIGHTS = [
    (torch.ones(N, dtype=torch.int64), ValueError, "weights must be a floating-point tensor"),
    (torch.ones(N, dtype=torch.bool), ValueError, "weights must be a floating-point tensor"),
    (torch.full((N,), float("nan")), ValueError, "weights must be finite; got nan"),
    (torch.full((N,), float("inf")), ValueError, "weights must be finite; got inf"),
    ([1.0] * N, (TypeError, ValueError), "weights must be one tensor"),
    (torch.ones(N, 1), ValueError, "weights must be a floating-point tensor"),
]


@pytest.mark.parametrize("loss", [infonce_loss, sigmoid_loss])
def test_weights(backend, loss):
    for value, error, words in WRONG_WEIGHTS:
        with pytest.raises(error, match=words):
            loss(A, B, 1.0, weights=value)
    weights = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, 3.0])
    for dtype in (torch.float64, torch.bfloat16):
        expected, result = loss(A, B, 1.0, weights=weights), loss(A, B, 1.0, weights=weights.to(dtype))
        assert result.dtype == torch.float32
        assert torch.equal(result, expected)
    assert loss(A, B, 1.0, weights=torch.zeros(N)) == 0


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("loss", [infonce_loss, sigmoid_loss])
def test_weights_have_a_gradient(backend, loss, reduction):
    def gradient(dtype: torch.dtype, name: str) -> torch.Tensor:
        weights = torch.linspace(0.1, 1, N, dtype=dtype).requires_grad_()
        out = loss(A.to(dtype), B.to(dtype), 3.0, weights=weights, reduction=reduction, backend=name)
        total = sum(x.sum() for x in out) if isinstance(out, tuple) else out.sum()
        return torch.autograd.grad(total, weights)[0]

    found, exact = gradient(torch.float32, backend), gradient(torch.float64, "reference")
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)


def test_figures_of_several_positives_a_column(backend):
    targets = torch.arange(4).repeat_interleave(5)
    captions = torch.nn.functional.normalize(torch.randn(20, 16, generator=G), dim=1)
    images = torch.nn.functional.normalize(captions[::5] + 0.5 * torch.randn(4, 16, generator=G), dim=1)
    z = 10 * images @ captions.T
    own = targets[None] == torch.arange(4)[:, None]
    best = z.masked_fill(~own, -torch.inf).amax(1)
    rank = 1 + (~own & (z >= best[:, None])).sum(1)
    assert rank.max() > 1
    for sign in (1, -1):
        _, (_, columns) = infonce_loss(sign * captions, images, sign * 10.0, targets=targets, return_metrics=True)
        assert torch.equal(columns.rank, rank)
        torch.testing.assert_close(columns.mean_positive, z[own].mean())


def test_an_excluded_pair_is_no_positive(backend):
    targets = torch.tensor([0, 0, 3, 2])
    b = torch.nn.functional.normalize(A[:4], dim=1)
    rest = targets.where(targets != torch.arange(4), -1)
    options: dict[str, Any] = {"exclude_self": True, "return_metrics": True, "false_negative_margin": 0.1}
    loss, found = infonce_loss(b, b.flip(1), 10.0, targets=targets, **options)
    expected, figures = infonce_loss(b, b.flip(1), 10.0, targets=rest, **options)
    assert loss == expected
    for x, y in zip(found, figures, strict=True):
        assert torch.equal(x.rank, y.rank)
        assert torch.equal(x.mean_positive, y.mean_positive)


def test_a_positive_that_is_nan_comes_last(backend):
    a = A.clone()
    a[2] = float("nan")
    rows, columns = infonce_loss(a, B, 1.0, return_metrics=True)[1]
    assert (rows.rank[2], columns.rank[2]) == (M, N)
    assert rows.rank[0] == infonce_loss(A, B, 1.0, return_metrics=True)[1][0].rank[0]


@pytest.mark.parametrize(("n", "m"), [(0, 5), (5, 0), (0, 0)])
def test_sides_without_rows_cost_nothing(backend, n, m):
    a, b = (torch.randn(k, D, requires_grad=True) for k in (n, m))
    both: list[dict[str, Any]] = [
        {},
        {"targets": torch.full((n,), -1)},
        {"exclude_self": True},
        {"normalize": True},
        {"reduction": "sum"},
        {"groups": (torch.zeros(n, dtype=torch.long), torch.zeros(m, dtype=torch.long))},
        {"ignore_ids": (torch.zeros(n, dtype=torch.long), torch.zeros(m, dtype=torch.long))},
    ]
    single: list[dict[str, Any]] = [
        {"hard_negatives": torch.randn(n, 0, D)},
        {"image_queue": torch.randn(0, D), "text_queue": torch.randn(3, D)},
        {"teacher": (torch.randn(n, 3), torch.randn(m, 3), 2.0)},
        {"false_negative_margin": 0.1},
        {"label_smoothing": 0.1},
        {"decoupled": True},
        {"symmetric": False},
        {"return_metrics": True},
        {"weights": (torch.ones(n), torch.ones(m))},
    ]
    for loss, cases in ((infonce, both + single), (sigmoid_loss, both)):
        for options in cases:
            value = loss(a, b, 2.0, **options)
            if "return_metrics" in options:
                value, metrics = value
                assert all((x.rank.sum(), x.mean_positive, x.mean_negative, x.top1) == (0, 0, 0, 0) for x in metrics)
            assert value == 0, options
            found = torch.autograd.grad(value, (a, b), allow_unused=True)
            assert all(g is None or not g.any() for g in found)


def test_scores_without_sets_cost_nothing(backend):
    tokens, cu = torch.randn(0, D, requires_grad=True), torch.zeros(1, dtype=torch.int32)
    for value in (
        late_interaction_loss(tokens, tokens, cu, cu, 2.0),
        BLIP2ITCLoss()(torch.zeros(0, 3, D, requires_grad=True), tokens, 2.0),
        BLIP2ITCLoss()(torch.zeros(0, 0, D, requires_grad=True), tokens, torch.tensor(2.0)),
    ):
        assert value == 0
        value.backward()
    assert recall_at_k(tokens.detach(), tokens.detach(), (1,)) == {"a->b@1": 0.0, "b->a@1": 0.0}


def test_a_teacher_gets_no_gradient(backend):
    a, t, s = (x.clone().requires_grad_() for x in (A, TEACHER, torch.tensor(3.0)))
    loss = infonce(a, B, 5.0, teacher=(t, TEACHER.flip(0).double().float(), s))
    loss.backward()
    assert a.grad is not None
    assert t.grad is s.grad is None
    same = infonce(A, B, 5.0, teacher=(TEACHER.double(), TEACHER.flip(0).double(), 3.0))  # of another dtype
    torch.testing.assert_close(loss.detach(), same)


@pytest.mark.parametrize(
    "teacher", [(A, 3.0, 1.0), (A, B[:, :3], 1.0), (A[:3], B, 1.0), (A, B.half(), 1.0), (3.0, B, 1.0), (A, B, "1")]
)
def test_wrong_teachers_are_refused(teacher):
    with pytest.raises((TypeError, ValueError), match=r"^teacher"):
        infonce(A, B, 1.0, teacher=teacher)


def test_modules_take_what_open_clip_gives():
    bias = torch.tensor([3.0], requires_grad=True)
    for reduction in ("mean", "none"):
        out = InfoNCELoss(reduction=reduction)(A, B, torch.tensor(5.0), bias)
        (out if reduction == "mean" else out[0].sum()).backward()
        assert bias.grad == 0  # DDP expects a gradient of every parameter
    assert torch.equal(InfoNCELoss()(A, B, np.float64(5.0), bias), infonce_loss(A, B, 5.0))
    assert torch.equal(SigmoidLoss()(A, B, 5.0, None), sigmoid_loss(A, B, 5.0, 0.0))
    assert torch.equal(sigmoid_loss(A, B, 5.0, None), sigmoid_loss(A, B, 5.0))


def test_a_dropped_task_may_be_nan():
    loss = MultiTaskLoss({"x": 1.0, "y": 1.0}, {"x": ("image",), "y": ("audio",)}, modality_dropout=0.9)
    parts = {"x": torch.tensor(2.0, requires_grad=True), "y": torch.tensor(float("nan"), requires_grad=True)}
    dropped = 0
    for seed in range(60):
        gone = loss.dropped(torch.Generator().manual_seed(seed))
        total = loss(parts, torch.Generator().manual_seed(seed))
        if "audio" in gone:
            assert total == 2.0
            assert torch.autograd.grad(total, parts["y"])[0] == 0
            dropped += 1
    assert dropped > 10
    with pytest.raises(TypeError, match="modalities must map 'x' to a tuple of names"):
        MultiTaskLoss({"x": 1.0}, {"x": "image"})
