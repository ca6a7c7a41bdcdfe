"""The tuning cache and the tile tables, without a GPU."""

import json

import pytest
import torch

from fastxattn import tune
from fastxattn.ops.attention.triton import config
from fastxattn.runtime import tuning


@pytest.fixture
def cache(tmp_path, monkeypatch):
    path = tmp_path / "deep/tuning.json"
    monkeypatch.setenv("FASTXATTN_TUNING", str(path))
    tuning._cache.cache_clear()
    yield path
    tuning._cache.cache_clear()


def test_the_fastest_candidate_is_kept_and_read_back(cache):
    seconds = {(64, 64, 4, 2): 3.0, (32, 32, 4, 1): 1.0}

    def measure(tile):
        if tile == (128, 128, 8, 2):
            raise RuntimeError("out of shared memory")
        return seconds[tile]

    best = tuning.tune("attention.forward.plain.64", [(128, 128, 8, 2), *seconds], measure, "cpu")
    assert best == (32, 32, 4, 1)
    device = torch.device("cpu")
    assert tuning.tuned("attention", "forward", "plain", 64, device, config.Tile) == config.Tile(32, 32, 4, 1)
    assert tuning.tuned("attention", "forward", "plain", 128, device, config.Tile) is None
    tuning.tune("attention.forward.plain.128", seconds, measure, "another card")
    assert set(json.loads(cache.read_text())) == {"cpu", "another card"}


def test_no_candidate_that_runs_is_an_error(cache):
    def measure(tile):
        raise RuntimeError("too big")

    with pytest.raises(RuntimeError, match="too big"):
        tuning.tune("attention.forward.plain.64", [(1, 1, 1, 1)], measure, "cpu")
    assert not cache.exists()


@pytest.mark.parametrize("content", ["not json", "[1]", '{"cpu": {"x": [1, 2]}}', '{"cpu": {"x": ["a", 1, 1, 1]}}'])
def test_a_broken_cache_is_ignored_with_a_warning(cache, content):
    cache.parent.mkdir(parents=True)
    cache.write_text(content)
    with pytest.warns(UserWarning, match="ignoring the tuning cache"):
        assert tuning.tuned("attention", "forward", "plain", 64, torch.device("cpu"), config.Tile) is None


def test_every_problem_has_a_tile():
    for itemsize, rich in ((2, False), (2, True), (4, False), (4, True)):
        for dim in (16, 32, 64, 128, 256):
            for kernel in config.KERNELS if rich else config.KERNELS[:-1]:  # a gradient of bias needs a bias
                tile = config.pick(kernel, config.kind_of(itemsize, rich), dim)
                assert min(tile.block_m, tile.block_n) >= 16 and tile.block_n % 4 == 0, (kernel, tile)
    assert config.SPLIT_KEYS % max(t.block_n for kernel, _, _, t in config.shipped() if kernel == "split") == 0


def test_tuning_walks_to_the_fastest_neighbour(cache, monkeypatch):
    """The walk of ``fastxattn tune`` with a made-up clock: 32 x 128 tiles with 8 warps are the fastest there are."""
    seen = []

    def clock(call):
        block_m, block_n, warps, stages = seen[-1]
        return abs(block_m - 32) + abs(block_n - 128) + abs(warps - 8) + stages

    real = tuning.trying

    def trying(key, tile):
        seen.append(tile)
        return real(key, tile)

    monkeypatch.setattr(tune, "milliseconds", clock)
    monkeypatch.setattr(tune, "call_of", lambda key, device: None)
    monkeypatch.setattr(tuning, "trying", trying)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a card")
    lines = []
    assert tune.run(("attention.split",), (64,), lines.append) == cache
    found = json.loads(cache.read_text())["a card"]
    assert set(found) == {f"attention.split.{kind}.64" for kind in ("plain", "rich", "single", "single_rich")}
    assert found["attention.split.plain.64"][:2] == [32, 128]
    assert len(lines) == 4


def test_a_trial_comes_before_the_cache(cache):
    with tuning.trying("attention.forward.plain.64", (16, 16, 4, 1)):
        tile = tuning.tuned("attention", "forward", "plain", 64, torch.device("cpu"), config.Tile)
    assert tile == config.Tile(16, 16, 4, 1)
    assert tuning.tuned("attention", "forward", "plain", 64, torch.device("cpu"), config.Tile) is None


def test_tuning_needs_a_gpu_and_a_known_kernel():
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="no CUDA or ROCm device"):
            tune.run()
    with pytest.raises(ValueError, match=r"kernel must be one of attention\.backward_bias"):
        tune.run(("attention.sideways",))


def test_every_key_has_a_problem_of_its_kind():
    for key, tile in tune.keys(dims=(64,)):
        op, kernel, kind, _ = key.split(".")
        assert all(t != tile for t in tune.neighbours(tile))
        problem = tune.problem_of(kernel, kind, 16, "cpu") if op == "attention" else None
        if problem is not None:
            rich = any(t is not None for t in (problem.kv_range, problem.key_bias, problem.bias))
            assert config.kind_of(problem.query.element_size(), rich) == kind, key
            sizes = (problem.query.shape[0], problem.key.shape[0], 16, 1)
            assert (config.splits_for(*sizes) > 1) == (kernel == "split")
