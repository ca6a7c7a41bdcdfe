"""The tuning cache and the tile tables, without a GPU."""

import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastxattn.ops.attention import dispatch
from fastxattn.ops.attention.problem import Problem
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
            for kernel in config.KERNELS:
                tile = config.pick(kernel, config.kind_of(itemsize, rich), dim)
                assert min(tile.block_m, tile.block_n) >= 16 and tile.block_n % 4 == 0, (kernel, tile)
    assert config.SPLIT_KEYS % max(t.block_n for kernel, _, _, t in config.shipped() if kernel == "split") == 0


def test_a_measured_backend_comes_first(cache, monkeypatch):
    device = torch.device("cuda")
    monkeypatch.setattr(tuning, "_device_name", lambda device: "a card")
    assert tuning.preferred("attention", "plain", 64, device) is None
    assert tuning.prefer("attention", "plain", 64, {"triton": 2.0, "cuda": 1.0}, "a card") == "cuda"
    tuning.tune("attention.forward.plain.64", [(32, 32, 4, 1)], lambda tile: 1.0, "a card")  # both keep their place
    assert tuning.preferred("attention", "plain", 64, device) == "cuda"
    assert tuning.preferred("attention", "rich", 64, device) is None
    assert tuning.tuned("attention", "forward", "plain", 64, device, config.Tile) == config.Tile(32, 32, 4, 1)
    with FakeTensorMode():
        x, offsets = torch.empty(8, 2, 64, device="cuda", dtype=torch.float16), torch.empty(2, device="cuda")
        problem = Problem(x, x, x, offsets, offsets)
        assert dispatch.in_order(problem)[0].name == "cuda"
        rich = problem._replace(kv_range=offsets)
        assert dispatch.in_order(rich) == dispatch.BACKENDS
        assert {b.name for b in dispatch.in_order(problem)} == {b.name for b in dispatch.BACKENDS}


def test_a_backend_that_is_no_name_is_ignored(cache):
    cache.parent.mkdir()
    cache.write_text('{"a card": {"attention.backend.plain.64": [1, 2, 3, 4]}}')
    with pytest.warns(UserWarning, match="not the name of a backend"):
        assert tuning.preferred("attention", "plain", 64, torch.device("cpu")) is None
