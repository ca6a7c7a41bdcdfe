"""Attention inside the rest of PyTorch: autograd, compile, export, autocast, checkpointing, subclasses, seeds."""

import functools

import pytest
import torch
import torch._dynamo.testing
from torch.utils.checkpoint import checkpoint

import fastxattn
from fastxattn import PackedTokens
from fastxattn.ops.attention import backends
from fastxattn.ops.attention.problem import Problem
from fastxattn.runtime import native
from fastxattn.testing.attention import ATTENTION_CASES, results

pytestmark = pytest.mark.skipif(bool(native.cpu_library().reason), reason="needs the CPU kernels")
BY_NAME = {case.name: case for case in ATTENTION_CASES}


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def inputs(lengths_q=(2, 4), lengths_k=(4, 5), heads=4, kv_heads=2, dim=8, dtype=torch.float32, grad=False):
    g = torch.Generator().manual_seed(0)
    shapes = ((sum(lengths_q), heads, dim), (sum(lengths_k), kv_heads, dim), (sum(lengths_k), kv_heads, dim))
    tokens = [torch.randn(s, generator=g).to(dtype).requires_grad_(grad) for s in shapes]
    offsets = [
        torch.tensor([0, *torch.tensor(n).cumsum(0).tolist()], dtype=torch.int32) for n in (lengths_q, lengths_k)
    ]
    return *tokens, *offsets


@pytest.mark.parametrize(
    "options",
    [{}, {"softcap": 2.0}, {"kv_range": True}, {"key_bias": 1}, {"key_bias": 2, "dropout_p": 0.3}, {"key_index": True}],
    ids=str,
)
def test_gradcheck(options):
    """The reference's gradients, lse's included, against finite differences in float64."""
    query, key, value, cu_q, cu_k = inputs(dtype=torch.float64, grad=True)
    options = dict(options)
    bias = None
    if options.pop("kv_range", False):
        options["kv_range"] = torch.tensor([[0, 2], [1, 1], [0, 5], [3, 5], [2, 3], [0, 1]], dtype=torch.int32)
    if axes := options.pop("key_bias", 0):
        bias = torch.randn((9, 4)[:axes], dtype=torch.float64, requires_grad=True)
    if options.pop("key_index", False):
        options["key_index"] = ints(8, 3, 1, 0, 2, 2, 5, 4, 7)
    if "dropout_p" in options:
        options["dropout_seed"] = 3

    def f(query, key, value, bias):
        out, lse = fastxattn.varlen_cross_attention(
            query, key, value, cu_q, cu_k, key_bias=bias, return_lse=True, **options
        )
        return out, lse[lse > -torch.inf]

    assert torch.autograd.gradcheck(f, (query, key, value, bias), fast_mode=True)


def test_gradcheck_padded_bias():
    query, key, value = (torch.randn(2, n, 2, 3, dtype=torch.float64, requires_grad=True) for n in (3, 4, 4))
    mask_q = torch.tensor([[True, False, True], [True, True, False]])
    mask_k = torch.tensor([[False, True, True, False], [True, True, False, False]])
    for shape in ((2, 2, 3, 4), (1, 2, 1, 4), (3, 1), (4,)):
        bias = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        f = functools.partial(fastxattn.cross_attention, query_mask=mask_q, key_mask=mask_k)
        args = (query, key, value, bias)
        assert torch.autograd.gradcheck(lambda q, k, v, b, f=f: f(q, k, v, bias=b), args, fast_mode=True)


@pytest.mark.parametrize("names", [("query",), ("key",), ("value",), ("key_bias",), ("bias",), ("query", "bias")])
@pytest.mark.parametrize("only", ["out", "lse", "both"])
def test_any_subset_of_gradients(names, only):
    """Gradients asked for one at a time, of one output at a time, are those of the whole."""
    problem = BY_NAME["everything"].problem(torch.float32)
    leaves = {name: getattr(problem, name).clone().requires_grad_() for name in names}
    found = []
    for backend in ("reference", "cpu"):
        out, lse = backends.run_on(backend, problem.replace(**leaves))
        loss = 0.0
        if only in ("out", "both"):
            loss = loss + (out * torch.arange(out.numel()).reshape(out.shape).cos()).sum()
        if only in ("lse", "both"):
            loss = loss + lse[lse > -torch.inf].sin().sum()
        found.append(torch.autograd.grad(loss, tuple(leaves.values()), allow_unused=True))
    for ours, reference in zip(found[1], found[0], strict=True):
        wanted_grad = torch.zeros_like(ours) if reference is None else reference
        torch.testing.assert_close(ours, wanted_grad, rtol=2e-4, atol=2e-5)


def test_no_graph_without_gradients():
    arguments = inputs(grad=True)
    with torch.no_grad():
        assert not fastxattn.varlen_cross_attention(*arguments).requires_grad
    with torch.inference_mode():
        assert not fastxattn.varlen_cross_attention(*arguments).requires_grad
    assert not fastxattn.varlen_cross_attention(*inputs()).requires_grad


def test_double_backward_is_refused():
    arguments = inputs(grad=True)
    out = fastxattn.varlen_cross_attention(*arguments)
    (grad,) = torch.autograd.grad(out.square().sum(), arguments[0], create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        grad.sum().backward()


def test_func_grad():
    """torch.func.grad goes through; vmap says what it lacks."""
    query, key, value, cu_q, cu_k = inputs()

    def loss(query):
        return fastxattn.varlen_cross_attention(query, key, value, cu_q, cu_k).square().sum()

    leaf = query.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(query), torch.autograd.grad(loss(leaf), leaf)[0])


def test_checkpoint_with_dropout():
    """The seed drawn inside is drawn again in the recomputation, so gradients are those without checkpointing."""
    arguments = inputs(grad=True)
    f = functools.partial(fastxattn.varlen_cross_attention, dropout_p=0.5)
    grads = []
    for wrap in (lambda *a: f(*a), lambda *a: checkpoint(f, *a, use_reentrant=False)):
        torch.manual_seed(5)
        grads.append(torch.autograd.grad(wrap(*arguments).sum(), arguments[:3]))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_seeds():
    f = functools.partial(fastxattn.varlen_cross_attention, *inputs(), dropout_p=0.5)
    assert torch.equal(f(dropout_seed=3), f(dropout_seed=torch.tensor([3])))
    assert torch.equal(f(dropout_seed=3), f(dropout_seed=torch.tensor(3)))
    assert torch.equal(f(dropout_seed=-1), f(dropout_seed=2**64 - 1))
    assert not torch.equal(f(dropout_seed=3), f(dropout_seed=4))
    torch.manual_seed(1)
    first, second = f(), f()
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(f(), first)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_autocast(backend):
    """Inputs are cast to the autocast dtype, gradients come back in theirs; lse stays float32."""
    query, key, value, cu_q, cu_k = inputs(grad=True)
    bias = torch.randn(9, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = fastxattn.varlen_cross_attention(
            query, key, value.bfloat16(), cu_q, cu_k, key_bias=bias, return_lse=True, backend=backend
        )
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    cast = fastxattn.varlen_cross_attention(
        query.bfloat16(), key.bfloat16(), value.bfloat16(), cu_q, cu_k, key_bias=bias, backend=backend
    )
    assert torch.equal(out, cast)
    out.float().sum().backward()
    assert {t.grad.dtype for t in (query, key, value, bias)} == {torch.float32}


@pytest.mark.parametrize("name", ["ragged", "everything", "key_index"])
def test_opcheck(name):
    problem = BY_NAME[name].problem(torch.float32)
    torch.library.opcheck(torch.ops.fastxattn.attention_cpu.default, problem.values())
    out, lse = torch.ops.fastxattn.attention_cpu(*problem.values())
    needs = sum(bit for name, bit in Problem.bits.items() if getattr(problem, name) is not None)
    arguments = (torch.randn_like(out), torch.randn(lse.shape), out, lse, *problem.values(), needs)
    torch.library.opcheck(torch.ops.fastxattn.attention_backward_cpu.default, arguments)


def test_empty_strides_of_results():
    """What the fakes promise is what the kernel returns: contiguous results, empty ones where nothing was asked."""
    problem = BY_NAME["everything"].problem(torch.float32)
    out, lse = torch.ops.fastxattn.attention_cpu(*problem.values())
    grads = torch.ops.fastxattn.attention_backward_cpu(torch.ones_like(out), None, out, lse, *problem.values(), 1)
    assert [g.numel() for g in grads[1:]] == [0, 0, 0, 0]
    assert all(t.is_contiguous() for t in (out, lse, *grads))


class Counter:
    """A compiler backend that counts how often it is called."""

    def __init__(self):
        self.calls, self.targets = 0, set()

    def __call__(self, graph, _):
        self.calls += 1
        self.targets |= {str(node.target) for node in graph.graph.nodes}
        return graph


def test_compile_without_recompiling_when_lengths_change():
    """fullgraph, the opaque operator in the graph, one graph for any lengths and batch once sizes are dynamic."""
    counter = Counter()
    torch._dynamo.reset()

    @functools.partial(torch.compile, backend=counter, fullgraph=True, dynamic=True)
    def f(query, key, value, cu_q, cu_k):
        return fastxattn.varlen_cross_attention(query, key, value, cu_q, cu_k, softcap=3.0)

    for lengths in (((2, 4), (4, 5)), ((7, 4, 3), (9, 5, 31)), ((64, 3, 2, 9), (5, 6, 7, 8))):
        arguments = inputs(*lengths)
        wanted = fastxattn.varlen_cross_attention(*arguments, softcap=3.0)
        torch.testing.assert_close(f(*arguments), wanted)
    assert counter.calls == 1
    assert "fastxattn.attention_cpu.default" in counter.targets


@torch._dynamo.config.patch(error_on_recompile=True)
def test_compile_training_and_padded():
    """Forward and backward through AOTAutograd, masks and ranges included, again without recompiling."""
    torch._dynamo.reset()

    def f(query, key, value, mask, bias):
        out, lse = fastxattn.cross_attention(query, key, value, key_mask=mask, bias=bias, return_lse=True)
        return out.square().sum() + lse.logsumexp(-1).sum()

    g = torch.compile(f, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch, n, m in ((3, 4, 6), (5, 7, 9), (4, 9, 7)):  # unlike each other and the fixed sizes
        torch.manual_seed(0)
        query, key, value = (torch.randn(batch, s, 2, 8, requires_grad=True) for s in (n, m, m))
        bias = torch.randn(batch, 1, n, m, requires_grad=True)
        mask = torch.rand(batch, m) > 0.3
        mask[:, 0] = True
        ours, wanted = (
            torch.autograd.grad(h(query, key, value, mask, bias), (query, key, value, bias)) for h in (g, f)
        )
        for a, b in zip(ours, wanted, strict=True):
            torch.testing.assert_close(a, b)


def test_compile_with_inductor():
    torch._dynamo.reset()
    arguments = inputs(grad=True)

    def f(*a):
        return fastxattn.varlen_cross_attention(*a).sin().sum()

    ours = torch.autograd.grad(torch.compile(f, fullgraph=True)(*arguments), arguments[:3])
    for a, b in zip(ours, torch.autograd.grad(f(*arguments), arguments[:3]), strict=True):
        torch.testing.assert_close(a, b)


def test_compile_says_what_is_wrong():
    torch._dynamo.reset()
    query, key, value, cu_q, cu_k = inputs()
    f = torch.compile(fastxattn.varlen_cross_attention, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="key must have the head_dim of query, 8; got 7"):
        f(query, key[..., :7], value, cu_q, cu_k)


class Attend(torch.nn.Module):
    """Packed text looks at packed image tokens."""

    def forward(self, text: PackedTokens, image: PackedTokens) -> PackedTokens:
        out = fastxattn.varlen_cross_attention(
            text.values, image.values, image.values, text.cu_seqlens, image.cu_seqlens
        )
        return text.with_values(out)


def packed(*lengths):
    return PackedTokens.from_list([torch.randn(n, 2, 8) for n in lengths])


def test_export():
    """Packed tokens in and out, with dynamic lengths and batch."""
    rows_q, rows_k = torch.export.Dim("rows_q", min=2), torch.export.Dim("rows_k", min=2)
    offsets = torch.export.Dim("offsets", min=2)
    shapes = ([{0: rows_q}, {0: offsets}, None], [{0: rows_k}, {0: offsets}, None])
    program = torch.export.export(Attend(), (packed(2, 3), packed(4, 4)), dynamic_shapes=shapes, strict=False)
    assert any("attention_cpu" in str(node.target) for node in program.graph.nodes)
    text, image = packed(1, 0, 3), packed(2, 2, 4)
    out = program.module()(text, image)
    assert isinstance(out, PackedTokens)
    torch.testing.assert_close(out.values, Attend()(text, image).values)


def test_compile_carries_packed_tokens():
    torch._dynamo.reset()
    compiled = torch._dynamo.testing.CompileCounterWithBackend("eager")
    f = torch.compile(Attend(), backend=compiled, fullgraph=True, dynamic=True)
    for lengths in (((2, 3), (4, 5)), ((5, 1, 3), (2, 2, 9))):
        text, image = (packed(*n) for n in lengths)
        out = f(text, image)
        assert isinstance(out, PackedTokens)
        torch.testing.assert_close(out.values, Attend()(text, image).values)
    assert compiled.frame_count == 1


def test_results_do_not_alias_or_change_inputs():
    problem = BY_NAME["everything"].problem(torch.float32)
    before = [t.clone() if isinstance(t, torch.Tensor) else t for t in problem.values()]
    results(functools.partial(backends.run_on, "cpu"), problem)
    for a, b in zip(before, problem.values(), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
