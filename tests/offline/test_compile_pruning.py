"""The Triton kernels of pruning compile without a GPU, and say where they do not run."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs the compiler, no interpreter")


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile_offline(capability: int) -> None:
    import triton as compiler
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fastxattn.ops.pruning import kernels_triton as kernels

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
                "total": "i32",
                "capacity": "i32",
            },
            {"HAS_PROTECTED": True, "BLOCK": kernels.SELECT_BLOCK},
        ),
        "quantile_kernel": (
            {"p_scores": floats, "p_cu": ints, "p_q": floats, "p_out": floats, "total": "i32", "Q": "i32"},
            {"BLOCK": kernels.SELECT_BLOCK},
        ),
        "gather_kernel": (
            {"p_x": rows, "p_index": ints, "p_coefficient": floats, "p_out": rows, "rows": "i32", "C": "i32"},
            {"HAS_COEFFICIENT": True, "BLOCK": kernels.ROW_BLOCK},
        ),
        "merge_kernel": (
            {"p_x": rows, "p_members": "*i64", "p_first": "*i64", "p_coefficient": floats, "p_out": rows}
            | {"total_rows": "i32", "C": "i32"},
            {"HAS_COEFFICIENT": True, "BLOCK": kernels.ROW_BLOCK},
        ),
        "match_kernel": (
            {"p_x": rows, "p_inverse": floats, "p_a": ints, "p_cu_a": ints, "p_b": ints, "p_cu_b": ints, "p_best": ints}
            | {"p_similarity": floats, "rows": "i32", "rows_a": "i32", "rows_b": "i32", "C": "i32"},
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
    from fastxattn.ops.pruning import Budget, select_tokens

    with pytest.raises(RuntimeError, match="the tensors are on cpu, and TRITON_INTERPRET=1 is not set"):
        select_tokens(torch.zeros(3), torch.tensor([0, 3], dtype=torch.int32), Budget.count(1), backend="triton")
