"""Losses, staged training and attention over 1 to 4 real processes on gloo, and over one that dies."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import UserDict, namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastxattn
from fastxattn import distributed
from fastxattn.nn import InfoNCELoss
from fastxattn.runtime import native

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
WORKER = Path(__file__).parent / "distributed_worker.py"


def launch(scenario: str, world: int, store: Path, limit: float) -> list[tuple[int, str]]:
    path = os.pathsep.join([str(Path(fastxattn.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), scenario, str(rank), str(world), str(store)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    end, results = time.monotonic() + limit, []
    try:
        for process in ranks:
            output, _ = process.communicate(timeout=max(1.0, end - time.monotonic()))
            results.append((process.returncode, output))
    finally:
        for process in ranks:
            process.kill()
    return results


@pytest.mark.skipif(native.cpu_library().library is None, reason="the ring needs the CPU kernels")
@pytest.mark.parametrize(("world", "scenario"), [(1, "all"), (2, "rules"), (3, "rules"), (4, "all")])
def test_every_rank_agrees_with_one_process(world, scenario, tmp_path):
    """And, as ``rules``: no rank hangs, and all ranks raise the same errors."""
    for rank, (code, output) in enumerate(launch(scenario, world, tmp_path / "store", 600)):
        assert code == 0, f"rank {rank}:\n{output[-3000:]}"


def test_a_dying_rank_is_an_error_and_not_a_hang(tmp_path):
    for rank, (code, output) in enumerate(launch("dying", 3, tmp_path / "store", 600)):
        assert code == 0, f"rank {rank}:\n{output[-3000:]}"


def test_without_process_group_it_is_the_plain_loss():
    a, b = torch.randn(6, 8), torch.randn(6, 8)
    from fastxattn.ops.contrastive import infonce_loss, sigmoid_loss

    assert torch.equal(distributed.infonce_loss(a, b, 2.0, strategy="ring"), infonce_loss(a, b, 2.0))
    assert torch.equal(distributed.sigmoid_loss(a, b, 2.0, -1.0), sigmoid_loss(a, b, 2.0, -1.0))


def test_bad_input():
    a = torch.zeros(4, 8)
    with pytest.raises(ValueError, match="text_features must have as many rows"):
        distributed.infonce_loss(a, torch.zeros(5, 8), 1.0)
    with pytest.raises(ValueError, match="strategy must be one of"):
        distributed.infonce_loss(a, a, 1.0, strategy="star")


def towers(dropout: float = 0.0) -> list[nn.Module]:
    torch.manual_seed(0)
    return [
        nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 5), nn.Dropout(dropout))
        for _ in range(2)
    ]


def gradients(modules: list[nn.Module]) -> list[torch.Tensor | None]:
    return [p.grad for m in modules for p in m.parameters()]


def plain_loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return fastxattn.infonce_loss(a, b, 5.0)


class Fields(UserDict):
    """As transformers' BatchEncoding: a mapping that is no dict, with attributes."""

    def __getattr__(self, name: str) -> Any:
        return self.data[name] if "data" in self.__dict__ else None


Pair = namedtuple("Pair", "x mask")
CONTAINERS = {
    "dict": (lambda t: {"x": t}, lambda d: d["x"]),
    "keywords": (lambda t: {"x": t, "training": None, "n": 3}, lambda d: d["x"]),
    "encoding": (lambda t: Fields(x=t, mask=torch.ones(8)), lambda d: d.x * d.mask[:, None]),
    "tuple": (lambda t: (t, torch.arange(8)), lambda d: d[0] + 0 * d[1][:, None]),
    "named tuple": (lambda t: Pair(t, torch.tensor(1.0)), lambda d: d.x * d.mask),
    "nested": (lambda t: [{"a": (t, None)}, "caption"], lambda d: d[0]["a"][0]),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_cached_backward_splits_any_container(kind):
    pack, unpack = CONTAINERS[kind]
    x, y = torch.randn(8, 6), torch.randn(8, 6)
    direct, staged = towers(), towers()
    plain_loss(direct[0](x), direct[1](y)).backward()
    distributed.cached_backward((staged[0], lambda d: staged[1](unpack(d))), (x, pack(y)), plain_loss, chunk=3)
    for g, e in zip(gradients(staged), gradients(direct), strict=True):
        torch.testing.assert_close(g, e)


def test_cached_backward_of_parameters_that_share_a_graph():
    x, y = torch.randn(8, 6), torch.randn(8, 6)
    results = []
    for staged in (False, True):
        (image, text), log_scale = towers(), torch.tensor(1.0, requires_grad=True)
        scale = log_scale.exp()
        if staged:
            distributed.cached_backward(
                (image, text), (x, y), distributed.sigmoid_loss, chunk=3, parameters=(scale, -2 * scale)
            )
        else:
            distributed.sigmoid_loss(image(x), text(y), scale, -2 * scale).backward()
        results.append([log_scale.grad, *gradients([image, text])])
    for g, e in zip(*results, strict=True):
        torch.testing.assert_close(g, e)


def test_cached_backward_passes_any_container_to_the_loss():
    x, y = torch.randn(8, 6), torch.randn(8, 6)
    direct, staged = towers(), towers()
    plain_loss(direct[0](x), direct[1](y).tanh()).backward()
    value = distributed.cached_backward(
        (lambda t: {"feature": staged[0](t), "n": None}, lambda t: (staged[1](t), torch.arange(len(t)))),
        (x, y),
        lambda a, b: plain_loss(a["feature"], b[0].tanh()) + 0.0 * b[1].sum(),
        chunk=3,
    )
    assert not value.requires_grad
    for g, e in zip(gradients(staged), gradients(direct), strict=True):
        torch.testing.assert_close(g, e)


@pytest.mark.parametrize("autocast", [False, True])
def test_cached_backward_with_a_frozen_tower(autocast):
    x, y = torch.randn(8, 6), torch.randn(8, 6)
    direct, staged, runs = towers(), towers(), []
    for modules in (direct, staged):
        modules[0].requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain_loss(direct[0](x), direct[1](y)).backward()
        frozen = staged[0]
        frozen.register_forward_hook(lambda *_: runs.append(1))
        distributed.cached_backward((frozen, staged[1]), (x, y), plain_loss, chunk=2)
    assert len(runs) == 4 + 1  # after its first chunk it is known to train nothing
    for g, e in zip(gradients(staged), gradients(direct), strict=True):
        assert (g is None) == (e is None)
        if e is not None:
            # A weight's gradient adds up over chunks that are rounded one by one.
            torch.testing.assert_close(g, e, rtol=1e-5, atol=2e-2 * float(e.abs().max()) if autocast else 1e-6)


def test_cached_backward_replays_the_random_state():
    """Dropout drops the same units in both runs, and the generator goes on as if every chunk had run once."""
    x, y = torch.randn(8, 6), torch.randn(8, 6)
    direct, staged = towers(0.3), towers(0.3)
    torch.manual_seed(7)
    outputs = [torch.cat([tower(part) for part in side.split(3)]) for tower, side in zip(direct, (x, y), strict=True)]
    plain_loss(*outputs).backward()
    after = torch.rand(3)
    torch.manual_seed(7)
    distributed.cached_backward(staged, (x, y), plain_loss, chunk=3)
    assert torch.equal(torch.rand(3), after)
    for g, e in zip(gradients(staged), gradients(direct), strict=True):
        torch.testing.assert_close(g, e)


def test_cached_backward_refuses():
    x, tower = torch.randn(8, 6), towers()[0]

    def call(encoder: Any = tower, batch: Any = x, loss: Any = plain_loss, chunk: int = 3) -> None:
        distributed.cached_backward((tower, encoder), (x, batch), loss, chunk=chunk)

    with pytest.raises(ValueError, match="chunk must be at least 1; got 0"):
        call(chunk=0)
    with pytest.raises(ValueError, match=r"inputs must be as many as encoders \(1\); got 2"):
        distributed.cached_backward((tower,), (x, x), plain_loss, chunk=2)
    with pytest.raises(
        ValueError, match=r"inputs\[1\] must hold tensors with one number of rows.*got tensors of 4 and 8"
    ):
        call(batch={"a": x, "b": x[:4]})
    with pytest.raises(ValueError, match=r"inputs\[1\] must hold .* got no tensor"):
        call(batch=["a caption"] * 8)
    with pytest.raises(TypeError, match=r"inputs\[1\]\['a'\]\[0\] must be a tensor, a mapping.*; got object"):
        call(batch={"a": [object()], "b": x})
    with pytest.raises(
        ValueError, match=r"encoders\[1\]'s output must have a row per row of its input, 3; got shape \(\)"
    ):
        call(encoder=lambda t: (tower(t), t.sum()))
    with pytest.raises(
        ValueError, match=r"encoders\[1\]'s output must have a row per row of its input, 3; got shape \(8"
    ):
        call(encoder=lambda d: tower(x))
    with pytest.raises(TypeError, match="loss must give a tensor of one element; got dict"):
        call(loss=lambda a, b: {"loss": plain_loss(a, b)})


@pytest.mark.parametrize("bias", [-10.0, float("inf")])
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"return_metrics": True}])
def test_an_unused_bias_gets_a_gradient_of_zero(bias, options):
    bias = torch.tensor(bias, dtype=torch.float64, requires_grad=True)
    a = torch.randn(4, 8, requires_grad=True)
    result, expected = (InfoNCELoss(**options)(a, a, 2.0, b) for b in (bias, None))
    while isinstance(result, tuple):
        result, expected = result[0], expected[0]
    assert torch.equal(result, expected) and result.dtype == torch.float32
    result.sum().backward()
    assert bias.grad.item() == 0.0 and bool(a.grad.isfinite().all())
