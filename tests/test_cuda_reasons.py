"""What the CUDA kernels of losses, late interaction and pruning refuse, and how they say so; no device needed."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastxattn
from fastxattn.ops.contrastive.backends import INFONCE
from fastxattn.ops.contrastive.problem import Problem
from fastxattn.ops.late_interaction import backends as late_interaction
from fastxattn.ops.late_interaction import problem as tokens_of
from fastxattn.ops.pruning import backends as pruning
from fastxattn.ops.pruning.problem import Merge
from fastxattn.runtime import cuda, native


def problem(dtype: torch.dtype, scale: torch.dtype = torch.float32, **options: object) -> Problem:
    a, b = torch.empty(5, 8, dtype=dtype, device="cuda"), torch.empty(6, 8, dtype=dtype, device="cuda")
    return Problem(a=a, b=b, scale=torch.empty((), dtype=scale, device="cuda"), **options)


def tokens(dtype: torch.dtype, smooth: float | None = None) -> tokens_of.Problem:
    x, cu = torch.empty(5, 8, dtype=dtype, device="cuda"), torch.empty(2, dtype=torch.int32, device="cuda")
    sides = {"a": x, "b": x, "cu_a": cu, "cu_b": cu}
    return tokens_of.Problem(**sides) if smooth is None else tokens_of.SmoothProblem(**sides, smooth=smooth)


def refused(problem: Problem | tokens_of.Problem) -> str | None:
    """Why the CUDA backend does not run a problem."""
    table = INFONCE if isinstance(problem, Problem) else late_interaction.BACKENDS
    return next(backend.supports(problem) for backend in table if backend.name == "cuda")


def merging(dtype: torch.dtype) -> str | None:
    """Why CUDA merges no rows of this dtype."""
    x, place = torch.empty(5, 8, dtype=dtype, device="cuda"), torch.empty(5, dtype=torch.int32, device="cuda")
    backend = next(b for b in pruning.BACKENDS["merge"] if b.name == "cuda")
    return backend.supports(Merge(x=x, assignment=place, coefficient=None, rows=3))


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loaded CUDA library, and a device that is not queried."""
    monkeypatch.setattr(native, "cuda_library", lambda: native.Loaded(None, None))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("loaded")
def test_each_room_takes_its_dtypes_and_says_what_it_does_not() -> None:
    with FakeTensorMode():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for options in ({}, {"metrics": True, "margin": 0.1}, {"normalize": True, "bias": torch.zeros(())}):
                assert refused(problem(dtype, **options)) is None
            assert merging(dtype) is None
            for smooth in (None, 0.5):
                assert refused(tokens(dtype, smooth)) is None
        for wide in (problem(torch.float64), problem(torch.float32, torch.float64)):
            assert refused(wide) == "it computes in float32, and the tensors are float64"
        assert merging(torch.float64) == "it computes in float32, and the tensors are float64"
        assert refused(tokens(torch.float64)) == "it computes in float32, and the tensors are float64"


@pytest.mark.usefixtures("loaded")
def test_first_where_it_was_faster_and_never_in_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trace cannot look whether the library is there, so it takes what needs none."""
    pytest.importorskip("triton")
    with FakeTensorMode():
        x, cu = torch.empty(5, 8, dtype=torch.bfloat16, device="cuda"), torch.empty(2, dtype=torch.int32, device="cuda")
        features = {d: torch.empty(5, 8, dtype=d, device="cuda") for d in (torch.float32, torch.bfloat16)}
        for traced in (False, True):
            monkeypatch.setattr(torch.compiler, "is_compiling", lambda traced=traced: traced)
            first = "triton" if traced else "cuda"
            assert fastxattn.explain(fastxattn.maxsim, x, x, cu, cu).chosen == first
            for dtype, y in features.items():
                expected = first if dtype == torch.float32 else "triton"
                assert fastxattn.explain(fastxattn.infonce_loss, y, y).chosen == expected


def test_where_nothing_of_them_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "cuda_library", lambda: native.Loaded(None, "the CUDA kernels were not built"))
    device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda.unavailable(device) == "the CUDA kernels were not built"
    assert cuda.unavailable(torch.device("cpu")) == "the tensors are on cpu"
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert cuda.unavailable(device) == "it is written for NVIDIA devices"
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert cuda.unavailable(device) == "it needs compute capability 8.0, and the device has 7.5"
    with FakeTensorMode():
        for reason in (
            refused(problem(torch.float16)),
            refused(tokens(torch.float16)),
            merging(torch.float32),
        ):
            assert reason == "it needs compute capability 8.0, and the device has 7.5"


@pytest.mark.usefixtures("loaded")
def test_onnx_files_hold_standard_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    with FakeTensorMode():
        assert "ONNX files" in str(refused(problem(torch.float32)))
        assert "ONNX files" in str(refused(tokens(torch.float32)))


def test_every_loss_names_the_backend() -> None:
    a, b, cu = torch.zeros(5, 8), torch.zeros(6, 8), torch.tensor([0, 5], dtype=torch.int32)
    for call, arguments in (
        (fastxattn.infonce_loss, (a, b, 1.0)),
        (fastxattn.sigmoid_loss, (a, b, 1.0, 0.0)),
        (fastxattn.maxsim, (a, b, cu, cu)),
    ):
        reasons = {v.backend: v.reason for v in fastxattn.explain(call, *arguments).verdicts}
        assert reasons["cuda"] == "the tensors are on cpu"
        with pytest.raises(RuntimeError, match="cannot run this problem: the tensors are on cpu"):
            call(*arguments, backend="cuda")


@pytest.mark.usefixtures("loaded")
def test_fake_tensors_go_through_the_operators() -> None:
    """Shapes and dtypes, as torch.compile and torch.export see them; autograd itself wants a device."""
    ops = torch.ops.fastxattn
    with FakeTensorMode():
        a, b = (torch.empty(n, 8, device="cuda", dtype=torch.float16) for n in (5, 6))
        cu, scale = torch.empty(3, dtype=torch.int32, device="cuda"), torch.empty((), device="cuda")
        for result in (
            fastxattn.sigmoid_loss(a, b, scale, backend="cuda"),
            fastxattn.maxsim(a, b, cu, cu, backend="cuda"),
            fastxattn.maxsim(a, b, cu, cu, smooth=0.1, backend="cuda"),
        ):
            assert result.dtype == torch.float32 and result.device.type == "cuda"
        grads = ops.sigmoid_cuda(a, b, scale, scale, *[None] * 7, False, None, 7)[1:3]
        scores, best = torch.empty(2, 2, device="cuda"), torch.empty(5, 2, device="cuda")
        saved = (scores, scores, best, best, a, b, cu, cu, True, True)
        for found in (grads, ops.maxsim_backward_cuda(*saved, 3), ops.smooth_maxsim_backward_cuda(*saved, 0.1, 3)):
            assert [g.shape for g in found] == [(5, 8), (6, 8)] and {g.dtype for g in found} == {torch.float32}
