"""Contrastive losses on the CPU kernels against the float64 reference: values, every gradient, every option."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fastxattn.ops.contrastive import infonce_loss, sigmoid_loss
from fastxattn.runtime import native
from tests.loss_calls import infonce

pytestmark = pytest.mark.skipif(native.cpu_library().library is None, reason="needs the CPU kernels")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 1e-3}


def features(n: int, m: int, d: int, dtype=torch.float32, fit: float = 0.0, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    a, b = (F.normalize(torch.randn(k, d, generator=generator), dim=1) for k in (n, m))
    if fit:
        k = min(n, m)
        b[:k] = F.normalize(fit * a[:k] + (1 - fit) * b[:k], dim=1)
    return a.to(dtype), b.to(dtype)


def relative(x: torch.Tensor, y: torch.Tensor) -> float:
    return ((x.double() - y).norm() / y.norm().clamp(min=1e-30)).item()


def run(loss, a, b, scale, backend, shared=False, bias=None, **options):
    exact = backend == "reference"
    x = a.detach().clone().to(torch.float64 if exact else a.dtype).requires_grad_()
    y = x if shared else b.detach().clone().to(x.dtype).requires_grad_()
    s = torch.tensor(scale, dtype=torch.float64 if exact else torch.float32, requires_grad=True)
    leaves = [x, s] if shared else [x, y, s]
    args = [x, y, s]
    if bias is not None:
        args.append(torch.tensor(bias, dtype=s.dtype, requires_grad=True))
        leaves.append(args[-1])
    for name in ("image_queue", "text_queue", "hard_negatives"):
        if name in options:
            options[name] = options[name].detach().clone().to(x.dtype).requires_grad_()
            leaves.append(options[name])
    value = loss(*args, backend=backend, **options)
    value = (value[0].sum() + 2 * value[1].sum()) if isinstance(value, tuple) else value.sum()
    return value, torch.autograd.grad(value, leaves, allow_unused=True)


def compare(loss, a, b, scale, tolerance=None, backend="cpu", **options):
    expected, grads_expected = run(loss, a, b, scale, "reference", **options)
    actual, grads = run(loss, a, b, scale, backend, **options)
    tolerance = tolerance or TOLERANCE[a.dtype]
    assert actual.dtype == torch.float32
    assert abs(actual.item() - expected.item()) <= 2e-6 * max(1.0, abs(expected.item()))
    for index, (g, e) in enumerate(zip(grads, grads_expected, strict=True)):
        assert g.shape == e.shape
        if e.dim() == 0:
            assert abs(g.item() - e.item()) <= 2e-5 * max(abs(e.item()), 1e-3), index
        else:
            # Rounding the exact gradient to bfloat16 alone costs 1.5e-3 on average; the gate is on what comes on top.
            allowed = math.hypot(tolerance, relative(e.to(g.dtype), e))
            assert relative(g, e) <= allowed or (g.double() - e).abs().max() < 1e-9, (index, relative(g, e))


@pytest.mark.parametrize("scale", [14.3, 100.0])
@pytest.mark.parametrize("fit", [0.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_infonce_gate(dtype, fit, scale):
    compare(infonce_loss, *features(700, 700, 192, dtype, fit), scale)


@pytest.mark.parametrize("scale", [14.3, 100.0])
@pytest.mark.parametrize("fit", [0.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sigmoid_gate(dtype, fit, scale):
    compare(sigmoid_loss, *features(700, 700, 192, dtype, fit), scale, bias=-10.0)


@pytest.mark.parametrize("isa", native.available_cpu_isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_instruction_set(isa, dtype):
    native.force_cpu_isa(isa)
    try:
        a, b = features(150, 130, 80, dtype, 0.5)
        compare(infonce_loss, a, b, 20.0)
        compare(sigmoid_loss, a, b, 20.0, bias=-10.0)
    finally:
        native.force_cpu_isa("auto")


@pytest.mark.parametrize("d", [1, 3, 63, 80, 384, 640, 1152, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_feature_sizes(d, dtype):
    a, b = features(33, 70, d, dtype)
    compare(infonce_loss, a, b, 10.0)
    compare(sigmoid_loss, a, b, 10.0, bias=-3.0)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 5), (5, 1), (2, 300), (300, 2), (65, 64)])
def test_shapes(n, m):
    a, b = features(n, m, 24)
    compare(infonce_loss, a, b, 10.0)
    compare(sigmoid_loss, a, b, 10.0, bias=-1.0)


def random_ids(n: int, high: int, seed: int) -> torch.Tensor:
    return torch.randint(-1, high, (n,), generator=torch.Generator().manual_seed(seed))


def options_of(n: int, m: int, d: int) -> tuple[dict, dict]:
    """Options of both losses, and of InfoNCE alone."""
    both = {
        "targets": {"targets": random_ids(n, m, 1)},
        "no positive at all": {"targets": torch.full((n,), -1)},
        "groups": {"groups": (random_ids(n, 20, 2), random_ids(m, 20, 3))},
        "all positives": {"groups": (torch.zeros(n, dtype=torch.long), torch.zeros(m, dtype=torch.long))},
        "large ids": {"groups": (random_ids(n, 9, 2) * 2**40, random_ids(m, 9, 3) * 2**40)},
        "ignore": {"ignore_ids": (random_ids(n, 9, 4), random_ids(m, 9, 5))},
        "none": {"reduction": "none"},
        "sum": {"reduction": "sum"},
        "normalize": {"normalize": True},
        "self": {"exclude_self": True, "targets": (torch.arange(n) + 1) % n},
    }
    infonce = {
        "hard": {"hard_negatives": torch.randn(n, 3, d, generator=torch.Generator().manual_seed(6))},
        "queues": {
            "image_queue": torch.randn(50, d, generator=torch.Generator().manual_seed(7)) / 7,
            "text_queue": torch.randn(90, d, generator=torch.Generator().manual_seed(8)) / 7,
        },
        "teacher": {"teacher": (*features(n, m, 16, seed=9), 8.0)},
        "margin": {"false_negative_margin": 0.02},
        "weights": {"weights": (torch.rand(n), torch.rand(m))},
        "smoothing": {"label_smoothing": 0.1},
        "decoupled": {"decoupled": True},
        "one direction": {"symmetric": False},
        "smoothed groups, queue, hard": {
            "groups": (random_ids(n, 20, 2), random_ids(m, 20, 3)),
            "label_smoothing": 0.2,
            "text_queue": torch.randn(20, d, generator=torch.Generator().manual_seed(8)),
            "hard_negatives": torch.randn(n, 2, d, generator=torch.Generator().manual_seed(6)),
            "normalize": True,
        },
    }
    return both, infonce


N, M, D = 140, 170, 48
OPTIONS, INFONCE_OPTIONS = options_of(N, M, D)


@pytest.mark.parametrize("name", [*OPTIONS, *INFONCE_OPTIONS])
def test_infonce_options(name):
    a, b = features(N, M, D, fit=0.3)
    options = {**OPTIONS, **INFONCE_OPTIONS}[name]
    compare(infonce, a * 3 if "normalize" in options else a, b, 12.0, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["hard", "queues", "smoothed groups, queue, hard"])
def test_parts_of_the_loss_add_up_before_they_are_rounded(name, dtype):
    a, b = features(N, M, D, dtype, fit=0.3)
    options = {k: v.to(dtype) if k.endswith(("queue", "negatives")) else v for k, v in INFONCE_OPTIONS[name].items()}
    compare(infonce, a, b, 12.0, **options)


def test_both_sides_of_one_tensor_add_up_before_they_are_rounded():
    a, _ = features(N, N, D, torch.bfloat16)
    compare(infonce, a, a, 10.0, shared=True, groups=random_ids(N, 30, 1), exclude_self=True)


@pytest.mark.parametrize("name", OPTIONS)
def test_sigmoid_options(name):
    a, b = features(N, M, D, fit=0.3)
    compare(sigmoid_loss, a * 3 if name == "normalize" else a, b, 12.0, bias=-5.0, **OPTIONS[name])


def test_sigmoid_weights():
    a, b = features(N, M, D)
    for reduction in ("mean", "none"):
        compare(sigmoid_loss, a, b, 12.0, bias=-5.0, weights=torch.rand(N), reduction=reduction)


def test_same_tensor_on_both_sides():
    a, _ = features(N, N, D)
    groups = random_ids(N, 30, 1)
    compare(infonce, a, a, 10.0, shared=True, groups=groups, exclude_self=True)
    compare(sigmoid_loss, a, a, 10.0, shared=True, bias=-4.0, groups=groups, exclude_self=True)


def test_matches_plain_torch():
    a, b = features(200, 200, 64)
    logits = 14.3 * a @ b.T
    labels = torch.arange(200)
    eager = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    torch.testing.assert_close(infonce_loss(a, b, 14.3), eager)
    signs = 2 * torch.eye(200) - 1
    torch.testing.assert_close(sigmoid_loss(a, b, 14.3, -10.0), -F.logsigmoid(signs * (logits - 10)).sum() / 200)


def test_metrics_and_tie_rule():
    a, b = features(150, 150, 32, fit=0.4)
    b[7] = b[3]  # a tie counts as ahead
    loss, metrics = infonce_loss(a, b, 20.0, return_metrics=True)
    assert loss == infonce_loss(a, b, 20.0)
    logits = (20.0 * a.double() @ b.double().T).float()
    at = logits.diagonal()
    for got, z in zip(metrics, (logits, logits.T), strict=True):
        expected = (z >= at[:, None] - 1e-6).sum(1)
        assert torch.equal(got.rank, expected)
        assert got.top1 == (expected == 1).float().mean()
        assert got.recall(5) == (expected <= 5).float().mean()
        assert got.median_rank == expected.median()
        torch.testing.assert_close(got.mean_positive, at.mean(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got.mean_negative, ((z.sum(1) - at) / 149).mean(), atol=1e-5, rtol=1e-4)
    assert metrics[0].rank[3] == 2  # nothing but its double is ahead


def test_converged_batch_keeps_its_gradient():
    # Negatives weigh about 1e-9 beside the positive: lse - positive would round to exactly zero.
    a = torch.eye(64)
    expected, (expected_grad, *_) = run(infonce_loss, a, a.clone(), 25.0, "reference")
    value, (grad, *_) = run(infonce_loss, a, a.clone(), 25.0, "cpu")
    assert 0 < value.item() < 1e-8
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)
    assert relative(grad, expected_grad) < 1e-5


def test_extreme_logits_and_half_precision():
    a, b = features(300, 300, 64, torch.float16, 0.9)
    for x, y in ((a, b), (a, -b)):
        compare(infonce_loss, x, y, 100.0)
        grads = run(infonce_loss, x, y, 100.0, "cpu")[1]
        assert all(g.isfinite().all() for g in grads)


def test_large_grad_output_as_from_a_grad_scaler():
    a, b = features(64, 64, 32, torch.float16)
    x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
    (65536.0 * infonce_loss(x, y, 14.3)).backward()
    once = run(infonce_loss, a, b, 14.3, "reference")[1]
    assert relative(x.grad.double() / 65536, once[0]) < 1e-3
    for factor in (0.0, float("inf")):
        x.grad = None
        (sigmoid_loss(x, y, 14.3, -10.0) * factor).backward()
        assert (x.grad == 0).all() if factor == 0 else (~x.grad.isfinite()).any()


def test_nan_stays_in_its_row_of_one_direction():
    a, b = features(100, 100, 32)
    a[5] = float("nan")
    rows = infonce_loss(a, b, 10.0, symmetric=False, reduction="none")
    assert rows.isnan().nonzero().flatten().tolist() == [5]
    assert sigmoid_loss(a, b, 10.0, reduction="none").isnan().nonzero().flatten().tolist() == [5]


def test_zero_vectors_through_normalize():
    a, b = features(60, 60, 32)
    a[3], b[9] = 0, 0
    x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
    infonce_loss(x, y, 10.0, normalize=True).backward()
    assert (x.grad[3] == 0).all()
    assert (y.grad[9] == 0).all()
    assert x.grad.isfinite().all()
    compare(infonce_loss, a, b, 10.0, normalize=True)


def test_frozen_sides_and_scale_forms():
    a, b = features(80, 80, 32)
    x = a.clone().requires_grad_()
    full = run(infonce_loss, a, b, 10.0, "cpu")[1]
    infonce_loss(x, b, torch.tensor([[10.0]])).backward()
    assert torch.equal(x.grad, full[0])
    y = b.clone().requires_grad_()
    infonce_loss(a, y, torch.tensor(10)).backward()
    assert torch.equal(y.grad, full[1])
    s = torch.tensor([10.0], requires_grad=True)
    infonce_loss(a, b, s).backward()
    assert s.grad.shape == (1,)
    torch.testing.assert_close(s.grad[0], full[2])


def test_repeatable_for_any_number_of_threads():
    a, b = features(1000, 900, 64, torch.bfloat16)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(
                [run(f, a, b, 20.0, "cpu", **o) for f, o in ((infonce_loss, {}), (sigmoid_loss, {"bias": -5.0}))]
            )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for (v, g), (w, h) in zip(results[0], other, strict=True):
            assert torch.equal(v, w)
            assert all(torch.equal(p, q) for p, q in zip(g, h, strict=True))


def test_strided_features_retained_graph_and_autocast():
    a, b = features(90, 90, 40)
    wide = torch.zeros(90, 64)
    wide[:, :40] = a
    assert torch.equal(infonce_loss(wide[:, :40], b, 9.0), infonce_loss(a, b, 9.0))
    assert torch.equal(infonce_loss(a.T.contiguous().T, b, 9.0), infonce_loss(a, b, 9.0))
    x = a.clone().requires_grad_()
    loss = sigmoid_loss(x, b, 9.0)
    first = torch.autograd.grad(loss, x, retain_graph=True)[0].clone()
    assert torch.equal(first, torch.autograd.grad(loss, x)[0])
    with torch.autocast("cpu", torch.bfloat16):
        mixed = infonce_loss(x, b.bfloat16(), 9.0)
    assert torch.equal(mixed, infonce_loss(a.bfloat16(), b.bfloat16(), 9.0))


def test_compiles_without_graph_breaks():
    a, b = features(64, 64, 32)
    x = a.clone().requires_grad_()
    s = torch.tensor(9.0, requires_grad=True)

    def both(x, y, s):
        return infonce_loss(x, y, s, label_smoothing=0.1) + sigmoid_loss(x, y, s, -3.0)

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    expected, actual = both(x, b, s), compiled(x, b, s)
    torch.testing.assert_close(actual, expected)
    for g, e in zip(torch.autograd.grad(actual, (x, s)), torch.autograd.grad(expected, (x, s)), strict=True):
        torch.testing.assert_close(g, e)


def test_operators_keep_their_schemas_and_export():
    a, b = features(9, 7, 5)
    scale, none = torch.tensor(3.0), (None,) * 4
    ids = torch.arange(9, dtype=torch.int32), torch.arange(7, dtype=torch.int32)
    problem = (a, b, scale, None, None, None, *ids, None, None, None, False)
    ops = torch.ops.fastxattn
    row, col = ops.contrastive_stats_cpu(*problem, *none, True, True, True)
    torch.library.opcheck(ops.contrastive_stats_cpu, (*problem, *none, True, True, True))
    torch.library.opcheck(ops.positive_logits_cpu, (*problem[:6], ids[0].clamp(max=6), *problem[7:], True))
    for needs in (1, 2, 7):
        grads = (torch.ones(4, 9), torch.ones(4, 7), row, col)
        torch.library.opcheck(ops.contrastive_backward_cpu, (*grads, *problem, None, None, True, True, needs))
        torch.library.opcheck(ops.sigmoid_cpu, (*problem, None, needs))

    class Loss(torch.nn.Module):
        def forward(self, x, y):
            return infonce_loss(x, y, 9.0) + sigmoid_loss(x, y, 9.0, -3.0)

    program = torch.export.export(Loss(), (a, b[:7]))
    torch.testing.assert_close(program.module()(a, b), Loss()(a, b))


def test_float16_under_a_grad_scaler():
    a, b = features(64, 64, 32, torch.float16, 0.5)
    x = torch.nn.Parameter(a.clone())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    for loss in (infonce_loss(x, b, 14.3), sigmoid_loss(x, b, 14.3, -10.0)):
        x.grad = None
        scaler.scale(loss).backward()
        assert x.grad.isfinite().all()
        assert (x.grad != 0).float().mean() > 0.99  # without the scale, float16 would flush many to zero


def test_empty_batch():
    a = torch.zeros(0, 16, requires_grad=True)
    b = torch.randn(5, 16, requires_grad=True)
    for loss in (infonce_loss(a, b, 5.0), sigmoid_loss(a, b, 5.0)):
        assert loss == 0
        assert all((g == 0).all() for g in torch.autograd.grad(loss, (a, b)))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"text_features": torch.zeros(4, 9)}, ValueError, "text_features must have 8 features"),
        ({"text_features": torch.zeros(4, 8).half()}, TypeError, "text_features must have dtype torch.float32"),
        ({"image_features": torch.zeros(4, 8, 1)}, ValueError, "image_features must have shape"),
        ({"logit_scale": torch.zeros(2)}, ValueError, "logit_scale must have one element"),
        ({"targets": torch.tensor([0, 1, 2, 4])}, ValueError, "targets must lie in"),
        ({"targets": torch.zeros(4)}, TypeError, "targets must be an int32"),
        ({"groups": torch.zeros(3, dtype=torch.long)}, ValueError, r"groups must have shape \(4,\)"),
        ({"label_smoothing": 1.0}, ValueError, "label_smoothing must lie in"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of"),
        ({"backend": "gpu"}, ValueError, "backend must be auto or one of"),
        ({"hard_negatives": torch.zeros(4, 8)}, ValueError, "hard_negatives must have shape"),
        ({"image_queue": torch.zeros(4, 8), "symmetric": False}, ValueError, "image_queue must be None"),
        ({"weights": torch.zeros(3)}, ValueError, "weights must be"),
    ],
)
def test_bad_input(change, error, words):
    sides = {"image_features": torch.zeros(4, 8), "text_features": torch.zeros(4, 8)}
    arguments = {**sides, "logit_scale": 1.0, **change}
    with pytest.raises(error, match=words):
        infonce(**arguments)
