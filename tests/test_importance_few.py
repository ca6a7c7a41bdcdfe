"""Key importance on the CPU where few query rows stream the keys, and at the border to tiles: 4 rows, 64 lanes."""

import pytest
import torch

from fastxattn.ops.importance import backends
from fastxattn.runtime import native
from tests.importance_problems import check, make

SHAPES = {
    "one_row": {"lengths_q": (1, 1, 1, 0, 1), "lengths_k": (1, 0, 31, 9, 300), "heads": 12, "kv_heads": 12},
    "both_sides": {"lengths_q": (3, 4, 5, 1, 2), "lengths_k": (33, 64, 40, 1, 261), "heads": 3, "kv_heads": 3},
    "narrow": {"lengths_q": (2, 1, 6), "lengths_k": (50, 33, 70), "dim": 3},
    "not_whole_vectors": {"lengths_q": (4, 1, 5), "lengths_k": (50, 33, 70), "dim": 27},
    "wide": {"lengths_q": (1, 3, 9), "lengths_k": (150, 33, 70), "heads": 2, "kv_heads": 2, "dim": 200},
    "groups": {"lengths_q": (2, 1, 4, 5), "lengths_k": (50, 33, 70, 7), "heads": 6, "kv_heads": 2},
    "all_lanes": {"lengths_q": (4, 3), "lengths_k": (66, 35), "heads": 16, "kv_heads": 1, "dim": 24},
    "too_many_lanes": {"lengths_q": (4, 3), "lengths_k": (66, 35), "heads": 20, "kv_heads": 1, "dim": 24},
    "more_heads_than_lanes": {"lengths_q": (1, 2), "lengths_k": (66, 35), "heads": 70, "kv_heads": 70, "dim": 9},
    "options": {
        "lengths_q": (3, 1, 6),
        "lengths_k": (90, 33, 270),
        "heads": 6,
        "kv_heads": 3,
        "key_bias": 2,
        "row_weight": 2,
        "kv_range": True,
        "softcap": 3.0,
    },
    "bias_of_kept": {
        "lengths_q": (2, 9, 1),
        "lengths_k": (90, 33, 270),
        "key_bias": 1,
        "row_weight": 1,
        "key_index": True,
    },
}


def score(problem, threads=None):
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        return backends.run(problem, "cpu")
    finally:
        torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def library():
    if reason := native.cpu_library().reason:
        pytest.skip(reason)
    yield
    native.force_cpu_isa("auto")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_within_budget(shape, dtype):
    problem = make(dtype, **SHAPES[shape])
    for isa in native.available_cpu_isas():
        native.force_cpu_isa(isa)
        check("cpu", problem, backward=shape in ("both_sides", "options") and dtype == torch.float32)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_bits_alone_and_on_any_threads(shape):
    problem = make(torch.float32, **SHAPES[shape])
    whole = score(problem)
    assert torch.equal(score(problem, threads=1), whole)
    assert torch.equal(score(problem, threads=3), whole)
    for b in range(problem.cu_seqlens_q.shape[0] - 1):
        used = torch.zeros_like(problem.cu_seqlens_q[1:])
        used[b] = problem.cu_seqlens_q[b + 1] - problem.cu_seqlens_q[b]
        mine = slice(int(problem.cu_seqlens_k[b]), int(problem.cu_seqlens_k[b + 1]))
        assert torch.equal(score(problem.replace(seqused_q=used))[:, mine], whole[:, mine]), b


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", ["both_sides", "groups", "not_whole_vectors"])
def test_strided_keys(shape, dtype):
    problem = make(dtype, **SHAPES[shape])
    wanted, key = score(problem), problem.key
    rows, heads, dim = key.shape
    beside_values = torch.full((rows, heads, 2, dim), torch.nan, dtype=dtype)
    beside_values[:, :, 1] = key
    padded = torch.full((rows + 1, heads, dim + 5), torch.nan, dtype=dtype)
    padded[1:, :, 2:-3] = key
    by_head = key.transpose(0, 1).contiguous().transpose(0, 1)
    for strided in (beside_values[:, :, 1], padded[1:, :, 2:-3], by_head):
        assert not strided.is_contiguous()
        assert torch.equal(score(problem.replace(key=strided)), wanted)


@pytest.mark.parametrize("shape", ["options", "bias_of_kept", "groups"])
def test_keys_that_nobody_sees_are_not_read(shape):
    """They may hold NaN, and get 0, also where a tile holds seen ones beside them."""
    problem = make(torch.float32, **(SHAPES[shape] | {"kv_range": True}))
    seen, row = torch.zeros(score(problem).shape[1], dtype=torch.bool), problem.kv_range
    for b, (first, last) in enumerate(problem.cu_seqlens_q.unfold(0, 2, 1).tolist()):
        for begin, end in row[first:last].tolist():
            seen[int(problem.cu_seqlens_k[b]) + begin : int(problem.cu_seqlens_k[b]) + end] = True
    wanted, key = score(problem), problem.key.clone()
    if problem.key_index is None:
        key[: seen.shape[0]][~seen] = torch.nan
    else:
        rows = torch.zeros(key.shape[0], dtype=torch.bool)
        rows[problem.key_index[seen].long()] = True
        key[~rows] = torch.nan
    assert 0 < int(seen.sum()) < seen.shape[0]
    assert not wanted[:, ~seen].any()
    assert torch.equal(score(problem.replace(key=key)), wanted)


def test_faults_are_named_by_argument():
    """The operator refuses; Python then says what was wrong."""
    problem = make(torch.float32, **SHAPES["bias_of_kept"])
    with pytest.raises(ValueError, match="key_index must lie between 0 and"):
        score(problem.replace(key_index=problem.key_index + 1000))
    falling = torch.tensor([0, 5, 2, 12], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens_q must not decrease; got 5 then 2"):
        score(problem.replace(cu_seqlens_q=falling))
