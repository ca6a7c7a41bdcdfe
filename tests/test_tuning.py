"""The tuning cache and the tile tables, without a GPU."""

import json
import multiprocessing
import os
import subprocess
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastxattn import tune
from fastxattn.ops.attention import backends
from fastxattn.ops.attention.problem import Problem
from fastxattn.ops.attention.triton import tiles
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
    assert tuning.tuned("attention", "forward", "plain", 64, device, tiles.Tile) == tiles.Tile(32, 32, 4, 1)
    assert tuning.tuned("attention", "forward", "plain", 128, device, tiles.Tile) is None
    tuning.tune("attention.forward.plain.128", seconds, measure, "another card")
    assert set(json.loads(cache.read_text())) == {"cpu", "another card"}


def test_no_candidate_that_runs_is_an_error(cache):
    def measure(tile):
        raise RuntimeError("too big")

    with pytest.raises(RuntimeError, match="too big"):
        tuning.tune("attention.forward.plain.64", [(1, 1, 1, 1)], measure, "cpu")
    assert not cache.exists()


GOOD = {"attention.forward.plain.64": [32, 32, 4, 1], "attention.backend.plain.64": "cuda"}
NONSENSE = {
    "no JSON": b"not json",
    "a torn file": b'{"cpu": {"attention.forward',
    "empty": b"",
    "a list": b"[1]",
    "null": b"null",
    "not UTF-8": b"\xff\xfe\x00{",
    "deep nesting": b"[" * 200_000,
    "huge": b" " * (tuning.LARGEST_FILE + 1) + json.dumps({"cpu": GOOD}).encode(),
}
WRONG = {  # name -> value of an entry, words
    "few numbers": ([1, 2], "is not [block_m"),
    "text in a tile": (["a", 1, 1, 1], "is not [block_m"),
    "floats": ([64.0, 64, 4, 2], "is not [block_m"),
    "booleans": ([True, 64, 4, 2], "is not [block_m"),
    "null": (None, "is not [block_m"),
    "a text": ("64, 64, 4, 2", "is not [block_m"),
    "an object": ({"block_m": 64}, "is not [block_m"),
    "no power of 2": ([48, 64, 4, 2], "blocks must be one of 16, 32, 64, 128"),
    "too small": ([64, 8, 4, 2], "blocks must be one of"),
    "too large": ([64, 4096, 4, 2], "blocks must be one of"),
    "beyond 64 bits": ([10**30, 64, 4, 2], "blocks must be one of"),
    "negative": ([-64, 64, 4, 2], "blocks must be one of"),
    "warps": ([64, 64, 3, 2], "warps must be one of 1, 2, 4, 8, 16"),
    "stages": ([64, 64, 4, 0], "stages 1 to 8"),
    "too many stages": ([64, 64, 4, 99], "stages 1 to 8"),
}


def found(kind="plain"):
    return tuning.tuned("attention", "forward", kind, 64, torch.device("cpu"), tiles.Tile)


@contextmanager
def warnings_of_the_cache():
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        yield warned
    assert all("ignoring the tuning cache" in str(w.message) for w in warned)


@pytest.mark.parametrize("name", NONSENSE)
def test_a_broken_cache_is_ignored_with_one_warning(cache, name):
    cache.parent.mkdir(parents=True)
    cache.write_bytes(NONSENSE[name])
    with warnings_of_the_cache() as warned:
        assert found() is None
        assert tuning.preferred("attention", "plain", 64, torch.device("cpu")) is None
    assert len(warned) == 1
    tuning.prefer("attention", "plain", 64, {"cpu": 1.0}, "cpu")  # writes a sound one, and loses nobody's file
    assert json.loads(cache.read_text()) == {"cpu": {"attention.backend.plain.64": "cpu"}}
    assert cache.with_name("tuning.json.invalid").read_bytes() == NONSENSE[name]


@pytest.mark.parametrize("name", WRONG)
def test_valid_entries_beside_a_wrong_one_are_used(cache, name):
    value, words = WRONG[name]
    cache.parent.mkdir(parents=True)
    bad = {"attention.forward.rich.64": value, "attention.backend.rich.64": "tpu", "attention.backend.x.64": [1] * 4}
    cache.write_text(json.dumps({"a card": 3, "another": [], "cpu": bad | GOOD}))
    with warnings_of_the_cache() as warned:
        assert found() == tiles.Tile(32, 32, 4, 1)
        assert found("rich") is None
        assert tuning.preferred("attention", "plain", 64, torch.device("cpu")) == "cuda"
        assert tuning.preferred("attention", "rich", 64, torch.device("cpu")) is None
    assert len(warned) == 1
    assert "(and 4 more)" in str(warned[0].message)
    _, faults = tuning._read(cache)
    assert len(faults) == 5
    assert words in next(fault for fault in faults if "forward.rich" in fault)
    with pytest.raises(ValueError, match="takes no such entry"):
        tuning._write("cpu", "attention.forward.rich.64", value)


def test_a_folder_or_unreadable_file_is_ignored_with_a_warning(cache, monkeypatch):
    cache.mkdir(parents=True)
    with pytest.warns(UserWarning, match="it is not a file"):
        assert found() is None
    with pytest.raises(OSError, match=r"tuning\.json"):
        tuning.prefer("attention", "plain", 64, {"cpu": 1.0}, "cpu")
    assert [p.name for p in cache.parent.iterdir() if p.name.startswith(".tuning.json") and p.suffix != ".lock"] == []
    cache.rmdir()
    cache.write_text("{}")
    monkeypatch.setattr(Path, "open", lambda *_: (_ for _ in ()).throw(PermissionError("no")))
    tuning._cache.cache_clear()
    with pytest.warns(UserWarning, match="PermissionError"):
        assert found() is None


def test_a_user_without_a_home_has_no_cache(monkeypatch):
    monkeypatch.setenv("FASTXATTN_TUNING", "")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    tuning._cache.cache_clear()
    assert found() is None
    tuning._cache.cache_clear()


def test_calls_run_whatever_the_cache_holds(cache):
    """The interpreter refuses tiles that are no powers of two, as a compiler does."""
    code = """
import torch, warnings, fastxattn as fx
q, cu = torch.randn(20, 1, 16), torch.tensor([0, 20], dtype=torch.int32)
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    out = [fx.varlen_cross_attention(q, q, q, cu, cu, backend="triton") for _ in range(2)]
torch.testing.assert_close(out[0], fx.varlen_cross_attention(q, q, q, cu, cu, backend="reference"))
print(sum("tuning cache" in str(w.message) for w in warned))
"""
    cache.parent.mkdir()
    cache.write_text('{"cpu": {"attention.forward.single.16": [48, 64, 4, 2]}}')
    variables = {**os.environ, "FASTXATTN_TUNING": str(cache), "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=False)
    assert done.stdout == "1\n", done.stderr


def test_a_tile_that_does_not_fit_the_device_gives_way_to_the_shipped_one(cache, monkeypatch):
    class OutOfResources(Exception):
        __module__ = "triton.runtime.errors"

    @tuning.or_shipped
    def launch(key_dim):
        tile = found() or "shipped"
        if tile != "shipped":
            raise OutOfResources("shared memory")
        return tile, key_dim

    monkeypatch.setattr(tuning, "_in_use", True)
    tuning.tune("attention.forward.plain.64", [(128, 128, 8, 4)], lambda tile: 1.0, "cpu")
    with tuning.trying("attention.forward.plain.64", (64, 64, 4, 4)), pytest.raises(OutOfResources):
        launch(64)  # a candidate of the tuner, which passes over it
    with warnings_of_the_cache() as warned:
        assert launch(64) == ("shipped", 64)
        assert launch(key_dim=8) == ("shipped", 8)
    assert len(warned) == 1
    assert "a tile in it does not run here: shared memory" in str(warned[0].message)

    @tuning.or_shipped
    def broken():
        raise OutOfResources("the shipped one too")

    with pytest.raises(OutOfResources):
        broken()


def _tune_many(path, first):
    os.environ["FASTXATTN_TUNING"] = str(path)
    tuning._cache.cache_clear()
    warnings.simplefilter("error")  # a torn file would warn
    for dim in range(first, first + 40):
        tuning.prefer("attention", "plain", dim, {"cpu": 1.0}, "cpu")
        assert tuning.preferred("attention", "plain", dim, torch.device("cpu")) == "cpu"


def test_concurrent_tuning_loses_nothing(cache):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_tune_many, args=(cache, first)) for first in (0, 1000)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(json.loads(cache.read_text())["cpu"]) == 80
    assert {p.name for p in cache.parent.iterdir()} == {"tuning.json", ".tuning.json.lock"}


def test_a_write_keeps_a_link_and_what_others_wrote(cache, tmp_path):
    cache.parent.mkdir()
    real = tmp_path / "real.json"
    real.write_text("{}")
    cache.symlink_to(real)
    assert found() is None
    real.write_text(json.dumps({"cpu": GOOD}))  # by another process, after this one read the cache
    tuning.tune("attention.forward.rich.64", [(64, 64, 4, 1)], lambda tile: 1.0, "cpu")
    assert cache.is_symlink()
    assert json.loads(real.read_text()) == {"cpu": GOOD | {"attention.forward.rich.64": [64, 64, 4, 1]}}


def test_every_problem_has_a_tile():
    for itemsize, rich in ((2, False), (2, True), (4, False), (4, True)):
        for dim in (16, 32, 64, 128, 256):
            for kernel in tiles.KERNELS if rich else tiles.KERNELS[:-1]:  # a gradient of bias needs a bias
                tile = tiles.pick(kernel, tiles.kind_of(itemsize, rich), dim)
                assert min(tile.block_m, tile.block_n) >= 16 and tile.block_n % 4 == 0, (kernel, tile)
    assert tiles.SPLIT_KEYS % max(t.block_n for kernel, _, _, t in tiles.shipped() if kernel == "split") == 0


def test_a_measured_backend_comes_first(cache, monkeypatch):
    device = torch.device("cuda")
    monkeypatch.setattr(tuning, "_device_name", lambda device: "a card")
    assert tuning.preferred("attention", "plain", 64, device) is None
    assert tuning.prefer("attention", "plain", 64, {"triton": 2.0, "cuda": 1.0}, "a card") == "cuda"
    tuning.tune("attention.forward.plain.64", [(32, 32, 4, 1)], lambda tile: 1.0, "a card")  # both keep their place
    assert tuning.preferred("attention", "plain", 64, device) == "cuda"
    assert tuning.preferred("attention", "rich", 64, device) is None
    assert tuning.tuned("attention", "forward", "plain", 64, device, tiles.Tile) == tiles.Tile(32, 32, 4, 1)
    with FakeTensorMode():
        x, offsets = torch.empty(8, 2, 64, device="cuda", dtype=torch.float16), torch.empty(2, device="cuda")
        problem = Problem(query=x, key=x, value=x, cu_seqlens_q=offsets, cu_seqlens_k=offsets)
        assert backends.in_order(problem)[0].name == "cuda"
        rich = problem.replace(kv_range=offsets)
        assert backends.in_order(rich) == backends.BACKENDS
        assert {b.name for b in backends.in_order(problem)} == {b.name for b in backends.BACKENDS}


def test_a_backend_that_is_no_name_is_ignored(cache):
    cache.parent.mkdir()
    cache.write_text('{"a card": {"attention.backend.plain.64": [1, 2, 3, 4]}}')
    with pytest.warns(UserWarning, match="not the name of a backend"):
        assert tuning.preferred("attention", "plain", 64, torch.device("cpu")) is None


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
    tuned = json.loads(cache.read_text())["a card"]
    assert set(tuned) == {f"attention.split.{kind}.64" for kind in ("plain", "rich", "single", "single_rich")}
    assert tuned["attention.split.plain.64"][:2] == [32, 128]
    assert len(lines) == 4


def test_a_trial_comes_before_the_cache(cache):
    with tuning.trying("attention.forward.plain.64", (16, 16, 4, 1)):
        tile = tuning.tuned("attention", "forward", "plain", 64, torch.device("cpu"), tiles.Tile)
    assert tile == tiles.Tile(16, 16, 4, 1)
    assert tuning.tuned("attention", "forward", "plain", 64, torch.device("cpu"), tiles.Tile) is None


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
            assert tiles.kind_of(problem.query.element_size(), rich) == kind, key
            sizes = (problem.query.shape[0], problem.key.shape[0], 16, 1)
            assert (tiles.splits_for(*sizes) > 1) == (kernel == "split")
