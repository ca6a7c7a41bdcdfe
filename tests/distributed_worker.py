"""One rank of the distributed tests: ``python distributed_worker.py SCENARIO RANK WORLD STORE_FILE``."""

from __future__ import annotations

import datetime
import os
import sys
import time

import pytest
import torch
import torch.distributed as dist

import fastxattn.distributed as fxd
from fastxattn.ops import contrastive
from fastxattn.ops.attention import varlen_cross_attention

COUNTS = {1: [9], 2: [5, 8], 3: [70, 0, 4], 4: [3, 6, 0, 9]}


def check(name: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-5) -> None:
    error = (actual - expected).abs().max().item() if actual.numel() else 0.0
    assert actual.shape == expected.shape, (name, actual.shape, expected.shape)
    assert error <= tolerance * max(1.0, expected.abs().max().item() if expected.numel() else 0.0), (name, error)


def mean_over_ranks(gradient: torch.Tensor) -> torch.Tensor:
    """What DistributedDataParallel does to a parameter's gradient."""
    total = gradient.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def losses(rank: int, world: int) -> None:
    counts = COUNTS[world]
    generator = torch.Generator().manual_seed(0)
    n, d = sum(counts), 12
    x, y = torch.randn(n, 7, generator=generator), torch.randn(n, 7, generator=generator)
    weight_a, weight_b = (torch.randn(7, d, generator=generator) / 4 for _ in range(2))
    ids = torch.randint(-1, 5, (n,), generator=generator)
    rows = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    several = fxd.multi_positive_infonce_loss, contrastive.multi_positive_infonce_loss
    cases = [
        ("infonce", fxd.infonce_loss, contrastive.infonce_loss, {}, {}),
        ("ring", fxd.infonce_loss, contrastive.infonce_loss, {"strategy": "ring"}, {}),
        ("one way", fxd.infonce_loss, contrastive.infonce_loss, {"symmetric": False}, {"symmetric": False}),
        ("smooth", fxd.infonce_loss, contrastive.infonce_loss, {"label_smoothing": 0.1}, {"label_smoothing": 0.1}),
        ("unit", fxd.infonce_loss, contrastive.infonce_loss, {"normalize": True}, {"normalize": True}),
        ("groups", *several, {"groups": (ids[rows], ids[rows])}, {"groups": ids}),
        (
            "smooth groups in a ring",
            *several,
            {"groups": (ids[rows], ids[rows]), "label_smoothing": 0.1, "strategy": "ring", "normalize": True},
            {"groups": ids, "label_smoothing": 0.1, "normalize": True},
        ),
        (
            "one way, smooth ring",
            fxd.infonce_loss,
            contrastive.infonce_loss,
            {"symmetric": False, "strategy": "ring", "label_smoothing": 0.3},
            {"symmetric": False, "label_smoothing": 0.3},
        ),
        (
            "sigmoid groups in a ring",
            fxd.sigmoid_loss,
            contrastive.sigmoid_loss,
            {"groups": (ids[rows].int(), ids[rows].int()), "strategy": "ring"},
            {"groups": ids},
        ),
        ("sigmoid", fxd.sigmoid_loss, contrastive.sigmoid_loss, {}, {}),
        ("sigmoid ring", fxd.sigmoid_loss, contrastive.sigmoid_loss, {"strategy": "ring"}, {}),
        (
            "sigmoid groups",
            fxd.sigmoid_loss,
            contrastive.sigmoid_loss,
            {"groups": (ids[rows], ids[rows])},
            {"groups": ids},
        ),
    ]
    for name, spread, whole, options, whole_options in cases:
        # Linear encoders stand for a model under DDP: their parameters' mean gradient is what must be right.
        parameters = [weight_a, weight_b, torch.tensor(4.0), torch.tensor(-1.0)][: 4 if "sigmoid" in name else 3]
        leaves = [p.clone().requires_grad_() for p in parameters]
        loss = spread(x[rows] @ leaves[0], y[rows] @ leaves[1], *leaves[2:], **options)
        gradients = torch.autograd.grad(loss, leaves)
        truth = [p.clone().requires_grad_() for p in parameters]
        expected = whole(x @ truth[0], y @ truth[1], *truth[2:], **whole_options)
        check(f"{name}: loss", loss.detach(), expected.detach())
        for index, (g, e) in enumerate(zip(gradients, torch.autograd.grad(expected, truth), strict=True)):
            check(f"{name}: gradient {index}", mean_over_ranks(g), e)


def subgroup(rank: int, world: int) -> None:
    group = dist.new_group([0, 1])
    if rank > 1:
        return
    a = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    own = a[4 * rank : 4 * rank + 4]
    check("subgroup", fxd.infonce_loss(own, own, 3.0, group=group), contrastive.infonce_loss(a, a, 3.0))


def cached(rank: int, world: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(6 * world, 7, generator=generator)[6 * rank : 6 * rank + 6] for _ in range(2))
    results = []
    for chunk in (None, 4):
        torch.manual_seed(1)
        encoders = [
            torch.nn.Sequential(torch.nn.Linear(7, 9), torch.nn.Tanh(), torch.nn.Linear(9, 5)) for _ in range(2)
        ]
        scale = torch.tensor(5.0, requires_grad=True)
        if chunk is None:
            loss = fxd.infonce_loss(encoders[0](x), encoders[1](y), scale)
            loss.backward()
        else:
            loss = fxd.cached_backward(encoders, (x, y), fxd.infonce_loss, chunk=chunk, parameters=(scale,))
        results.append([loss.detach(), scale.grad, *(p.grad for e in encoders for p in e.parameters())])
    for index, (direct, staged) in enumerate(zip(*results, strict=True)):
        check(f"cached {index}", staged, direct)


def attention(rank: int, world: int) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths_k, cu_q = [11, 3, 0, 20], torch.tensor([0, 4, 4 + 5, 12, 18], dtype=torch.int32)
    query = torch.randn(18, 2, 8, generator=generator)
    key, value = (torch.randn(sum(lengths_k), 2, 8, generator=generator) for _ in range(2))
    owner = torch.randint(0, world, (sum(lengths_k),), generator=generator)
    owner[11:14] = 0  # a sample that only one rank holds
    sample = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths_k))
    mine = owner == rank
    here = torch.bincount(sample[mine], minlength=4)
    cu_k = torch.tensor([0, *here.cumsum(0).tolist()], dtype=torch.int32)
    q, k, v = (t.clone().requires_grad_() for t in (query, key[mine], value[mine]))
    out = fxd.context_parallel_attention(q, k, v, cu_q, cu_k)
    weights = torch.linspace(-1, 1, out.numel()).reshape(out.shape)
    gradients = torch.autograd.grad((out * weights).sum(), (q, k, v))
    truth = [t.clone().requires_grad_() for t in (query, key, value)]
    whole_k = torch.tensor([0, *torch.tensor(lengths_k).cumsum(0).tolist()], dtype=torch.int32)
    expected = varlen_cross_attention(*truth, cu_q, whole_k)
    wanted = torch.autograd.grad((expected * weights).sum(), truth)
    check("attention", out, expected)
    for index, (g, e) in enumerate(zip(gradients, (wanted[0], wanted[1][mine], wanted[2][mine]), strict=True)):
        check(f"attention gradient {index}", g, e)


def dying(rank: int, world: int) -> None:
    group = dist.new_group(timeout=datetime.timedelta(seconds=5))
    dist.barrier()
    x = torch.randn(3, 4, requires_grad=True)
    loss = fxd.infonce_loss(x, x, 1.0, group=group)
    if rank == world - 1:
        time.sleep(8)  # stays away from the backward pass, and then leaves without a word
        os._exit(0)
    with pytest.raises(RuntimeError, match=r"summing gradients failed.*another rank left, died, or did not reach"):
        loss.backward()
    with pytest.raises(RuntimeError, match="another rank left, died, or did not reach"):
        fxd.infonce_loss(x, x, 1.0, group=group)
    with pytest.raises(ValueError, match="text_features must have as many rows as image_features"):
        fxd.infonce_loss(x, x[:2], 1.0, group=group)  # its own error, though it can tell nobody


def main() -> None:
    scenario, rank, world, store = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=int(os.environ.get("FASTXATTN_TEST_TIMEOUT", "300")))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timeout)
    if scenario == "dying":
        dying(rank, world)
        # gloo's threads sometimes abort the process at teardown once a peer has vanished; the error is what is tested.
        os._exit(0)
    losses(rank, world)
    cached(rank, world)
    attention(rank, world)
    if world == 4:
        subgroup(rank, world)
    if scenario == "rules":
        import distributed_rules

        distributed_rules.run(rank, world)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
