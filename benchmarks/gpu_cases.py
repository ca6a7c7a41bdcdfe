"""Cases timed on a GPU: every operation against PyTorch's ways to do the same work, each case checked first.

Results are compared with float64 references on the same rounded inputs. A rival that this installation lacks, or
that does not take a case, is left out and named.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import fastxattn
from benchmarks.bench_contrastive import eager_clip, eager_siglip
from benchmarks.common import nbytes
from benchmarks.harness import Case, Workload
from fastxattn.ops import importance
from fastxattn.ops.co_attention.backends import ONE_PASS
from fastxattn.ops.contrastive import infonce_loss, sigmoid_loss
from fastxattn.ops.late_interaction import maxsim
from fastxattn.ops.pruning import Budget, prune_tokens
from fastxattn.ops.retrieval import topk_similarity
from fastxattn.runtime import native
from fastxattn.testing import offsets

Ways = dict[str, Callable[[], object]]
Lengths = list[int]
HALVES = (torch.bfloat16, torch.float16)
LIMITS = {torch.bfloat16: 1e-2, torch.float16: 1.5e-3, torch.float32: 1e-5}
"""Of the norm of the error, relative to the result's: rounding a result to the dtype takes a fifth to a half of it."""


def ragged(low: int, high: int, batch: int, seed: int) -> Lengths:
    """Sequence lengths, uniform in [low, high]."""
    return torch.randint(low, high + 1, (batch,), generator=torch.Generator().manual_seed(seed)).tolist()


SHAPES: dict[str, tuple[Lengths, Lengths]] = {
    "text to image": (ragged(5, 77, 64, 0), ragged(64, 1024, 64, 1)),
    "image to text": (ragged(64, 1024, 64, 1), ragged(5, 77, 64, 0)),
    "Q-Former 32 x 4096": ([32] * 16, [4096] * 16),
    "decode 1 x 4096": ([1] * 64, [4096] * 64),
    "dense 1024": ([1024] * 8, [1024] * 8),
}


def backends() -> tuple[str, ...]:
    """GPU backends that run here."""
    return ("triton", "cuda") if native.cuda_library().reason is None else ("triton",)


def tensors(found: object) -> list[Tensor]:
    """The tensors of a result, in order."""
    return [found] if isinstance(found, Tensor) else [t for t in found if isinstance(t, Tensor)]  # type: ignore[attr-defined]


def workload(
    ways: Mapping[str, Callable[[], object]],
    exact: Callable[[], Sequence[Tensor]],
    limit: float,
    flops: float = 0.0,
    moved: float = 0.0,
) -> Workload:
    """Backends of fastxattn, held to ``limit``, and the rivals that run; ratios are against the first rival."""
    usable: Ways = {}
    for name, way in ways.items():
        try:
            way()
        except Exception as error:
            if name.startswith("fastxattn"):
                raise
            said = str(error).partition("\n")[0][:200]
            print(f"gpu: {name} does not run here ({type(error).__name__}: {said}) and is left out")
        else:
            usable[name] = way

    def check() -> str:
        wanted = [t.double() for t in exact()]
        for name, way in usable.items():
            if not name.startswith("fastxattn"):
                continue
            for i, (found, e) in enumerate(zip(tensors(way()), wanted, strict=True)):
                error = ((found.double() - e).norm() / e.norm().clamp(min=1e-30)).item()
                if not error <= limit:
                    return f"{name}: result {i} is off by {error:.1e} of its norm, allowed {limit:.1e}"
        return "ok"

    rival = next((name for name in usable if not name.startswith("fastxattn")), next(iter(usable)))
    return Workload(usable, rival, check, flops, moved)


def tokens(lengths: Lengths, dtype: torch.dtype, heads: int = 16, dim: int = 64) -> Tensor:
    """Packed random tokens."""
    return torch.randn(sum(lengths), heads, dim, device="cuda").to(dtype)


def attention_ways(
    q: Tensor, k: Tensor, v: Tensor, of_q: Lengths, of_k: Lengths, flex: bool
) -> tuple[Ways, Ways, list[Tensor]]:
    """Ways to compute the same attention, the honest rival first: on packed tokens, and on padded ones.

    Last come query, key and value as the padded ones take them.
    """
    cu_q, cu_k, most_q, most_k = offsets(of_q).cuda(), offsets(of_k).cuda(), max(of_q), max(of_k)

    def ours(name: str) -> Callable[[], object]:
        return lambda: fastxattn.varlen_cross_attention(q, k, v, cu_q, cu_k, backend=name)

    def varlen() -> object:
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn(q, k, v, cu_q, cu_k, most_q, most_k)

    def flash() -> object:
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(q, k, v, cu_q, cu_k, most_q, most_k)

    def pad(x: Tensor, of: Lengths) -> Tensor:
        rows = torch.nn.utils.rnn.pad_sequence(x.detach().split(of), batch_first=True)
        return rows.transpose(1, 2).contiguous().requires_grad_(x.requires_grad)

    padded = [pad(x, of) for x, of in ((q, of_q), (k, of_k), (v, of_k))]
    length_k = torch.tensor(of_k, device="cuda")
    mask = None if min(of_k) == most_k else (torch.arange(most_k, device="cuda") < length_k[:, None])[:, None, None]
    half = q.dtype in HALVES
    ways = {f"fastxattn {name}": ours(name) for name in backends()}
    if half:
        ways |= {"varlen_attn": varlen, "flash-attn": flash}
    other: Ways = {"padded SDPA": lambda: F.scaled_dot_product_attention(*padded, attn_mask=mask)}
    if half and flex:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        compiled = torch.compile(flex_attention)
        blocks = create_block_mask(lambda b, h, i, j: j < length_k[b], len(of_q), None, most_q, most_k, device="cuda")
        other["FlexAttention"] = lambda: compiled(*padded, block_mask=blocks)
    return ways, other, padded


def attention(shape: str, dtype: torch.dtype, backward: bool) -> Workload:
    of_q, of_k = SHAPES[shape]
    q, k, v = (tokens(of, dtype).requires_grad_(backward) for of in (of_q, of_k, of_k))
    packed, padded, leaves_padded = attention_ways(q, k, v, of_q, of_k, flex=not backward)
    grad, grad_padded = torch.randn_like(q), torch.randn_like(leaves_padded[0])

    def exact() -> Sequence[Tensor]:
        leaves = [t.detach().double().requires_grad_(backward) for t in (q, k, v)]
        out = fastxattn.varlen_cross_attention(*leaves, offsets(of_q).cuda(), offsets(of_k).cuda(), backend="reference")
        return torch.autograd.grad(out, leaves, grad.double()) if backward else [out]

    flops = 4.0 * sum(m * n for m, n in zip(of_q, of_k, strict=True)) * 16 * 64
    moved = nbytes(q, q, k, v)
    if not backward:
        return workload(packed | padded, exact, LIMITS[dtype], flops, moved)

    def step(way: Callable[[], object], leaves: Sequence[Tensor], grad: Tensor) -> Callable[[], object]:
        return lambda: torch.autograd.grad(tensors(way())[0], leaves, grad)

    steps = {n: step(w, (q, k, v), grad) for n, w in packed.items()}
    steps |= {n: step(w, leaves_padded, grad_padded) for n, w in padded.items()}
    return workload(steps, exact, 2 * LIMITS[dtype], 3.5 * flops, 2 * moved + nbytes(q))


def key_importance(shape: str) -> Workload:
    of_q, of_k = SHAPES[shape]
    q, k = tokens(of_q, torch.bfloat16), tokens(of_k, torch.bfloat16)
    cu_q, cu_k = offsets(of_q).cuda(), offsets(of_k).cuda()
    _, lse = fastxattn.varlen_cross_attention(q, k, k, cu_q, cu_k, return_lse=True)
    ways: Ways = {
        "fastxattn triton": lambda: importance.key_importance(q, k, lse, cu_q, cu_k, backend="triton"),
        "attention's forward": lambda: fastxattn.varlen_cross_attention(q, k, k, cu_q, cu_k),
    }
    if min(of_q) == max(of_q) and min(of_k) == max(of_k):
        dense = [x.unflatten(0, (len(of_q), -1)).transpose(1, 2) for x in (q, k)]
        ways["softmax and sum"] = lambda: (dense[0] @ dense[1].mT / 8).float().softmax(-1).sum((1, 2))

    def exact() -> Sequence[Tensor]:
        return [importance.key_importance(q.double(), k.double(), lse.double(), cu_q, cu_k, backend="reference")]

    flops = 2.0 * sum(m * n for m, n in zip(of_q, of_k, strict=True)) * 16 * 64
    return workload(ways, exact, 1e-2, flops, nbytes(q, k))


def co_attention(shape: str) -> Workload:
    of_a, of_b = SHAPES[shape]
    a, b = (tokens(of, torch.bfloat16).requires_grad_() for of in (of_a, of_b))
    cu_a, cu_b = offsets(of_a).cuda(), offsets(of_b).cuda()
    grads = torch.randn_like(a), torch.randn_like(b)
    shipped = ONE_PASS["triton"]

    def step(pays: bool) -> Callable[[], object]:
        def run() -> object:
            ONE_PASS["triton"] = lambda problem: pays
            try:
                outs = fastxattn.co_attention(a, b, a, b, cu_a, cu_b, backend="triton")
                return torch.autograd.grad(outs, (a, b), grads)
            finally:
                ONE_PASS["triton"] = shipped

        return run

    def exact() -> Sequence[Tensor]:
        leaves = [t.detach().double().requires_grad_() for t in (a, b)]
        outs = fastxattn.co_attention(*leaves, *leaves, cu_a, cu_b, backend="reference")
        return torch.autograd.grad(outs, leaves, [g.double() for g in grads])

    flops = 20.0 * sum(m * n for m, n in zip(of_a, of_b, strict=True)) * 16 * 64
    ways = {"fastxattn one pass": step(True), "two calls of attention": step(False)}
    return workload(ways, exact, 2e-2, flops)


def contrastive(loss: str, n: int, d: int, dtype: torch.dtype) -> Workload:
    """Forward and every gradient; the rivals are the formulas as open_clip writes them."""
    a, b = (F.normalize(torch.randn(n, d, device="cuda"), dim=1) for _ in range(2))
    a, b = (t.to(dtype).requires_grad_() for t in (a, F.normalize(a + 2 * b, dim=1)))
    scale, bias = torch.tensor(14.3, device="cuda", requires_grad=True), torch.tensor(-10.0, device="cuda")
    leaves = a, b, scale

    def ours(name: str, leaves: Sequence[Tensor] = leaves) -> Callable[[], object]:
        x, y, s = leaves
        if loss == "infonce":
            return lambda: torch.autograd.grad(infonce_loss(x, y, s, backend=name), leaves)
        return lambda: torch.autograd.grad(sigmoid_loss(x, y, s, bias.to(s), backend=name), leaves)

    formula = {"infonce": eager_clip, "sigmoid": eager_siglip}[loss]

    def eager() -> object:
        return torch.autograd.grad(formula(a, b, scale.to(dtype), bias.to(dtype)), leaves)

    def exact() -> Sequence[Tensor]:
        wide = [t.detach().double().requires_grad_() for t in leaves]
        return tensors(ours("reference", wide)())

    products = 8.0 if loss == "infonce" else 6.0
    ways: Ways = {f"fastxattn {name}": ours(name) for name in backends()}
    limit = {torch.float32: 2e-5}.get(dtype, 5e-3)
    return workload(ways | {"open_clip's formula": eager}, exact, limit, products * n * n * d)


def late_interaction(sets: int, tokens_a: int, tokens_b: int, d: int, dtype: torch.dtype) -> Workload:
    a, b = (
        F.normalize(torch.randn(sets * t, d, device="cuda"), dim=1).to(dtype).requires_grad_()
        for t in (tokens_a, tokens_b)
    )
    cu_a, cu_b = (offsets([t] * sets).cuda() for t in (tokens_a, tokens_b))
    grad = torch.randn(2, sets, sets, device="cuda")

    def ours(name: str) -> Callable[[], object]:
        def run() -> object:
            return torch.autograd.grad(maxsim(a, b, cu_a, cu_b, direction="both", backend=name), (a, b), list(grad))

        return run

    def eager() -> object:
        similarity = torch.einsum("nid,mjd->nmij", a.view(sets, tokens_a, d), b.view(sets, tokens_b, d))
        found = similarity.max(3).values.float().sum(2), similarity.max(2).values.float().sum(2)
        return torch.autograd.grad(found, (a, b), list(grad))

    def exact() -> Sequence[Tensor]:
        leaves = [t.detach().double().requires_grad_() for t in (a, b)]
        scores = maxsim(*leaves, cu_a, cu_b, direction="both", backend="reference")
        return torch.autograd.grad(scores, leaves, list(grad.double()))

    ways: Ways = {f"fastxattn {name}": ours(name) for name in backends()}
    # A tie within rounding sends a gradient elsewhere, in either implementation.
    limit = 1e-3 if dtype == torch.float32 else 2e-2
    return workload(ways | {"einsum + max": eager}, exact, limit, 2.0 * sets * sets * tokens_a * tokens_b * d)


def retrieval(rows: int, d: int, queries: int, k: int, dtype: torch.dtype) -> Workload:
    corpus, query = torch.randn(rows, d, device="cuda").to(dtype), torch.randn(queries, d, device="cuda").to(dtype)

    def exact() -> Sequence[Tensor]:
        return [(query.double() @ corpus.double().T).topk(k).values]

    ways: Ways = {
        "fastxattn triton": lambda: topk_similarity(query, corpus, k, backend="triton")[0],
        "matmul + topk": lambda: (query @ corpus.T).topk(k),
    }
    return workload(ways, exact, 1e-5, 2.0 * rows * d * queries, nbytes(corpus, query))


def pruning(batch: int, length: int, width: int, keep: int, dtype: torch.dtype) -> Workload:
    """Selecting by score, and the rows kept."""
    x, scores = torch.randn(batch, length, width, device="cuda").to(dtype), torch.rand(batch, length, device="cuda")
    cu = offsets([length] * batch).cuda()

    def ours(name: str) -> Callable[[], object]:
        return lambda: prune_tokens(
            x.view(-1, width), scores.view(-1), cu, Budget.count(keep), max_seqlen=length, backend=name
        )[0]

    def eager() -> Tensor:
        index = scores.topk(keep, dim=1).indices.sort(dim=1).values
        return x.gather(1, index[..., None].expand(-1, -1, width)).flatten(0, 1)

    ways: Ways = {f"fastxattn {name}": ours(name) for name in backends()}
    moved = nbytes(scores) + 2.0 * batch * keep * nbytes(x[0, 0])
    return workload(ways | {"topk + gather": eager}, lambda: [eager()], 0.0, moved=moved)


def q_former(batch: int, dtype: torch.dtype, backward: bool) -> Workload:
    """BLIP-2's Q-Former on image features of 64 to 1024 tokens, padded, as Transformers runs it and accelerated."""
    import transformers as hf

    config = hf.Blip2QFormerConfig(encoder_hidden_size=1408)
    torch.manual_seed(0)
    original = hf.Blip2QFormerModel(config).eval().to("cuda", dtype)
    swapped = copy.deepcopy(original)
    fastxattn.accelerate(swapped)
    lengths = ragged(64, 1024, batch, 1)
    mask = torch.arange(1024, device="cuda") < torch.tensor(lengths, device="cuda")[:, None]
    queries = torch.randn(1, 32, 768, device="cuda").to(dtype).expand(batch, -1, -1).requires_grad_(backward)
    states = torch.randn(batch, 1024, 1408, device="cuda").to(dtype).requires_grad_(backward)

    grad = torch.randn(batch, 32, 768, device="cuda")

    def run(model: torch.nn.Module, queries: Tensor = queries, states: Tensor = states) -> Callable[[], object]:
        def call() -> object:
            with torch.set_grad_enabled(backward):
                out = model(query_embeds=queries, encoder_hidden_states=states, encoder_attention_mask=mask.long())[0]
                return torch.autograd.grad(out, (queries, states), grad.to(out)) if backward else out

        return call

    def exact() -> Sequence[Tensor]:
        wide = [t.detach().double().requires_grad_(backward) for t in (queries, states)]
        return tensors(run(copy.deepcopy(original).double(), *wide)())

    limit = {torch.float32: 1e-4}.get(dtype, 3e-2)
    return workload({"fastxattn": run(swapped), "transformers": run(original)}, exact, limit)


def cases() -> Iterator[Case]:
    """Every case. Those of attention come first: what they say decides which backend ``auto`` tries first."""

    def case(op: str, name: str, dtype: torch.dtype, build: Callable[[], Workload], backward: bool = False) -> Case:
        return Case(op, name, "forward+backward" if backward else "forward", dtype, build, "cuda")

    for backward in (False, True):
        for shape in SHAPES:
            for dtype in (*HALVES, torch.float32):
                yield case("attention", shape, dtype, lambda s=shape, t=dtype, b=backward: attention(s, t, b), backward)
    for shape in SHAPES:
        yield case("importance", shape, torch.bfloat16, lambda s=shape: key_importance(s))
        yield case("co_attention", shape, torch.bfloat16, lambda s=shape: co_attention(s), True)
    for loss in ("infonce", "sigmoid"):
        for n, dtype in ((8192, torch.bfloat16), (8192, torch.float32), (16384, torch.bfloat16)):
            name = f"{loss} N={n}, D=768"
            yield case("contrastive", name, dtype, lambda o=loss, n=n, t=dtype: contrastive(o, n, 768, t), True)
    for dtype in (torch.bfloat16, torch.float32):
        yield case(
            "late_interaction",
            "128 x 128 sets of 32 x 196, D=128",
            dtype,
            lambda t=dtype: late_interaction(128, 32, 196, 128, t),
            True,
        )
        yield case(
            "pruning", "select and gather 144 of 576, 64 x 4096", dtype, lambda t=dtype: pruning(64, 576, 4096, 144, t)
        )
    for backward in (False, True):
        for dtype in (torch.bfloat16, torch.float32):
            yield case(
                "model",
                "BLIP-2 Q-Former, 64 images of 64 to 1024 tokens",
                dtype,
                lambda t=dtype, b=backward: q_former(64, t, b),
                backward,
            )
    for queries in (1, 64):
        yield case(
            "retrieval",
            f"top-10 of 1000000 x 256, {queries} queries",
            torch.float32,
            lambda n=queries: retrieval(1_000_000, 256, n, 10, torch.float32),
        )
