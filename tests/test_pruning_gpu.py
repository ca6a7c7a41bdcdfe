"""The Triton kernels: in the interpreter against the oracle (a process of its own), and compiled offline for GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[1]

INTERPRETED = """
import itertools
import torch
from fastxattn.ops.pruning import Budget, prune_tokens, reference, STRATEGIES
from fastxattn.ops.pruning import triton as kernels
from fastxattn.ops.pruning.strategies import NEEDS_ATTENTION

def same(got, want):
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and torch.equal(a.nan_to_num(nan=-9.0), b.nan_to_num(nan=-9.0)), (a, b)

torch.manual_seed(0)
total = 165
cu = torch.tensor([0, 5, 5, 70, 160], dtype=torch.int32)
scores = torch.randn(total).round(decimals=1)
scores[::7], scores[3], scores[1], scores[2] = float("nan"), -0.0, float("inf"), -float("inf")
guard = torch.rand(total) < 0.05
x = torch.randn(total, 33)
for k, protected in ((0, None), (3, guard), (1, None), (64, None), (1000, guard)):
    counts = torch.full((4,), k, dtype=torch.int32)
    same(kernels.select(scores, cu, counts, protected, x, 120), reference.select(scores, cu, counts, protected, x, 120))
q = torch.tensor([0, 0.77, 1.0])
same([kernels.quantile(scores, cu, q)], [reference.quantile(scores, cu, q)])
place, weight = torch.randint(-1, 9, (total,), dtype=torch.int32), torch.rand(total)
for c in (None, weight):
    torch.testing.assert_close(kernels.merge(x, place, c, 10), reference.merge(x, place, c, 10), rtol=0, atol=2e-6)
    same([kernels.gather(x, place, c)], [reference.gather(x, place, c)])
x[7], x[9], x[20], x[40] = 0, float("nan"), x[30], x[30]
quality = torch.rand(total)
quality[100] = float("nan")
counts = torch.tensor([3, 2, 8, 6], dtype=torch.int32)
a, b = torch.arange(0, 160, 2, dtype=torch.int32), torch.arange(1, 160, 2, dtype=torch.int32)
cu_a, cu_b = (torch.tensor(t, dtype=torch.int32) for t in ([0, 3, 3, 35, 80], [0, 2, 2, 35, 80]))
for dtype in (torch.float32, torch.bfloat16):
    y = x.to(dtype)
    every = itertools.product((0, 1), (None, guard))
    for mode, protected in every if dtype == torch.float32 else ((0, None), (1, guard)):
        arguments = (y, quality, cu, counts, protected, mode, 66)
        same([kernels.greedy(*arguments)], [reference.greedy(*arguments)])
    (best, near), (want, exact) = kernels.match(y, a, cu_a, b, cu_b), reference.match(y, a, cu_a, b, cu_b)
    assert torch.equal(best, want)
    torch.testing.assert_close(near, exact, rtol=0, atol=1e-6, equal_nan=True)
# Through the public functions, by name.
rows, kept = prune_tokens(x, scores, cu, Budget.ratio(0.4), backend="triton")
wanted, other = prune_tokens(x, scores, cu, Budget.ratio(0.4), backend="reference")
same([rows, kept.keep_index], [wanted, other.keep_index])
z, attention = torch.randn(total, 8), torch.rand(total)
for name in ("evit", "divprune", "visionzip", "tome"):
    strategy = STRATEGIES[name]
    needs = {"attention": attention} if name in NEEDS_ATTENTION else {}
    got, want = (strategy(z, cu, Budget.count(34), backend=b, **needs) for b in ("triton", "reference"))
    same([got.keep_index, got.assignment, got.cu_seqlens], [want.keep_index, want.assignment, want.cu_seqlens])
print("all agree")
"""


def test_interpreted_kernels_keep_the_same_tokens() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], capture_output=True, text=True, env=environment, check=False
    )
    assert "all agree" in done.stdout, done.stderr[-3000:]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs the compiler, not the interpreter")
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile_offline(capability: int) -> None:
    import triton as compiler
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fastxattn.ops.pruning import triton as kernels

    floats, ints, rows = "*fp32", "*i32", "*bf16"
    signatures = {
        "select_kernel": (
            {
                "p_scores": floats,
                "p_protected": "*u8",
                "p_cu": ints,
                "p_cu_keep": ints,
                "p_keep": ints,
                "p_assignment": ints,
            },
            {"HAS_PROTECTED": True, "BLOCK": kernels.SELECT_BLOCK},
        ),
        "quantile_kernel": (
            {"p_scores": floats, "p_cu": ints, "p_q": floats, "p_out": floats, "Q": "i32"},
            {"BLOCK": kernels.SELECT_BLOCK},
        ),
        "gather_kernel": (
            {"p_x": rows, "p_index": ints, "p_coefficient": floats, "p_out": rows, "C": "i32"},
            {"HAS_COEFFICIENT": True, "BLOCK": kernels.ROW_BLOCK},
        ),
        "merge_kernel": (
            {"p_x": rows, "p_members": "*i64", "p_first": "*i64", "p_coefficient": floats, "p_out": rows, "C": "i32"},
            {"HAS_COEFFICIENT": True, "BLOCK": kernels.ROW_BLOCK},
        ),
        "match_kernel": (
            {"p_x": rows, "p_inverse": floats, "p_a": ints, "p_cu_a": ints, "p_b": ints, "p_cu_b": ints, "p_best": ints}
            | {"p_similarity": floats, "C": "i32"},
            {"EXCLUDE_SELF": False, "UPCAST": False, "M": kernels.MATCH_M, "N": kernels.MATCH_N, "K": kernels.MATCH_K},
        ),
        "greedy_kernel": (
            {
                "p_x": rows,
                "p_inverse": floats,
                "p_quality": floats,
                "p_protected": "*u8",
                "p_cu": ints,
                "p_counts": ints,
            }
            | {"p_value": floats, "p_factors": floats, "p_scores": floats, "C": "i32", "T": "i32", "max_count": "i32"},
            {"MAXMIN": capability == 90, "HAS_PROTECTED": True, "FLOOR_SHARE": 1e-6, "N": kernels.GREEDY_N}
            | {"K": kernels.GREEDY_K},
        ),
    }
    for name, (signature, constants) in signatures.items():
        source = ASTSource(
            fn=getattr(kernels, name), signature=signature | dict.fromkeys(constants, "constexpr"), constexprs=constants
        )
        built = compiler.compile(source, target=GPUTarget("cuda", capability, 32))
        assert built.asm["ptx"] and built.asm["cubin"], name


def test_not_on_the_cpu_by_name() -> None:
    from fastxattn.ops.pruning import Budget, select

    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter takes CPU tensors")
    with pytest.raises(RuntimeError, match="needs tensors on a GPU; got cpu"):
        select(torch.zeros(3), torch.tensor([0, 3], dtype=torch.int32), Budget.count(1), backend="triton")
