"""The GPU kernels of the contrastive losses against the float64 reference: Triton's in its interpreter too."""

from __future__ import annotations

import pytest
import torch

import fastxattn
from fastxattn.ops import contrastive
from tests.device import BACKENDS, PRESENT, RUNS, WHY_NOT, there
from tests.loss_calls import infonce
from tests.test_contrastive import compare, features, options_of, relative, run

pytest.importorskip("triton")
needs_kernels = pytest.mark.skipif(not RUNS, reason=WHY_NOT)
infonce_loss, sigmoid_loss = there(infonce), there(contrastive.sigmoid_loss)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
N, M, D = 37, 60, 24  # two tiles of float32 a side
OPTIONS, INFONCE_OPTIONS = options_of(N, M, D)


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@needs_kernels
@pytest.mark.parametrize("scale", [14.3, 100.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gate_on_fitted_pairs(backend, dtype, scale):
    n, d = (700, 192) if PRESENT else (150, 48)  # what the interpreter can afford
    for fit in (0.0, 0.7):
        a, b = features(n, n, d, dtype, fit)
        compare(infonce_loss, a, b, scale, backend=backend)
        compare(sigmoid_loss, a, b, scale, bias=-10.0, backend=backend)


def rounded(options: dict, dtype: torch.dtype) -> dict:
    """Further features as the kernels get them."""
    return {k: v.to(dtype) if k.endswith(("queue", "negatives")) else v for k, v in options.items()}


@needs_kernels
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, dtype) for name in (*OPTIONS, *INFONCE_OPTIONS) for dtype in DTYPES[:2]),
        *((name, torch.float16) for name in ("normalize", "queues", "groups")),  # its tiles are bfloat16's
    ],
)
def test_options(backend, name, dtype):
    a, b = features(N, M, D, dtype, fit=0.3)
    options = rounded({**OPTIONS, **INFONCE_OPTIONS}[name], dtype)
    a = a * 3 if "normalize" in options else a
    compare(infonce_loss, a, b, 12.0, backend=backend, **options)
    if name in OPTIONS:
        compare(sigmoid_loss, a, b, 12.0, bias=-5.0, backend=backend, **options)


@needs_kernels
@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 1), (1, 130, 3), (130, 1, 63), (65, 64, 80), (5, 9, 640)])
def test_shapes(backend, n, m, d):
    for dtype in DTYPES[:2]:
        a, b = features(n, m, d, dtype)
        compare(infonce_loss, a, b, 10.0, backend=backend)
        compare(sigmoid_loss, a, b, 10.0, bias=-1.0, backend=backend)


@needs_kernels
def test_windows_and_splits(backend, monkeypatch):
    from fastxattn.ops.contrastive import windows
    from fastxattn.ops.contrastive.triton import tiles

    monkeypatch.setattr(windows, "WINDOW", 128)
    monkeypatch.setattr(tiles, "PROGRAMS", 8)
    for dtype in DTYPES[:2]:
        a, b = features(150, 270, 16, dtype, 0.4)
        compare(infonce_loss, a * 2, b, 10.0, backend=backend, normalize=True)
        compare(sigmoid_loss, a * 2, b, 10.0, bias=-2.0, backend=backend, normalize=True)


@needs_kernels
def test_same_tensor_on_both_sides_and_frozen_sides(backend):
    a, b = features(N, N, D)
    groups = torch.arange(N) // 3
    compare(infonce_loss, a, a, 10.0, shared=True, groups=groups, exclude_self=True, backend=backend)
    x = a.clone().requires_grad_()
    full = run(infonce_loss, a, b, 10.0, backend)[1]
    infonce_loss(x, b, 10.0, backend=backend).backward()
    assert torch.equal(x.grad, full[0])
    scale = torch.tensor([[10.0]], requires_grad=True)
    infonce_loss(a, b, scale, backend=backend).backward()
    torch.testing.assert_close(scale.grad[0, 0], full[2])


@needs_kernels
def test_metrics_agree_with_the_reference_also_on_ties(backend):
    for dtype in DTYPES[:2]:
        a, b = features(110, 110, 32, dtype, fit=0.4)
        b[7], b[100] = b[3], b[3]
        for options in ({}, {"normalize": True}):
            _, metrics = infonce_loss(a, b, 20.0, return_metrics=True, backend=backend, **options)
            wanted = infonce_loss(a.double(), b.double(), 20.0, return_metrics=True, backend="reference", **options)[1]
            for got, want in zip(metrics, wanted, strict=True):
                assert torch.equal(got.rank.cpu(), want.rank)
                assert got.mean_positive.item() == pytest.approx(want.mean_positive.item(), rel=1e-5)
                assert got.mean_negative.item() == pytest.approx(want.mean_negative.item(), rel=1e-4, abs=1e-5)
            assert metrics[0].rank[3] >= 3  # its two doubles count as ahead


@needs_kernels
def test_converged_zero_nan_and_extreme(backend):
    identity = torch.eye(64)
    expected, grads_expected = run(infonce_loss, identity, identity.clone(), 25.0, "reference")
    value, grads = run(infonce_loss, identity, identity.clone(), 25.0, backend)
    assert 0 < value.item() < 1e-8
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)
    assert relative(grads[0], grads_expected[0]) < 1e-5

    a, b = features(60, 60, 32)
    a[3], b[9] = 0, 0
    compare(infonce_loss, a, b, 10.0, normalize=True, backend=backend)
    a[5] = float("nan")
    for loss, options in ((infonce_loss, {"symmetric": False}), (sigmoid_loss, {})):
        rows = loss(a, b, 10.0, reduction="none", backend=backend, **options)
        assert rows.isnan().nonzero().flatten().tolist() == [5]

    a, b = features(100, 100, 32, torch.float16, 0.9)
    for y in (b, -b):
        compare(infonce_loss, a, y, 100.0, backend=backend)


@needs_kernels
def test_grad_output_of_a_scaler_and_repeatability(backend):
    a, b = features(64, 64, 32, torch.float16)
    x = a.clone().requires_grad_()
    (65536.0 * infonce_loss(x, b, 14.3, backend=backend)).backward()
    assert relative(x.grad.double() / 65536, run(infonce_loss, a, b, 14.3, "reference")[1][0]) < 1e-3
    first, again = (run(infonce_loss, a, b, 14.3, backend) for _ in range(2))
    assert all(torch.equal(g, h) for g, h in zip(first[1], again[1], strict=True))
    empty = torch.zeros(0, 32, requires_grad=True)
    for loss in (infonce_loss(empty, b.float(), 5.0, backend=backend), sigmoid_loss(empty, b.float(), 5.0)):
        assert loss == 0
        assert torch.autograd.grad(loss, empty)[0].shape == (0, 32)


@needs_kernels
def test_operators_keep_their_schemas(backend):
    device = "cuda" if PRESENT else "cpu"
    a, b, scale, *ids = (
        t.to(device)
        for t in (*features(9, 7, 5), torch.tensor(3.0), *(torch.arange(n, dtype=torch.int32) for n in (9, 7)))
    )
    problem = (a, b, scale, None, None, None, *ids, None, None, None, False)
    none, checked = (None,) * 4, ("test_schema", "test_faketensor")
    positives, stats, backward, sigmoid = (
        getattr(torch.ops.fastxattn, f"{name}_{backend}")
        for name in ("positive_logits", "contrastive_stats", "contrastive_backward", "sigmoid")
    )
    torch.library.opcheck(positives, (*problem[:6], ids[0].clamp(max=6), *problem[7:], True), test_utils=checked)
    torch.library.opcheck(stats, (*problem, *none, True, False, True), test_utils=checked)
    found = stats(*problem, *none, True, True, True)
    grads = (torch.ones(4, 9, device=device), torch.ones(4, 7, device=device))
    for needs in (1, 2, 4, 7):
        arguments = (*grads, *found, *problem, None, None, True, True, needs)
        torch.library.opcheck(backward, arguments, test_utils=checked)
        torch.library.opcheck(sigmoid, (*problem, None, needs), test_utils=checked)


def test_refused_by_name_with_the_reason():
    a = torch.zeros(3, 4)
    if RUNS:
        with pytest.raises(RuntimeError, match="computes in float32"):
            infonce_loss(a.double(), a.double(), 1.0, backend="triton")
    else:
        with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1 is not set"):
            infonce_loss(a, a, 1.0, backend="triton")
    assert fastxattn.explain(contrastive.infonce_loss, a, a).chosen in ("cpu", "triton")
