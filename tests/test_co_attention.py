"""Co-attention against one float64 matrix of scores with a softmax along each axis."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton

import fastxattn
from fastxattn.ops.co_attention import backends
from fastxattn.ops.co_attention.problem import Problem
from fastxattn.ops.co_attention.reference import co_attention_reference
from fastxattn.runtime import native
from fastxattn.testing import measure_error
from fastxattn.testing.bounds import checked_accesses
from fastxattn.testing.budget import of_few

TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = Problem.names[:4][:4]
BIASES = ("key_bias_a", "key_bias_b")
RAGGED = ((60, 0, 90, 2), (50, 12, 68, 0))
FEATURES = {
    "plain": {"biases": False},
    "biases": {},
    "softcap": {"softcap": 3.0},
    "negative_scale": {"scale": -0.2},
    "dropout": {"dropout_p": 0.3},
    "narrow": {"dims": (3, 5, 17), "dropout_p": 0.2, "softcap": 1.0},
    "wide": {"dims": (200, 256, 130), "lengths": ((33,), (70,))},
    "pieces": {"lengths": ((7, 1100), (40, 130)), "dims": (16, 8, 24)},  # longer than the kernel keeps at a time
    "one_token": {"lengths": ((1, 9, 1), (1, 1, 30))},
}
SHORT = {"lengths": ((20, 0, 37, 2), (18, 5, 40, 0)), "heads": 2, "dims": (24, 16, 12)}  # for the interpreter


def make(dtype, lengths=RAGGED, heads=4, dims=(64, 32, 48), biases=True, device="cpu"):
    g = torch.Generator().manual_seed(0)
    rows = [sum(n) + extra for n, extra in zip(lengths, (0, 3), strict=True)]  # three rows of b belong to nobody
    head_dim, value_a, value_b = dims
    given = {
        "query_a": torch.randn(rows[0], heads, head_dim, generator=g).to(dtype),
        "query_b": torch.randn(rows[1], heads, head_dim, generator=g).to(dtype),
        "value_a": torch.randn(rows[0], heads, value_a, generator=g).to(dtype),
        "value_b": torch.randn(rows[1], heads, value_b, generator=g).to(dtype),
    }
    if biases:
        given |= {
            "key_bias_a": torch.randn(rows[0], generator=g),
            "key_bias_b": torch.randn(rows[1], heads, generator=g),
        }
    offsets = [torch.tensor([0, *torch.tensor(n).cumsum(0).tolist()], dtype=torch.int32) for n in lengths]
    return {n: t.to(device) for n, t in given.items()}, [o.to(device) for o in offsets]


def results(fn, given, offsets, dtype=torch.float32, **options):
    """Outputs, and gradients under random cotangents of ``dtype``."""
    leaves = {n: t.detach().clone().requires_grad_() for n, t in given.items()}
    biases = {n: leaves[n] for n in BIASES if n in leaves}
    outs = fn(*(leaves[n] for n in NAMES), *offsets, **biases, **options)
    g = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(o.shape, generator=g).to(dtype).to(o) for o in outs]
    grads = torch.autograd.grad(outs, list(leaves.values()), cotangents)
    return dict(zip(("out_a", "out_b", *leaves), (*outs, *grads), strict=True))


def one_pass(backend):
    """The operation's own kernels, whatever the cost rule says."""
    return lambda *arguments, **options: backends.one_pass(backend, problem_of(*arguments, **options))


def reference(*arguments, **options):
    return co_attention_reference(problem_of(*arguments, **options))


def problem_of(*arguments, **options):
    """Fields by position, then by name."""
    return Problem(**dict(zip(Problem.names, arguments, strict=False)), **options)


def check(fn, dtype, device="cpu", softcap=0.0, scale=0.125, dropout_p=0.0, **shape):
    given, offsets = make(dtype, **shape)
    options = {"softcap": softcap, "scale": scale, "dropout_p": dropout_p}
    options["dropout_seed"] = torch.tensor([7, -(2**40)]) if dropout_p else None
    there = {n: t.to(device) for n, t in given.items()}
    seed = None if options["dropout_seed"] is None else options["dropout_seed"].to(device)
    ours = results(fn, there, [o.to(device) for o in offsets], dtype, **(options | {"dropout_seed": seed}))
    oracle = results(reference, {n: t.double() for n, t in given.items()}, offsets, dtype, **options)
    eager = results(reference, given, offsets, dtype, **options)
    for name, value in ours.items():
        report = measure_error(name, value.cpu(), oracle[name], eager[name], backward=not name.startswith("out"))
        few = report.same_nonfinite and report.max_error <= of_few(name, oracle, value.dtype)
        assert report.ok or few, str(report)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("feature", FEATURES)
def test_cpu(feature, dtype):
    if reason := native.cpu_library().reason:
        pytest.skip(reason)
    try:
        for isa in native.available_cpu_isas():
            native.force_cpu_isa(isa)
            check(one_pass("cpu"), dtype, **FEATURES[feature])
    finally:
        native.force_cpu_isa("auto")


@pytest.mark.parametrize(
    ("feature", "dtype"),
    [
        ("plain", torch.float32),
        ("softcap", torch.float32),
        ("dropout", torch.float32),
        ("wide", torch.float32),
        ("biases", torch.bfloat16),
        ("dropout", torch.float16),
    ],
    ids=str,
)
def test_triton(feature, dtype, monkeypatch):
    pytest.importorskip("triton")
    from fastxattn.ops.attention.triton import launch
    from fastxattn.ops.attention.triton.tiles import Tile
    from fastxattn.ops.co_attention import kernels_triton

    if TRITON_DEVICE == "cuda":
        return check(one_pass("triton"), dtype, TRITON_DEVICE, **FEATURES[feature])
    monkeypatch.setattr(launch.Launch, "tile", lambda self, kernel: Tile(32, 32, 4, 1))
    monkeypatch.setattr(kernels_triton, "tile_for", lambda *_: Tile(32, 32, 4, 1))
    with checked_accesses():
        wide = {"dims": (24, 130, 16)} if feature == "wide" else {}  # goes one direction after the other
        check(one_pass("triton"), dtype, **(FEATURES[feature] | SHORT | wide))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_public_function(backend, softcap):
    """Through the checks, with the cost rule's choice, scale by default."""

    def run(*arguments, scale=None, dropout_p=0.0, dropout_seed=None, **options):
        return fastxattn.co_attention(*arguments, backend=backend, **options)

    check(run, torch.float32, softcap=softcap)


def test_two_calls_and_one_pass_drop_the_same_weights(monkeypatch):
    given, offsets = make(torch.float32)
    arguments = (*(given[n] for n in NAMES), *offsets)
    options = {"dropout_p": 0.4, "dropout_seed": 11, "backend": "cpu"}
    found = {}
    for pays in (True, False):
        monkeypatch.setitem(backends.ONE_PASS, "cpu", lambda problem, pays=pays: pays)
        found[pays] = fastxattn.co_attention(*arguments, **options)
    for one, two in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_threads_or_neighbours(dtype):
    given, offsets = make(dtype, **FEATURES["pieces"])
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(results(one_pass("cpu"), given, offsets, scale=0.25))
    finally:
        torch.set_num_threads(before)
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name
    alone = {n: t[7:] if n.endswith("a") else t[40:170] for n, t in given.items()}
    ends = [(o[1:] - o[1]).contiguous() for o in offsets]
    outs = one_pass("cpu")(*(alone[n] for n in NAMES), *ends, alone["key_bias_a"], alone["key_bias_b"], scale=0.25)
    assert torch.equal(outs[0], found[0]["out_a"][7:])
    assert torch.equal(outs[1], found[0]["out_b"][40:170])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_masked_tokens_and_rows_of_nobody(backend):
    """A bias of -inf hides a token; with all hidden the readers get 0; rows past the offsets may hold NaN."""
    given, offsets = make(torch.float32)
    given["key_bias_b"][50:62] = -torch.inf
    given["key_bias_b"][70:80] = -torch.inf
    given["key_bias_a"][0:60] = -torch.inf
    dirty = {n: t.clone() for n, t in given.items()}
    for name in ("query_b", "value_b", "key_bias_b"):
        dirty[name][130:] = torch.nan
    run = lambda *a, **o: fastxattn.co_attention(*a, backend=backend, **o)  # noqa: E731
    clean, soiled = (results(run, x, offsets) for x in (given, dirty))
    assert not clean["out_b"][:50].any(), "all that b could read is hidden"
    assert not clean["value_b"][70:80].any() and not clean["key_bias_b"][70:80].nan_to_num().any()
    for name, value in soiled.items():
        assert torch.equal(value, clean[name]), name
        assert value.isfinite().all(), name
    given["value_a"][65, 1, 3] = torch.nan
    outs = run(*(given[n] for n in NAMES), *offsets, key_bias_a=given["key_bias_a"], key_bias_b=given["key_bias_b"])
    assert outs[0].isfinite().all()
    assert outs[1].isnan().nonzero().tolist() == [[j, 1, 3] for j in range(62, 130)]


def test_opcheck_compile_and_export():
    given, offsets = make(torch.float32)
    problem = problem_of(*(given[n] for n in NAMES), *offsets, *(given[n] for n in BIASES), 0.125)
    torch.library.opcheck(torch.ops.fastxattn.co_attention_cpu, problem.values())

    def fn(qa, qb):
        return fastxattn.co_attention(qa, qb, given["value_a"], given["value_b"], *offsets)

    queries = [given[n].clone().requires_grad_() for n in ("query_a", "query_b")]
    wanted = torch.autograd.grad(sum(o.sum() for o in fn(*queries)), queries)
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    for grad, other in zip(torch.autograd.grad(sum(o.sum() for o in compiled(*queries)), queries), wanted, strict=True):
        torch.testing.assert_close(grad, other)

    class Module(torch.nn.Module):
        def forward(self, qa, qb):
            return fn(qa, qb)

    graph = str(torch.export.export(Module(), (given["query_a"], given["query_b"]), strict=False).graph)
    assert graph.count("fastxattn.attention_cpu") == 2, "an exported graph keeps to attention"


def test_empty_sides_give_zero():
    given, offsets = make(torch.float32)
    out_a, out_b = fastxattn.co_attention(*(given[n] for n in NAMES), *offsets)
    assert not out_a[150:].any(), "side b of the last sequence is empty"
    assert not out_b[50:62].any(), "side a of the second sequence is empty"


def test_directions_drop_their_own_weights():
    q, ones = torch.zeros(64, 1, 8), torch.ones(64, 1, 8)
    offsets = torch.tensor([0, 64], dtype=torch.int32)
    a, b = fastxattn.co_attention(q, q, ones, ones, offsets, offsets, dropout_p=0.5, dropout_seed=3)
    assert not torch.equal(a, b)
    again, _ = fastxattn.co_attention(q, q, ones, ones, offsets, offsets, dropout_p=0.5, dropout_seed=3)
    assert torch.equal(a, again)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"query_b": torch.zeros(133, 2, 64)}, ValueError, "query_b must have the heads of query_a, 4; got 2"),
        ({"query_b": torch.zeros(133, 4, 8)}, ValueError, "query_b must have the head_dim of query_a, 64; got 8"),
        ({"value_a": torch.zeros(3, 4, 8)}, ValueError, "value_a must have as many tokens as query_a, 152; got 3"),
        ({"value_b": None}, TypeError, "value_b must be a tensor; got NoneType"),
        ({"query_a": torch.zeros(152, 64)}, ValueError, "query_a must have shape"),
    ],
    ids=str,
)
def test_bad_input(change, error, match):
    given, offsets = make(torch.float32)
    with pytest.raises(error, match=match):
        fastxattn.co_attention(*((given | change)[n] for n in NAMES), *offsets)
