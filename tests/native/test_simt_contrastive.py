"""The CUDA contrastive kernels, executed under the SIMT runner: statistics and slopes against float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import cases
import numpy as np
import pytest
import torch
from simt.build import Simt
from simt.launches import on_simt

from fastxattn.ops.contrastive import api, kernels_cuda, windows
from fastxattn.ops.contrastive.operator import OPERATORS
from fastxattn.runtime import cuda as runtime_cuda
from fastxattn.testing.budget import assert_within_budget
from tests.loss_calls import infonce
from tests.test_contrastive import compare, features, options_of

N, M = 70, 139


@dataclass
class Problem:
    """Arguments of the kernels, and who is whose positive and negative."""

    arguments: dict[str, Any]
    logits: torch.Tensor  # (N, M) float64
    factor: torch.Tensor  # d logit / d product
    positive: torch.Tensor
    negative: torch.Tensor
    exact: bool


def problem(dtype: str, d: int, options: set[str], seed: int = 0) -> Problem:
    rng = np.random.default_rng(seed)
    x, y = (cases.as_dtype(rng.standard_normal((n, d)) / d**0.5, dtype) for n in (N, M))
    given: dict[str, Any] = {"x": x, "y": y, "scale": np.array([14.3], np.float32), "aligned": int(d % 8 == 0)}
    wide = [torch.from_numpy(cases.from_bits(t, dtype).astype(np.float64)) for t in (x, y)]
    factor = torch.full((N, M), 14.300000190734863, dtype=torch.float64)
    groups = "groups" in options
    id_x = rng.integers(-1, 9, N).astype(np.int32) if groups else np.arange(N, dtype=np.int32)
    id_y = np.where((i := rng.integers(-1, 9, M).astype(np.int32)) < 0, -3, i) if groups else np.arange(M)
    given["id_x"], given["id_y"] = id_x, id_y.astype(np.int32)
    live = torch.ones(N, M, dtype=torch.bool)
    if "norm" in options:
        given["norm_x"], given["norm_y"] = (rng.random(n).astype(np.float32) + 0.5 for n in (N, M))
        factor = factor * torch.from_numpy(given["norm_x"]).double()[:, None] * torch.from_numpy(given["norm_y"])
    logits = factor * (wide[0] @ wide[1].T)
    if "bias" in options:
        given["bias"] = np.array([-3.0], np.float32)
        logits = logits - 3
    if "exclude_self" in options:
        given["exclude_self"] = 1
        live &= ~torch.eye(N, M, dtype=torch.bool)
    positive = live & (torch.from_numpy(given["id_x"])[:, None] == torch.from_numpy(given["id_y"]))
    negative = live & ~positive
    if "skip" in options:
        given["skip_x"], given["skip_y"] = (rng.integers(0, 6, n).astype(np.int32) for n in (N, M))
        negative &= torch.from_numpy(given["skip_x"])[:, None] != torch.from_numpy(given["skip_y"])
    exact = not groups
    if exact:
        given["exact"] = logits.diagonal().float().numpy().copy()
    return Problem(given, logits, factor, positive, negative, exact)


def direction(p: Problem, logits: torch.Tensor, limit: torch.Tensor | None) -> torch.Tensor:
    """(4, rows) lse_neg, mean_neg, mean_pos, excess_pos of each row, differentiable."""
    positive, negative = p.positive, p.negative
    if limit is not None:
        negative = negative & (logits.detach() <= limit[:, None])
    lse = torch.where(negative, logits, -torch.inf).logsumexp(1)
    number, number_pos = negative.sum(1), positive.sum(1)
    mean = torch.where(negative, logits, 0).sum(1) / number.clamp(min=1)
    mean_pos = torch.where(positive, logits, 0).sum(1) / number_pos.clamp(min=1)
    some = torch.where((number_pos > 0)[:, None], torch.where(positive, logits, -torch.inf), 0.0)
    excess = torch.where(number_pos > 1, some.logsumexp(1) - mean_pos, 0.0)
    return torch.stack([lse, mean, mean_pos, excess])


OPTIONS = [set(), {"norm", "bias", "limit"}, {"groups", "skip", "exclude_self"}]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(sorted(o)) or "plain")
def test_statistics(simt: Simt, dtype: str, options: set[str]) -> None:
    p = problem(dtype, 40 if options else 13, options)
    limit = torch.full((N,), 5.0) if "limit" in options else None
    rank = p.arguments.get("exact")
    splits = 2 if options else 1
    state = np.empty((splits, 9, N), np.float32)
    counts = getattr(simt, f"contrastive_stats_{dtype}")(
        **p.arguments,
        state=state,
        splits=splits,
        means=1,
        rank=rank,
        order=1,
        limit_x=None if limit is None else limit.numpy(),
    )
    s = torch.from_numpy(state).double()
    expected = direction(p, p.logits, limit)
    top = s[:, 0].amax(0)
    lse = top + (s[:, 1] * (s[:, 0] - top).exp()).sum(0).log()
    torch.testing.assert_close(lse, expected[0], rtol=1e-6, atol=2e-6)
    negative = p.negative if limit is None else p.negative & (p.logits <= limit[:, None])
    assert torch.equal(s[:, 3].sum(0), negative.sum(1).double())
    torch.testing.assert_close(s[:, 2].sum(0), torch.where(negative, p.logits, 0).sum(1), rtol=1e-6, atol=1e-4)
    assert torch.equal(s[:, 8].sum(0), p.positive.sum(1).double())
    torch.testing.assert_close(s[:, 7].sum(0), torch.where(p.positive, p.logits, 0).sum(1), rtol=1e-6, atol=1e-5)
    if rank is not None:
        ahead = (negative & (p.logits >= torch.from_numpy(rank).double()[:, None])).sum(1)
        assert torch.equal(s[:, 4].sum(0), ahead.double())
    if p.arguments["aligned"]:
        for kind in ("ldmatrix", "cp_async", "load"):
            assert counts[kind][0] == counts[kind][1], f"bank conflicts in {kind}"


def slopes(p: Problem, logits: torch.Tensor, limit: torch.Tensor | None, grad: torch.Tensor) -> np.ndarray:
    stats = direction(p, logits, limit)
    negative = p.negative if limit is None else p.negative & (logits <= limit[:, None])
    number = p.positive.sum(1).clamp(min=1)
    planes = [
        stats[0],
        grad[0],
        grad[1] / negative.sum(1).clamp(min=1),
        stats[2] + stats[3],
        1 / number,
        grad[2],
        grad[3],
    ]
    return torch.stack(planes).float().numpy()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(sorted(o)) or "plain")
def test_slopes(simt: Simt, dtype: str, options: set[str]) -> None:
    """Of both directions at once, over a window that starts inside the matrix, against torch's float64 gradients."""
    p = problem(dtype, 24, options)
    limit_x = torch.full((N,), 5.0) if "limit" in options else None
    limit_y = torch.full((M,), 4.0) if "limit" in options else None
    logits = p.logits.clone().requires_grad_()
    turned = Problem(p.arguments, p.logits.T, p.factor.T, p.positive.T, p.negative.T, p.exact)
    g = torch.Generator().manual_seed(1)
    grad_x, grad_y = (torch.randn(4, n, generator=g, dtype=torch.float64) for n in (N, M))
    grad_x[3, p.positive.sum(1) < 2] = grad_y[3, p.positive.sum(0) < 2] = 0
    total = (direction(p, logits, limit_x) * grad_x).nan_to_num(0, 0, 0).sum()
    total = total + (direction(turned, logits.T, limit_y) * grad_y).nan_to_num(0, 0, 0).sum()
    (slope,) = torch.autograd.grad(total, logits)
    expected = (slope * p.factor).numpy()
    first = 64
    dz = np.full((N, 80), -7.0, np.float32)
    dot = np.full((1, 2, 80), -7.0, np.float32)
    getattr(simt, f"contrastive_slopes_{dtype}")(
        **p.arguments,
        slopes_x=slopes(p, p.logits, limit_x, grad_x),
        slopes_y=slopes(turned, p.logits.T, limit_y, grad_y),
        limit_x=None if limit_x is None else limit_x.numpy(),
        limit_y=None if limit_y is None else limit_y.numpy(),
        first_y=first,
        dz=dz,
        sums=dot,
    )
    window = expected[:, first:]
    np.testing.assert_allclose(dz[:, : M - first], window, rtol=3e-5, atol=3e-6 * np.abs(window).max())
    scale = float(p.arguments["scale"][0])
    bias = float(p.arguments.get("bias", [0.0])[0])
    terms = (slope * (p.logits - bias) / scale).numpy()[:, first:].sum(1)
    np.testing.assert_allclose(dot[0, :, :N].sum(0), terms, rtol=1e-4, atol=1e-4 * np.abs(terms).max())


def sigmoid_terms(p: Problem, product: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's loss over the columns from ``first`` on, and the slope of each logit, in the product's dtype."""
    logits = (product * p.factor.to(product.dtype) + float(p.arguments.get("bias", [0.0])[0])).requires_grad_()
    if p.exact:
        precise = torch.from_numpy(p.arguments["exact"]).to(product.dtype)[:, None]
        exact = logits + torch.where(p.positive, precise - logits.detach(), 0)
    signed = torch.where(p.positive, -(exact if p.exact else logits), logits)
    loss = torch.where(p.positive | p.negative, torch.nn.functional.softplus(signed, threshold=60.0), 0)[:, first:]
    weight = torch.from_numpy(p.arguments["weight"]).to(product.dtype) if "weight" in p.arguments else 1
    (slope,) = torch.autograd.grad((loss.sum(1) * weight).sum(), logits)
    return loss.sum(1).detach(), slope[:, first:]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "options", [*OPTIONS, {"groups", "norm", "weight"}], ids=lambda o: "+".join(sorted(o)) or "plain"
)
def test_sigmoid(simt: Simt, dtype: str, options: set[str]) -> None:
    """Losses, slopes and their sums over a window inside the matrix; the yardstick is plain PyTorch in that dtype."""
    p = problem(dtype, 40 if options else 13, options - {"limit"})
    if "weight" in options:
        p.arguments["weight"] = np.linspace(-1, 2, N, dtype=np.float32)
    first = 64
    dz, sums = np.full((N, 80), -7.0, np.float32), np.full((3, 2, 80), -7.0, np.float32)
    counts = getattr(simt, f"sigmoid_{dtype}")(**p.arguments, first_y=first, dz=dz, sums=sums, order=1)
    x, y = (torch.from_numpy(cases.from_bits(p.arguments[k], dtype).copy()) for k in "xy")
    results = []
    for wide in (True, False):
        product = x.double() @ y.double().T if wide else (x @ y.T).to(getattr(torch, dtype)).float()
        loss, slope = sigmoid_terms(p, product, first)
        cosine = (product * (p.factor / float(p.arguments["scale"][0])).to(product.dtype))[:, first:]
        results.append((loss, slope * p.factor[:, first:].to(slope.dtype), (slope * cosine).sum(1), slope.sum(1)))
    found = (*sums[:, :, :N].sum(1), dz[:, : M - first])
    for name, place in (("loss", 0), ("dz", 1), ("dot", 2), ("row_dz", 3)):
        actual = torch.from_numpy(found[(0, 3, 1, 2)[place]].copy())
        assert_within_budget(name, actual, results[0][place], results[1][place], backward=place > 0)
        error = (actual.double() - results[0][place]).norm() / results[0][place].norm()
        assert error < 2e-6 if dtype == "float32" else error < 1e-5, f"{name}: {error:.2g}"  # sums cut by tensor cores
    assert (dz[:, M - first :] == -7).all() and (sums[:, :, N:] == -7).all(), "written beyond the window"
    forward = np.empty((3, 2, 80), np.float32)
    getattr(simt, f"sigmoid_{dtype}")(**p.arguments, first_y=first, sums=forward)
    np.testing.assert_array_equal(forward[:, :, :N], sums[:, :, :N])
    if p.arguments["aligned"]:
        for kind in ("ldmatrix", "cp_async", "load"):
            assert counts[kind][0] == counts[kind][1], f"bank conflicts in {kind}"


def test_sigmoid_at_its_ends(simt: Simt) -> None:
    """Margins from far below to far above, and a NaN, which stays in its row and column."""
    margins = np.array([-200, -104, -88, -30, -1e-3, 0, 1e-3, 30, 88, 104, 200, np.nan], np.float32)
    ones = np.ones((1, 1), np.float32)
    sums, dz = np.empty((3, 1, 1), np.float32), np.empty((1, 12), np.float32)
    ids = np.full(1, -1, np.int32), np.zeros(12, np.int32)
    simt.sigmoid_float32(
        x=ones, y=margins[:, None], scale=ones[0], id_x=ids[0], id_y=ids[1], aligned=0, dz=dz, sums=sums
    )
    assert np.isnan(sums).all()
    z = torch.from_numpy(margins[:-1]).double()
    np.testing.assert_allclose(dz[0, :-1], z.sigmoid(), rtol=5e-7, atol=1e-38)
    assert np.isnan(dz[0, -1])
    for i, expected in enumerate(torch.nn.functional.softplus(z, threshold=300)):
        simt.sigmoid_float32(
            x=ones, y=margins[i : i + 1, None], scale=ones[0], id_x=ids[0], id_y=ids[1][:1], aligned=0, sums=sums
        )
        np.testing.assert_allclose(sums[0, 0, 0], expected, rtol=5e-7, atol=1e-38)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("normalize", [False, True])
def test_ranks_see_exact_ties(simt: Simt, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, normalize: bool) -> None:
    """A double of the positive counts as ahead of it, in both directions; so say float64 logits."""
    a, b = features(70, 70, 40, dtype, fit=0.4)
    b[7], b[65], a[66] = b[3], b[3], a[3]
    options: dict[str, Any] = {"return_metrics": True, "normalize": normalize}
    with cuda_backend(simt, monkeypatch):
        _, metrics = api.infonce_loss(a, b, 20.0, backend="cuda", **options)
        compare(api.infonce_loss, a, b, 12.0, backend="cuda", false_negative_margin=0.02, normalize=normalize)
    x, y = (torch.nn.functional.normalize(t.double(), dim=1) if normalize else t.double() for t in (a, b))
    logits = (x[:, None] * y).sum(2)  # alike for like rows, as a blocked product need not be
    for got, z in zip(metrics, (logits, logits.T), strict=True):
        assert torch.equal(got.rank, (z >= z.diagonal()[:, None]).sum(1))
    assert metrics[0].rank[3] >= 3 and metrics[1].rank[3] >= 2


def test_sides_exchanged(simt: Simt) -> None:
    """The other direction: precise logits belong to the columns then."""
    p = problem("float32", 24, set())
    exact = p.arguments["exact"] + 100  # seen in the result only where it is used
    state = np.empty((1, 9, M), np.float32)
    sides = {name[:-1] + {"x": "y", "y": "x"}[name[-1]]: v for name, v in p.arguments.items() if name[-1] in "xy"}
    simt.contrastive_stats_float32(
        **sides, scale=p.arguments["scale"], exact=exact, exact_by_row=0, aligned=1, state=state
    )
    np.testing.assert_array_equal(state[0, 7, :N], exact)
    lse = torch.where(p.negative, p.logits, -torch.inf).logsumexp(0)
    np.testing.assert_allclose(state[0, 0] + np.log(state[0, 1]), lse, rtol=1e-6, atol=2e-6)


@contextmanager
def cuda_backend(simt: Simt, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The public functions take ``backend="cuda"`` for CPU tensors; the launches go to the runner."""
    monkeypatch.setattr(runtime_cuda, "unavailable", lambda device: None)
    with on_simt(simt, monkeypatch, *(("", getattr(kernels_cuda, name)) for name in OPERATORS)):
        yield


@pytest.mark.parametrize(
    "options", [{}, {"normalize": True, "symmetric": False}, {"groups": True}, {"smooth": 0.1}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_infonce_through_the_public_function(simt: Simt, monkeypatch: Any, options: dict, dtype: torch.dtype) -> None:
    """Host code and kernels together: loss and every gradient against the float64 reference."""
    g = torch.Generator().manual_seed(3)
    a, b = (torch.nn.functional.normalize(torch.randn(n, 40, generator=g), dim=1) for n in (90, 90))
    b = torch.nn.functional.normalize(b + 2 * a, dim=1)
    keywords: dict[str, Any] = {k: v for k, v in options.items() if k in ("normalize", "symmetric")}
    if options.get("groups"):
        keywords["groups"] = torch.randint(-1, 20, (90,), generator=g)
    if options.get("smooth"):
        keywords["label_smoothing"] = 0.1
    results = []
    for backend, wide in (("cuda", False), ("reference", True)):
        leaves = [t.to(dtype).double() if wide else t.to(dtype) for t in (a, b)] + [
            torch.tensor(14.3, dtype=torch.float64 if wide else torch.float32)
        ]
        leaves = [t.requires_grad_() for t in leaves]
        with cuda_backend(simt, monkeypatch):
            loss = infonce(*leaves, **keywords, backend=backend)
            results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    tolerance = 1e-5 if dtype == torch.float32 else 5e-3  # gradients are rounded to bfloat16
    for found, expected in zip(*results, strict=True):
        error = (found.double() - expected).norm() / expected.norm()
        assert error < tolerance, float(error)


@pytest.mark.parametrize("name", [*options_of(1, 1, 1)[0], "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sigmoid_through_the_public_function(
    simt: Simt, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, name: str
) -> None:
    """Every option of the loss: value and every gradient against the float64 reference."""
    if dtype == torch.float16 and name not in ("plain", "normalize"):
        return  # the same code as bfloat16's up to here
    a, b = features(66, 70, 24, dtype, fit=0.3)
    options = options_of(66, 70, 24)[0].get(name, {})
    with cuda_backend(simt, monkeypatch):
        compare(api.sigmoid_loss, a * 3 if name == "normalize" else a, b, 12.0, bias=-5.0, backend="cuda", **options)


@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 1), (1, 65, 3), (0, 5, 8), (5, 0, 8)])
def test_sigmoid_of_few(simt: Simt, monkeypatch: pytest.MonkeyPatch, n: int, m: int, d: int) -> None:
    a, b = features(n, m, d)
    with cuda_backend(simt, monkeypatch):
        compare(api.sigmoid_loss, a, b, 10.0, bias=-1.0, backend="cuda")


def test_sigmoid_by_windows(simt: Simt, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several windows; bits repeat, and a second backward of a kept graph gives them again."""
    monkeypatch.setattr(windows, "WINDOW", 64)
    a, b = (t.requires_grad_() for t in features(70, 130, 16, torch.float32, 0.4))
    with cuda_backend(simt, monkeypatch):
        compare(api.sigmoid_loss, a * 2, b, 10.0, bias=-2.0, backend="cuda", normalize=True)
        loss = api.sigmoid_loss(a, b, 10.0, -2.0, backend="cuda")
        first, again = (torch.autograd.grad(loss, (a, b), retain_graph=True) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
