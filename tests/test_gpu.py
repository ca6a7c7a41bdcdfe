"""What holds of every operation on a GPU: it never waits for the device, follows streams, and goes into a graph."""

from __future__ import annotations

import pytest
import torch

import fastxattn
from fastxattn.ops.contrastive import infonce_loss, sigmoid_loss
from fastxattn.ops.importance import key_importance
from fastxattn.ops.late_interaction import maxsim
from fastxattn.ops.pruning import Budget, prune_tokens
from fastxattn.ops.retrieval import topk_similarity
from fastxattn.testing import offsets
from tests.device import BACKENDS, PRESENT

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not PRESENT, reason="needs a GPU")]
LENGTHS_A, LENGTHS_B = [5, 0, 64, 33], [70, 9, 0, 200]


def packed(lengths, *shape, dtype=torch.float16, seed=0):
    g = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(sum(lengths), *shape, generator=g, device="cuda").to(dtype).requires_grad_()


def attention(backend):
    a, b, c = packed(LENGTHS_A, 4, 64), packed(LENGTHS_B, 2, 64), packed(LENGTHS_B, 2, 64, seed=1)
    return [a, b, c], lambda cu_a, cu_b: fastxattn.varlen_cross_attention(a, b, c, cu_a, cu_b, backend=backend)


def co_attention(backend):
    a, b = packed(LENGTHS_A, 4, 64), packed(LENGTHS_B, 4, 64)
    return [a, b], lambda cu_a, cu_b: fastxattn.co_attention(a, b, a, b, cu_a, cu_b, backend=backend)


def importance(backend):
    a, b = packed(LENGTHS_A, 4, 64), packed(LENGTHS_B, 4, 64)
    lse = torch.full((4, sum(LENGTHS_A)), 5.0, device="cuda")
    return [a, b], lambda cu_a, cu_b: key_importance(a, b, lse, cu_a, cu_b, backend=backend)


def clip(backend):
    a, b = packed([90], 64), packed([90], 64, seed=1)
    scale = torch.tensor(0.1, device="cuda", requires_grad=True)
    return [a, b, scale], lambda *_: infonce_loss(a, b, scale, backend=backend)


def siglip(backend):
    a, b = packed([90], 64), packed([90], 64, seed=1)
    scale, bias = (torch.tensor(t, device="cuda", requires_grad=True) for t in (0.1, -2.0))
    return [a, b, scale, bias], lambda *_: sigmoid_loss(a, b, scale, bias, backend=backend)


def filip(backend):
    a, b = packed(LENGTHS_A, 64), packed(LENGTHS_B, 64)
    return [a, b], lambda cu_a, cu_b: maxsim(a, b, cu_a, cu_b, backend=backend)


def prune(backend):
    x, scores = packed(LENGTHS_B, 64), packed(LENGTHS_B, dtype=torch.float32).detach()
    return [x], lambda _, cu: prune_tokens(x, scores, cu, Budget.ratio(0.3), max_seqlen=200, backend=backend)[0]


def search(backend):
    a, b = packed([3], 64).detach(), packed([500], 64).detach()
    return [], lambda *_: topk_similarity(a, b, 7, backend=backend)


OPERATIONS = [(f, b) for f in (attention, clip, siglip, filip, prune) for b in BACKENDS]
OPERATIONS += [(f, "triton") for f in (co_attention, importance, search)]
each = pytest.mark.parametrize(("operation", "backend"), OPERATIONS, ids=lambda x: getattr(x, "__name__", x))


def step(leaves, function):
    """Results and gradients."""
    cu = [offsets(n).cuda() for n in (LENGTHS_A, LENGTHS_B)]

    def run():
        found = function(*cu)
        found = list(found) if isinstance(found, tuple) else [found]
        if not leaves:
            return found
        return found + list(torch.autograd.grad(found, leaves, [torch.ones_like(f) for f in found]))

    return run


def assert_equal(found, wanted):
    for i, (f, w) in enumerate(zip(found, wanted, strict=True)):
        assert torch.equal(f, w), i


@each
def test_never_waits_for_the_device(operation, backend):
    run = step(*operation(backend))
    wanted = run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_equal(found, wanted)


@each
def test_follows_the_current_stream(operation, backend):
    leaves, function = operation(backend)
    run = step(leaves, function)
    wanted = run()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        held = [leaf.detach().clone() for leaf in leaves]
        for leaf in leaves:
            leaf.data.zero_()
        torch.cuda._sleep(20_000_000)  # a launch on another stream would read the zeros
        for leaf, value in zip(leaves, held, strict=True):
            leaf.data.copy_(value)
        found = run()
    stream.synchronize()
    assert_equal(found, wanted)


@each
def test_goes_into_a_cuda_graph(operation, backend):
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # autograd works on a leaf in the stream it was made in, which cannot be the default
        run = step(*operation(backend))
        wanted = [t.clone() for t in run()]
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        found = run()
    for t in found:
        t.detach().fill_(3)
    graph.replay()
    torch.cuda.synchronize()
    assert_equal(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_auto_takes_a_kernel(dtype):
    a, b = packed(LENGTHS_A, 4, 64, dtype=dtype), packed(LENGTHS_B, 4, 64, dtype=dtype)
    cu_a, cu_b = offsets(LENGTHS_A).cuda(), offsets(LENGTHS_B).cuda()
    found = fastxattn.explain(fastxattn.varlen_cross_attention, a, b, b, cu_a, cu_b)
    assert found.chosen in ("triton", "cuda", "flash"), found
    assert torch.isfinite(fastxattn.varlen_cross_attention(a, b, b, cu_a, cu_b)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_with_inductor(backend):
    leaves, function = attention(backend)
    cu = [offsets(n).cuda() for n in (LENGTHS_A, LENGTHS_B)]
    wanted = torch.autograd.grad(function(*cu).sum(), leaves)
    compiled = torch.compile(lambda: function(*cu) * 1.0, fullgraph=True)
    for f, w in zip(torch.autograd.grad(compiled().sum(), leaves), wanted, strict=True):
        torch.testing.assert_close(f, w)


def test_an_accelerated_module_agrees():
    torch.manual_seed(0)
    layer = torch.nn.TransformerDecoderLayer(256, 4, 512, batch_first=True, device="cuda").eval()
    target, memory = torch.randn(3, 20, 256, device="cuda"), torch.randn(3, 150, 256, device="cuda")
    hidden = torch.arange(150, device="cuda") >= torch.tensor([150, 40, 90], device="cuda")[:, None]
    wanted = layer(target, memory, memory_key_padding_mask=hidden)
    report = fastxattn.accelerate(layer)
    found = layer(target, memory, memory_key_padding_mask=hidden)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    fastxattn.restore(layer)
    assert str(report)
