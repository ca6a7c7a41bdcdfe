"""The CUDA path without a device: fake CUDA tensors for dispatch, shapes and export; a fake flash_attn package."""

import sys
import types

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastxattn
from fastxattn.ops.attention import backends, kernels_flash
from fastxattn.ops.attention.operator import BACKWARD, FORWARD
from fastxattn.ops.attention.problem import Problem
from fastxattn.ops.co_attention.operator import BACKWARD as co_attention_backward
from fastxattn.ops.co_attention.problem import Problem as CoAttentionProblem
from fastxattn.runtime import native
from fastxattn.runtime.backend import explain

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a device runs the real thing")


def fake_problem(dtype=torch.float16, **options):
    q, kv = torch.empty(20, 4, 64, device="cuda", dtype=dtype), torch.empty(30, 2, 64, device="cuda", dtype=dtype)
    offsets = torch.empty(3, dtype=torch.int32, device="cuda")
    tokens = {"query": q, "key": kv, "value": kv, "cu_seqlens_q": offsets, "cu_seqlens_k": offsets}
    return Problem(**tokens | {"scale": 0.125} | options)


def test_fake_cuda_tensors_go_to_triton_and_back():
    pytest.importorskip("triton")
    with FakeTensorMode():
        p = fake_problem()
        out, lse = fastxattn.varlen_cross_attention(
            p.query, p.key, p.value, p.cu_seqlens_q, p.cu_seqlens_k, return_lse=True
        )
        assert out.shape == (20, 4, 64) and out.dtype == torch.float16 and out.device.type == "cuda"
        assert lse.shape == (4, 20) and lse.dtype == torch.float32
        # Autograd aborts the process over a CUDA tensor without a device, so the operator is asked directly.
        grads = BACKWARD["triton"](out, None, out, lse, *p.values(), Problem.bits["query"] + Problem.bits["value"])
        assert [tuple(g.shape) for g in grads] == [(20, 4, 64), (0,), (30, 2, 64), (0,), (0,)]
        score = fastxattn.key_importance(p.query, p.key, lse, p.cu_seqlens_q, p.cu_seqlens_k)
        assert score.shape == (30,)
        a, b = torch.empty(20, 2, 64, device="cuda", dtype=torch.float16), p.key
        out_a, out_b = fastxattn.co_attention(a, b, a, b, p.cu_seqlens_q, p.cu_seqlens_k)
        assert out_a.shape == (20, 2, 64) and out_b.shape == (30, 2, 64) and out_b.device.type == "cuda"
        offsets = (p.cu_seqlens_q, p.cu_seqlens_k)
        both = CoAttentionProblem.of((a, b, a, b, *offsets, torch.empty(20, device="cuda"), None, 1.0, 0.0, 0.0, None))
        needs = both.bits["query_b"] + both.bits["key_bias_a"]
        lse_a, lse_b = torch.empty(2, 20, device="cuda"), torch.empty(2, 30, device="cuda")
        grads = co_attention_backward["triton"](out_a, out_b, out_a, out_b, lse_a, lse_b, *both.values(), needs)
        assert [tuple(g.shape) for g in grads] == [(0,), (30, 2, 64), (0,), (0,), (2, 20), (0,)]
        found = explain("attention", backends.BACKENDS, p)
        assert found.chosen == "triton"
        assert {v.backend: v.reason for v in found.verdicts}["cpu"] == "the tensors are on cuda"


def test_the_cuda_path_exports():
    pytest.importorskip("triton")

    class Module(torch.nn.Module):
        def forward(self, q, k, cu_q, cu_k):
            out, lse = fastxattn.varlen_cross_attention(q, k, k, cu_q, cu_k, return_lse=True)
            score = fastxattn.key_importance(q, k, lse, cu_q, cu_k)
            return out, score, fastxattn.co_attention(k, k, k, k, cu_k, cu_k)

    with FakeTensorMode():
        p = fake_problem()
        program = torch.export.export(Module(), (p.query, p.key, p.cu_seqlens_q, p.cu_seqlens_k), strict=False)
    graph = str(program.graph)
    assert graph.count("fastxattn.attention_triton") == 3, "one direction and two, which an exported graph keeps apart"
    assert "fastxattn.importance_triton" in graph


def test_the_cuda_backend_says_why_not(monkeypatch):
    monkeypatch.setattr(native, "cuda_library", lambda: native.Loaded(None, "the CUDA kernels were not built"))
    with FakeTensorMode():
        offsets = torch.empty(2, dtype=torch.int32, device="cuda")
        bias, wide = torch.empty(1, 1, 1, 1, device="cuda"), torch.empty(30, 2, 300, device="cuda")
        for problem, reason in (
            (fake_problem(), "the CUDA kernels were not built"),
            (fake_problem(bias=bias), "it has no bias"),
            (fake_problem(dropout_p=0.1), "it has no dropout"),
            (fake_problem(dtype=torch.float64), "float64"),
            (fake_problem().replace(value=wide), "up to 256 with torch.float16, got 64 and 300"),
            (fake_problem(dtype=torch.float32).replace(value=wide), "up to 128 with torch.float32, got 64 and 300"),
        ):
            assert reason in backends.supports_cuda(problem)
        monkeypatch.setattr(native, "cuda_library", lambda: native.Loaded(None, None))
        rich = {"kv_range": offsets, "key_bias": offsets, "key_index": offsets, "softcap": 1.0}
        assert backends.supports_cuda(fake_problem(**rich)) is None
        p = fake_problem()
        chosen = explain("attention", backends.in_order(p), p, "cuda").chosen
        assert chosen == "cuda"
        out, lse = FORWARD["cuda"](*p.values())
        assert out.shape == (20, 4, 64) and lse.dtype == torch.float32
    assert backends.supports_cuda(fake_problem_on_cpu()) == "the tensors are on cpu"


def test_triton_says_why_not():
    p = fake_problem_on_cpu()
    reason = {v.backend: v.reason for v in explain("attention", backends.BACKENDS, p).verdicts}["flash"]
    assert reason is not None
    assert "flash-attn is not installed" in reason or "on cpu" in reason


def fake_problem_on_cpu():
    q, kv = torch.randn(20, 4, 64).half(), torch.randn(30, 2, 64).half()
    offsets = {"cu_seqlens_q": torch.tensor([0, 8, 20]).int(), "cu_seqlens_k": torch.tensor([0, 30, 30]).int()}
    return Problem(query=q, key=kv, value=kv, **offsets, scale=0.125)


@pytest.fixture
def flash_package(monkeypatch):
    """A flash_attn that computes with the reference."""
    calls = []

    def flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale, softcap, return_attn_probs):
        calls.append((max_q, max_k))
        tokens = {"query": q, "key": k, "value": v, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
        out, lse = backends.attention_reference(Problem(**tokens, scale=softmax_scale, softcap=softcap))
        return out, torch.where(lse.detach() == -torch.inf, torch.inf, lse.detach()), None

    package = types.ModuleType("flash_attn")
    package.__spec__ = types.SimpleNamespace()
    package.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    kernels_flash._missing.cache_clear()
    yield calls
    kernels_flash._missing.cache_clear()


def test_flash_supports_what_it_knows(flash_package):
    with FakeTensorMode():
        assert kernels_flash.supports(fake_problem()) is None
        offsets = torch.empty(2, dtype=torch.int32, device="cuda")
        for options, reason in (
            ({"kv_range": offsets}, "it has no kv_range"),
            ({"key_bias": offsets}, "it has no key_bias"),
            ({"query_index": offsets}, "it has no query_index"),
            ({"dropout_p": 0.1}, "dropout mask"),
            ({"dtype": torch.float32}, "float16 and bfloat16"),
        ):
            assert reason in kernels_flash.supports(fake_problem(**options))
    assert kernels_flash.supports(fake_problem_on_cpu()) == "the tensors are on cpu"


def test_flash_runs_and_refuses_the_gradient_of_lse(flash_package):
    p = fake_problem_on_cpu()
    leaf = p.query.clone().requires_grad_()
    out, lse = kernels_flash.attend(p.replace(query=leaf))
    wanted, wanted_lse = backends.run_on("reference", p)
    assert torch.equal(out, wanted)
    assert torch.equal(lse, wanted_lse), "rows without keys must get -inf"
    assert flash_package == [(20, 30)]
    out.sum().backward(retain_graph=True)
    assert leaf.grad is not None
    with pytest.raises(RuntimeError, match="no gradient of lse"):
        lse[:, :8].sum().backward()
