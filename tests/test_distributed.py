"""Losses, staged training and attention over 1 to 4 real processes on gloo, and over one that dies."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import fastxattn
from fastxattn import distributed
from fastxattn.runtime import native

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
WORKER = Path(__file__).parent / "distributed_worker.py"


def launch(scenario: str, world: int, store: Path, limit: float) -> list[tuple[int, str]]:
    path = os.pathsep.join([str(Path(fastxattn.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), scenario, str(rank), str(world), str(store)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
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
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_rank_agrees_with_one_process(world, tmp_path):
    for rank, (code, output) in enumerate(launch("all", world, tmp_path / "store", 600)):
        assert code == 0, f"rank {rank}:\n{output[-3000:]}"


def test_a_dying_rank_is_an_error_and_not_a_hang(tmp_path):
    for rank, (code, output) in enumerate(launch("dying", 3, tmp_path / "store", 120)):
        assert code == 0, f"rank {rank}:\n{output[-3000:]}"


def test_without_process_group_it_is_the_plain_loss():
    a, b = torch.randn(6, 8), torch.randn(6, 8)
    from fastxattn.ops.contrastive import infonce_loss, sigmoid_loss

    assert torch.equal(distributed.infonce_loss(a, b, 2.0, strategy="ring"), infonce_loss(a, b, 2.0))
    assert torch.equal(distributed.sigmoid_loss(a, b, 2.0, -1.0), sigmoid_loss(a, b, 2.0, -1.0))


def test_bad_input():
    a = torch.zeros(4, 8)
    with pytest.raises(ValueError, match="b must have as many rows"):
        distributed.infonce_loss(a, torch.zeros(5, 8), 1.0)
    with pytest.raises(ValueError, match="strategy must be one of"):
        distributed.infonce_loss(a, a, 1.0, strategy="star")
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        distributed.cached_backward([], [], distributed.infonce_loss, chunk=0)
