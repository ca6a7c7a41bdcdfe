"""What distributed calls promise beside their values: no hang, one error on every rank, DDP. Run by a worker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fastxattn.distributed as fxd
from fastxattn.distributed.collectives import GatherRows, GlobalSum, ScatterSum, SumBackward, SumForward
from fastxattn.nn import InfoNCELoss
from fastxattn.ops import contrastive
from fastxattn.ops.attention import varlen_cross_attention

STRATEGIES = ("gather", "ring")
LOSSES = [(fxd.infonce_loss, contrastive.infonce_loss), (fxd.sigmoid_loss, contrastive.sigmoid_loss)]


def close(name: str, actual: Tensor | None, expected: Tensor, tolerance: float = 2e-5) -> None:
    assert actual is not None, name
    error = (actual - expected).abs().max().item() if actual.numel() else 0.0
    assert error <= tolerance * max(1.0, expected.abs().max().item() if expected.numel() else 0.0), (name, error)


def summed(x: Tensor | None, like: Tensor) -> Tensor:
    """The sum over ranks of a gradient, None counting as 0, divided by the ranks as DDP does."""
    total = torch.zeros_like(like) if x is None else x.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def everybody(x: Any) -> list[Any]:
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, x)
    return every


def refused_alike(call: Callable[[], Any], kind: type[Exception], text: str, name: str) -> None:
    with pytest.raises(kind, match=text) as info:
        call()
    assert len(set(everybody(str(info.value)))) == 1, name


def frozen(rank: int, world: int) -> None:
    """Towers frozen on some ranks or on all, ranks without rows, and gradients of one tensor only."""
    n, d = 4 * (world - 1), 6
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, d, generator=generator) for _ in range(2))
    empty = rank == world - 1
    rows = slice(4 * rank, 4 * rank + 4)  # the last rank has none
    cases: list[tuple[str, bool, bool, bool]] = [
        ("an empty rank without a graph", not empty, not empty, not empty),
        ("one tower", True, False, False),
        ("the scale", False, False, True),
        ("another tower on every rank", rank == 0, rank == 1, False),
        ("nothing but on rank 0", False, rank == 0, False),
    ]
    for spread, whole in LOSSES:
        for strategy in STRATEGIES:
            for name, *training in cases:
                label = f"{spread.__name__}, {strategy}, {name}"
                own = [t.clone().requires_grad_(on) for t, on in zip((a[rows], b[rows]), training, strict=False)]
                scale = torch.tensor(3.0, requires_grad=training[2])
                loss = spread(*own, scale, strategy=strategy)
                loss.backward()
                truth = [a.clone().requires_grad_(), b.clone().requires_grad_(), torch.tensor(3.0, requires_grad=True)]
                expected = whole(*truth)
                expected.backward()
                close(label, loss.detach(), expected.detach())
                for x, on, t in zip(own, training, truth, strict=False):
                    if on:
                        close(label, x.grad / world, t.grad[rows])
                    assert on or x.grad is None, label
                if any(everybody(training[2])):
                    close(label, summed(scale.grad, scale), truth[2].grad)
            with torch.no_grad():
                x = a[rows].clone().requires_grad_()
                assert not spread(x, x, 3.0, strategy=strategy).requires_grad
            assert not spread(a[rows], b[rows], 3.0, strategy=strategy).requires_grad
            # Ranks that ask for the gradients of different tensors.
            leaves = [*(t[rows].clone().requires_grad_() for t in (a, b)), torch.tensor(3.0, requires_grad=True)]
            loss = spread(*leaves, strategy=strategy)
            (gradient,) = torch.autograd.grad(loss, leaves[rank % 3])
            assert bool(gradient.isfinite().all())


def disagreements(rank: int, world: int) -> None:
    last = rank == world - 1
    a, ids = torch.randn(4, 6), torch.arange(4)
    wrong: list[tuple[str, Callable[..., Any], dict[str, Any]]] = [
        ("number of features", lambda: a[:, : 6 - last], {}),
        ("the dtype of the features", lambda: a.bfloat16() if last else a, {}),
        ("groups", lambda: a, {"groups": ids if last else None}),
        ("strategy", lambda: a, {"strategy": "ring" if last else "gather"}),
        ("symmetric", lambda: a, {"symmetric": last}),
        ("normalize", lambda: a, {"normalize": last}),
        ("label_smoothing", lambda: a, {"label_smoothing": 0.1 * last}),
    ]
    for name, features, options in wrong:
        x = features()
        loss = fxd.sigmoid_loss if name == "groups" else fxd.infonce_loss
        refused_alike(lambda x=x, o=options, f=loss: f(x, x, 1.0, **o), ValueError, f"disagree on.*{name}", name)
    refused_alike(
        lambda: fxd.sigmoid_loss(a, a, 1.0) if last else fxd.infonce_loss(a, a, 1.0),
        ValueError,
        "disagree on the function called: rank 0 has infonce_loss, rank [12] has sigmoid_loss",
        "function",
    )
    scale = torch.tensor(1.0, requires_grad=True)
    with torch.set_grad_enabled(not last):
        refused_alike(lambda: fxd.infonce_loss(a, a, scale), ValueError, "is_grad_enabled", "grad mode")
    # An error on one rank reaches the others at once.
    refused: list[tuple[Any, dict[str, Any]]] = [
        *((bad, {}) for bad in (a[0], a[:, :0], "a", torch.zeros(4, 6, dtype=torch.int64), a.to("meta"))),
        *((a, {"backend": name, "strategy": s}) for name in ("nonsense", "cuda") for s in STRATEGIES),
        (a, {"symmetric": torch.ones(2)}),
    ]
    for bad, options in refused:
        with pytest.raises((ValueError, TypeError, RuntimeError) if last else RuntimeError) as info:
            fxd.infonce_loss(bad if last else a, a, 1.0, **(options if last else {}))
        assert ("refused its arguments" in str(info.value)) != last, str(info.value)
        assert last or f"rank {world - 1} refused" in str(info.value), str(info.value)
    close("after all errors", fxd.infonce_loss(a, a, 1.0), fxd.infonce_loss(a, a, 1.0, strategy="ring"))


def dtypes(rank: int, world: int) -> None:
    """One rule for one process and many."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3 * world, 8, generator=generator) for _ in range(2))
    rows = slice(3 * rank, 3 * rank + 3)
    for spread, whole in LOSSES:
        for strategy in STRATEGIES:
            for scale in (torch.tensor(2.0).double(), torch.tensor([2.0]), torch.tensor(2.0).bfloat16(), 2):
                for dtype in (torch.float32, torch.bfloat16):
                    x = [t.to(dtype).requires_grad_() for t in (a[rows], b[rows])]
                    s = scale.clone().requires_grad_() if isinstance(scale, Tensor) else scale
                    loss = spread(*x, s, strategy=strategy)
                    loss.backward()
                    assert loss.dtype == torch.float32 and x[0].grad.dtype == dtype
                    close("value", loss.detach(), whole(a.to(dtype), b.to(dtype), 2.0))
                    if isinstance(s, Tensor):
                        assert s.grad.dtype == s.dtype and s.grad.shape == s.shape and bool(s.grad != 0)
            with torch.autocast("cpu", torch.bfloat16):
                loss = spread(a[rows], b[rows].bfloat16(), 2.0, strategy=strategy)
                close("autocast", loss, whole(a, b, 2.0), 1e-4)
                unit = spread(a[rows], b[rows], 2.0, strategy=strategy, normalize=True)
                close("autocast, unit length", unit, whole(a, b, 2.0, normalize=True), 1e-4)
        x, y = (t.double().requires_grad_() for t in (a[rows], b[rows]))
        with torch.autocast("cpu", torch.bfloat16):
            loss = spread(x, y, torch.tensor(2.0).double())
        gradients = torch.autograd.grad(loss, (x, y))
        truth = [t.double().requires_grad_() for t in (a, b)]
        for g, e in zip(gradients, torch.autograd.grad(whole(*truth, 2.0), truth), strict=True):
            close("float64", g / world, e[rows], 1e-12)
        refused_alike(lambda f=spread: f(a.double(), b.double(), 1.0, strategy="ring"), RuntimeError, "gather", "ring")
    ids = torch.arange(3) + 3 * (rank // 2)
    close(
        "groups as one tensor",
        fxd.multi_positive_infonce_loss(a[rows], b[rows], 2.0, groups=ids),
        fxd.multi_positive_infonce_loss(a[rows], b[rows], 2.0, groups=[ids.int(), ids], strategy="ring"),
    )
    loss = fxd.multi_positive_infonce_loss
    refused_alike(lambda: loss(a[rows], a[rows], 1.0, groups=[1, 2, 3]), ValueError, "groups", "groups")
    for smoothing in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="label_smoothing"):
            fxd.infonce_loss(a[rows], a[rows], 1.0, label_smoothing=smoothing, strategy="ring")


def derivatives(rank: int, world: int) -> None:
    """The linear collectives have second derivatives, the ring refuses them; checkpoints see one unpacking."""
    x = torch.randn(rank + 1, 3, dtype=torch.float64, requires_grad=True)
    counts = list(range(1, world + 1))
    _, every = GatherRows.apply(counts, None, [0], [0], x)
    (g,) = torch.autograd.grad((every**3).sum(), x, create_graph=True)
    close("gather", g, 3 * world * x.detach() ** 2, 1e-12)
    # Of sum_i g_i^2 / 2 of every rank's rows, each rank differentiates its own: W times the Hessian times g.
    (gg,) = torch.autograd.grad((g**2).sum() / 2, x)
    close("gather twice", gg, world * 6 * x.detach() * g.detach(), 1e-12)
    ones = torch.ones(sum(counts), 2, dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad((ScatterSum.apply(ones, counts, None) ** 2).sum(), ones)
    close("scatter", g, 2 * world * torch.ones_like(g), 1e-12)
    y = torch.full((2,), 1.0 + rank, dtype=torch.float64, requires_grad=True)
    for function, factor in ((GlobalSum, world), (SumForward, 1)):
        (g,) = torch.autograd.grad((function.apply(y, None) ** 2).sum(), y, create_graph=True)
        close("sum", g, factor * world * (world + 1) * torch.ones(2), 1e-12)
        assert g.requires_grad
    (z,) = SumBackward.apply(None, True, torch.full((2,), 2.0, dtype=torch.float64, requires_grad=True))
    (g,) = torch.autograd.grad((z**3).sum(), z, create_graph=True)
    assert torch.autograd.grad(g.sum(), z)[0].tolist() == [12.0, 12.0]
    a = torch.randn(3, 6)
    for spread, _ in LOSSES:
        x = a.clone().requires_grad_()
        (g,) = torch.autograd.grad(spread(x, x, 2.0, strategy="ring"), x, create_graph=True)
        with pytest.raises(RuntimeError):
            g.sum().backward()
        with torch.autograd.forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError)):
            spread(torch.autograd.forward_ad.make_dual(a, a), a, 2.0, strategy="ring")
        dist.barrier()
        for strategy in STRATEGIES:
            plain, kept = a.clone().requires_grad_(), a.clone().requires_grad_()
            spread(plain, plain, 2.0, strategy=strategy).backward()
            checkpoint(lambda t, f=spread, s=strategy: f(t, t, 2.0, strategy=s), kept, use_reentrant=False).backward()
            close("checkpoint", kept.grad, plain.grad)


class Towers(nn.Module):
    """Two towers, scale and bias, as a CLIP model has them; given one input, only its tower runs."""

    def __init__(self, bias: bool = True, freeze: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.image, self.text = (nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 5)) for _ in range(2))
        self.logit_scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        self.logit_bias = nn.Parameter(torch.tensor(-2.0)) if bias else None
        self.image.requires_grad_(not freeze)

    def forward(self, image: Tensor | None = None, text: Tensor | None = None) -> Any:
        if image is not None and text is not None:
            return self.image(image), self.text(text), self.logit_scale.exp(), self.logit_bias
        return self.image(image) if text is None else self.text(text)


def unused_bias(rank: int, world: int) -> None:
    model = DistributedDataParallel(Towers())
    loss = InfoNCELoss(rank=rank, world_size=world)
    for _ in range(3):
        model.zero_grad()
        loss(*model(torch.randn(3, 7), torch.randn(3, 7))).backward()
    assert model.module.logit_bias.grad.item() == 0.0


def counted(module: DistributedDataParallel, calls: list[int]) -> DistributedDataParallel:
    def hook(state, bucket):  # DDP reads annotations, and finds strings
        calls.append(1)
        future = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True).get_future()
        return future.then(lambda f: f.value()[0])

    module.register_comm_hook(None, hook)
    return module


def cached(rank: int, world: int) -> None:
    """DDP inside ``cached_backward``: one reduction a step, whatever the ranks' numbers of chunks."""
    sizes = [10, 3, 0][:world]
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(sum(sizes), 7, generator=generator) for _ in range(2))
    rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))

    def check(name: str, model: Towers, freeze: bool) -> None:
        truth = Towers(bias=False, freeze=freeze)
        a, b, scale, _ = truth(x, y)
        contrastive.infonce_loss(a, b, scale.float()).backward()
        for (label, p), q in zip(model.named_parameters(), truth.parameters(), strict=True):
            if q.grad is None:
                assert p.grad is None, (name, label)
            else:
                close(f"{name}: {label}", p.grad, q.grad)

    def loss(a: Tensor, b: Tensor, log_scale: Tensor) -> Tensor:
        return fxd.infonce_loss(a, b, log_scale.exp())

    for freeze in (False, True):
        for name in ("a module each", "one module for both", "the frozen one last"):
            model, calls = Towers(bias=False, freeze=freeze), []
            scale, inputs, one = model.logit_scale, (x[rows], {"text": y[rows]}), name != "a module each"
            if one:
                ddp = counted(DistributedDataParallel(model, find_unused_parameters=True), calls)
                encoders = [lambda t, m=ddp: m(image=t), lambda d, m=ddp: m(**d)]
            else:
                image = model.image if freeze else counted(DistributedDataParallel(model.image), calls)
                text = counted(DistributedDataParallel(model.text), calls)
                # A function that sees both modules and calls one.
                encoders = [lambda t, m=image, _=text: m(t), lambda d, m=text, _=image: m(d["text"])]
            final = loss
            if name == "the frozen one last":
                encoders, inputs = encoders[::-1], inputs[::-1]

                def final(b: Tensor, a: Tensor, log_scale: Tensor) -> Tensor:
                    return loss(a, b, log_scale)

            steps = 3
            for _ in range(steps):
                for p in model.parameters():
                    p.grad = None
                calls.clear()
                fxd.cached_backward(encoders, inputs, final, chunk=4, parameters=(scale,))
                # One bucket per module and dtype: the scale is float64.
                expected = 1 if freeze and not one else 2
                assert len(calls) == expected, (name, freeze, len(calls))
                if not one:
                    scale.grad = summed(scale.grad, scale)
                check(f"{name}, frozen {freeze}", model, freeze)


def cached_detached(rank: int, world: int) -> None:
    """The last encoder that calls a module detaches its output: the module's gradients are reduced before it."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(5 * world, 7, generator=generator) for _ in range(2))
    weights = [torch.randn(*shape, generator=generator) for shape in ((6, 7), (6, 6))]
    body, head, true_body, true_head = (nn.Linear(w.shape[1], 6, bias=False) for w in (*weights, *weights))
    for layer, weight in zip((body, head, true_body, true_head), (*weights, *weights), strict=True):
        layer.weight.data.copy_(weight)
    spread_body, spread_head = DistributedDataParallel(body), DistributedDataParallel(head)
    encoders = [lambda t: spread_body(t), lambda t: spread_head(spread_body(t).detach())]
    rows = slice(5 * rank, 5 * rank + 5)
    fxd.cached_backward(encoders, (x[rows], y[rows]), lambda a, b: fxd.infonce_loss(a, b, 1.0), chunk=2)
    contrastive.infonce_loss(true_body(x), true_head(true_body(y).detach()), 1.0).backward()
    close("body", body.weight.grad, true_body.weight.grad)
    close("head", head.weight.grad, true_head.weight.grad)


def sharded(rank: int, world: int) -> None:
    """FSDP gathers parameters for every chunk and reduces gradients once."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(6 * world, 7, generator=generator) for _ in range(2))
    rows = slice(6 * rank, 6 * rank + 6)
    model, truth = Towers(bias=False), Towers(bias=False)
    mesh, switched = init_device_mesh("cpu", (world,)), []
    for tower in (model.image, model.text):
        fully_shard(tower, mesh=mesh)
        switch = tower.set_requires_gradient_sync
        tower.set_requires_gradient_sync = lambda on, s=switch: (switched.append(on), s(on))
    chunks = fxd.cached_backward(
        (model.image, model.text), (x[rows], y[rows]), lambda a, b: fxd.infonce_loss(a, b, 3.0), chunk=2
    )
    assert bool(chunks.isfinite()) and switched.count(False) == switched.count(True) == 2 * 2 + 2, switched
    contrastive.infonce_loss(truth.image(x), truth.text(y), 3.0).backward()
    for (name, p), q in zip(model.named_parameters(), truth.parameters(), strict=True):
        if q.grad is not None:
            close(name, p.grad.full_tensor(), q.grad)
    said = r"image_features must be a plain tensor; got a DTensor: pass image_features.to_local\(\)"
    with pytest.raises(TypeError, match=said):
        fxd.infonce_loss(next(model.image.parameters()), x[rows], 1.0)


def attention(rank: int, world: int) -> None:
    generator = torch.Generator().manual_seed(0)
    cu_q, cu_k = (torch.tensor(c, dtype=torch.int32) for c in ([0, 2, 5], [0, 4, 9]))
    query, key, value = (torch.randn(n, 2, 8, generator=generator) for n in (5, 9, 9))
    none = torch.zeros(3, dtype=torch.int32)
    own = rank == 0  # rank 0 holds every key, the others none, without a graph
    q = query.clone().requires_grad_(own)
    k, v = ((t if own else t[:0]).clone().requires_grad_(own) for t in (key, value))
    out = fxd.context_parallel_attention(q, k, v, cu_q, cu_k if own else none)
    out.square().sum().backward()
    truth = [t.clone().requires_grad_() for t in (query, key, value)]
    expected = varlen_cross_attention(*truth, cu_q, cu_k)
    expected.square().sum().backward()
    close("attention", out.detach(), expected.detach())
    for x, t in zip((q, k, v), truth, strict=True):
        if own:
            close("attention's gradient", x.grad, t.grad)
        else:
            assert x.grad is None
    last = rank == world - 1
    short = torch.tensor([0, 2, 5 - last], dtype=torch.int32)
    refused_alike(
        lambda: fxd.context_parallel_attention(query[: 5 - last], key, value, short, cu_k),
        ValueError,
        "disagree on the tokens of query: rank 0 has 5",
        "query",
    )
    with pytest.raises(ValueError if last else RuntimeError, match="key" if last else f"rank {world - 1} refused"):
        fxd.context_parallel_attention(query, key[:, :, : 8 - last], value, cu_q, cu_k)
    half = [t.bfloat16() for t in (query, key, value)]
    with torch.autocast("cpu", torch.bfloat16):
        assert fxd.context_parallel_attention(query, key, value, cu_q, cu_k).dtype == torch.bfloat16
    assert fxd.context_parallel_attention(*half, cu_q, cu_k).dtype == torch.bfloat16


def run(rank: int, world: int) -> None:
    for scenario in (
        frozen,
        disagreements,
        dtypes,
        derivatives,
        unused_bias,
        cached,
        cached_detached,
        sharded,
        attention,
    ):
        scenario(rank, world)
        dist.barrier()
