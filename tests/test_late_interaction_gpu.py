"""The GPU kernels of late interaction against the float64 reference: Triton's in its interpreter too."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from fastxattn.ops import late_interaction
from tests.device import BACKENDS, PRESENT, RUNS, WHY_NOT, there
from tests.test_late_interaction import compare, interleave, run, sets

pytestmark = pytest.mark.skipif(not RUNS, reason=WHY_NOT)
late_interaction_loss, maxsim = there(late_interaction.late_interaction_loss), there(late_interaction.maxsim)
SMOOTH = (None, 0.2)


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.mark.parametrize("smooth", SMOOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ragged_sets(backend, dtype, smooth):
    arguments = interleave(sets([3, 0, 17, 40, 1], 40, dtype), sets([19, 33, 1, 0], 40, dtype, 1))
    compare(*arguments, direction="both", backend=backend, smooth=smooth)


@pytest.mark.parametrize("direction", ["a", "b"])
@pytest.mark.parametrize("smooth", SMOOTH)
def test_one_direction_and_the_mean(backend, direction, smooth):
    arguments = interleave(sets([5, 30, 2], 24), sets([9, 1, 40, 7], 24, seed=1))
    compare(*arguments, direction=direction, reduction="mean", smooth=smooth, backend=backend)


@pytest.mark.parametrize(
    ("lengths_a", "lengths_b"), [([200, 3], [150, 2]), ([1] * 20, [1] * 3), ([2], [1] * 30), ([0], [0]), ([], [3])]
)
def test_sets_longer_and_shorter_than_a_block(backend, lengths_a, lengths_b):
    for smooth in SMOOTH:
        arguments = interleave(sets(lengths_a, 16), sets(lengths_b, 16, seed=1))
        compare(*arguments, direction="both", backend=backend, smooth=smooth)


@pytest.mark.parametrize("d", [1, 3, 80, 200])
def test_feature_sizes(backend, d):
    compare(*interleave(sets([5, 9], d), sets([9, 4], d, seed=1)), direction="both", backend=backend)


def test_the_first_of_equal_matches_takes_the_gradient(backend):
    a, b = torch.ones(2, 4, requires_grad=True), torch.ones(6, 4, requires_grad=True)
    cu_a, cu_b = (torch.tensor([0, n], dtype=torch.int32) for n in (2, 6))
    maxsim(a, b, cu_a, cu_b, backend=backend).sum().backward()
    assert b.grad.sum(1).tolist() == [8.0, 0, 0, 0, 0, 0]


def test_nan_reaches_only_who_sees_it(backend):
    a, b, cu_a, cu_b = interleave(sets([5, 30], 24), sets([9, 40], 24, seed=1))
    b[3], b[-1] = float("nan"), float("nan")  # the last row is past the offsets
    x = a.clone().requires_grad_()
    scores = maxsim(x, b, cu_a, cu_b, backend=backend)
    assert scores[:, 0].isnan().all()
    assert scores[:, 1].isfinite().all()
    scores[:, 1].sum().backward()
    assert x.grad.isfinite().all()
    torch.testing.assert_close(scores[:, 1], maxsim(a, b, cu_a, cu_b, backend="reference")[:, 1])


@pytest.mark.parametrize("smooth", SMOOTH)
def test_loss_and_its_gradient(backend, smooth):
    arguments = interleave(sets([5, 30, 8], 24), sets([9, 40, 3], 24, seed=1))
    options = {"logit_scale": torch.tensor(8.0), "smooth": smooth}
    (expected,), grads_expected = run(late_interaction_loss, *arguments, "reference", **options)
    (actual,), grads = run(late_interaction_loss, *arguments, backend, **options)
    torch.testing.assert_close(actual.double(), expected, atol=1e-6, rtol=1e-6)
    for g, e in zip(grads, grads_expected, strict=True):
        torch.testing.assert_close(g.double(), e, atol=1e-6, rtol=1e-4)


def test_operators_keep_their_schemas(backend):
    device = "cuda" if PRESENT else "cpu"
    a, b, cu_a, cu_b = (t.to(device) for t in interleave(sets([5, 3], 8), sets([2, 4], 8, seed=1)))
    checked = ("test_schema", "test_faketensor")
    arguments = (a, b, cu_a, cu_b, True, True)
    for smooth in ((), (0.5,)):
        prefix = "smooth_maxsim" if smooth else "maxsim"
        forward, backward = (getattr(torch.ops.fastxattn, f"{prefix}{s}_{backend}") for s in ("", "_backward"))
        torch.library.opcheck(forward, (*arguments, *smooth), test_utils=checked)
        _, _, best_a, best_b = forward(*arguments, *smooth)
        for needs in (1, 3):
            given = (*torch.ones(2, 2, 2, device=device), best_a, best_b, *arguments, *smooth, needs)
            torch.library.opcheck(backward, given, test_utils=checked)
