"""Late interaction on the CPU kernels against the float64 reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastxattn.ops import late_interaction
from fastxattn.ops.late_interaction import late_interaction_loss
from fastxattn.runtime import native
from fastxattn.testing import offsets
from tests.device import there

maxsim = there(late_interaction.maxsim)
pytestmark = pytest.mark.skipif(native.cpu_library().library is None, reason="needs the CPU kernels")


def sets(lengths, d, dtype=torch.float32, seed=0, unused=2):
    generator = torch.Generator().manual_seed(seed)
    x = F.normalize(torch.randn(sum(lengths) + unused, d, generator=generator), dim=1).to(dtype)
    if unused:
        x[-unused:] = float("nan")  # past the last offset: never read
    return x, offsets(lengths)


def run(function, a, b, cu_a, cu_b, backend, **options):
    dtype = torch.float64 if backend == "reference" else a.dtype
    x, y = (t.detach().to(dtype).clone().requires_grad_() for t in (a, b))
    result = function(x, y, cu_a, cu_b, backend=backend, **options)
    results = list(result) if isinstance(result, tuple) else [result]
    value = sum((r * torch.linspace(-1, 1, r.numel()).reshape(r.shape).to(r.dtype)).sum() for r in results)
    return results, torch.autograd.grad(value, (x, y))


def compare(a, b, cu_a, cu_b, backend="cpu", **options):
    expected, grads_expected = run(maxsim, a, b, cu_a, cu_b, "reference", **options)
    actual, grads = run(maxsim, a, b, cu_a, cu_b, backend, **options)
    for x, e in zip(actual, expected, strict=True):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x.double(), e, atol=2e-5, rtol=1e-5)
    for g, e in zip(grads, grads_expected, strict=True):
        tolerance = 1e-5 if g.dtype == torch.float32 else 5e-3
        assert (g.double() - e).norm() <= tolerance * e.norm() + 1e-12
        assert (g[-2:] == 0).all()


@pytest.mark.parametrize("isa", native.available_cpu_isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_instruction_set(isa, dtype):
    native.force_cpu_isa(isa)
    try:
        compare(*interleave(sets([3, 0, 17, 40, 1], 40, dtype), sets([19, 33, 1, 0], 40, dtype, 1)), direction="both")
    finally:
        native.force_cpu_isa("auto")


def interleave(x, y):
    return x[0], y[0], x[1], y[1]


@pytest.mark.parametrize("direction", ["a", "b", "both"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_directions(direction, reduction):
    compare(
        *interleave(sets([5, 30, 2], 24), sets([9, 1, 40, 7], 24, seed=1)), direction=direction, reduction=reduction
    )


@pytest.mark.parametrize(
    ("lengths_a", "lengths_b"),
    [
        ([600, 3], [700, 2]),
        ([300], [5, 6, 7]),
        ([4, 5], [900]),
        ([1] * 300, [1] * 3),
        ([2], [1] * 280),
        ([0], [0]),
        ([], [3]),
    ],
)
def test_sets_longer_and_shorter_than_a_block(lengths_a, lengths_b):
    compare(*interleave(sets(lengths_a, 16), sets(lengths_b, 16, seed=1)), direction="both")


@pytest.mark.parametrize("d", [1, 3, 63, 80, 1152])
def test_feature_sizes(d):
    compare(*interleave(sets([5, 9], d), sets([9, 4], d, seed=1)), direction="both")


def test_blip2_is_the_one_token_case():
    image, text = torch.randn(6, 32, 20), torch.randn(5, 20)
    cu_image = torch.arange(0, 6 * 32 + 1, 32, dtype=torch.int32)
    scores = maxsim(text, image.flatten(0, 1), torch.arange(6, dtype=torch.int32), cu_image)
    torch.testing.assert_close(scores, torch.einsum("td,iqd->tiq", text, image).amax(-1))


def test_nan_reaches_only_scores_that_see_it():
    a, b, cu_a, cu_b = interleave(sets([5, 30], 24), sets([9, 40], 24, seed=1))
    b[3] = float("nan")
    scores = maxsim(a, b, cu_a, cu_b)
    assert scores[:, 0].isnan().all()
    assert scores[:, 1].isfinite().all()


def test_smooth_maximum_bounds_the_maximum():
    arguments = interleave(sets([5, 30], 24), sets([9, 40], 24, seed=1))
    hard, smooth = maxsim(*arguments), maxsim(*arguments, smooth=0.01)
    assert (smooth >= hard).all()
    assert (smooth - hard).max() < 30 * 0.01 * 4
    with pytest.raises(RuntimeError, match="has no smooth maximum"):
        maxsim(*arguments, smooth=0.01, backend="cpu")


def test_loss_and_its_gradient():
    arguments = interleave(sets([5, 30, 8], 24), sets([9, 40, 3], 24, seed=1))
    s = torch.tensor(8.0, requires_grad=True)
    options = {"logit_scale": s}
    (expected,), grads_expected = run(late_interaction_loss, *arguments, "reference", **options)
    (actual,), grads = run(late_interaction_loss, *arguments, "cpu", **options)
    torch.testing.assert_close(actual.double(), expected, atol=1e-6, rtol=1e-6)
    for g, e in zip(grads, grads_expected, strict=True):
        torch.testing.assert_close(g.double(), e, atol=1e-6, rtol=1e-4)


def test_compiles():
    arguments = interleave(sets([5, 30, 8], 24), sets([9, 40, 3], 24, seed=1))
    compiled = torch.compile(maxsim, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), maxsim(*arguments))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"cu_seqlens_a": torch.tensor([0, 9], dtype=torch.int32)}, ValueError, "must end within the 4 rows"),
        ({"a": torch.zeros(4, 0), "b": torch.zeros(4, 0)}, ValueError, "a must have at least 1 feature"),
        ({"cu_seqlens_b": torch.tensor([0, 3])}, TypeError, "cu_seqlens_b must be int32"),
        ({"direction": "c"}, ValueError, "direction must be one of"),
        ({"smooth": 0.0}, ValueError, "smooth must be positive"),
    ],
)
def test_bad_input(change, error, words):
    cu = torch.tensor([0, 3], dtype=torch.int32)
    arguments = {"a": torch.zeros(4, 8), "b": torch.zeros(4, 8), "cu_seqlens_a": cu, "cu_seqlens_b": cu, **change}
    with pytest.raises(error, match=words):
        maxsim(**arguments)
