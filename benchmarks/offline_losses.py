"""The kernels of contrastive losses, late interaction and retrieval, as benchmarks/offline.py compiles them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

OPS = ("contrastive", "late_interaction", "retrieval")
POINTERS = {
    "p_id": "*i32",
    "p_skip": "*i32",
    "p_exact": "*fp32",
    "p_limit": "*fp32",
    "p_rank": "*fp32",
    "p_state": "*fp32",
    "p_slopes": "*fp32",
    "p_dot": "*fp32",
    "p_weight": "*fp32",
    "p_target": "*i32",
    "p_sum": "*fp32",
    "p_best": "*i32",
    "p_value": "*fp32",
    "p_extra": "*i32",
    "p_set": "*i32",
    "p_query": "*fp32",
    "p_factor": "*fp32",
    "p_lists": "*i64",
}
SMOOTH = {"p_best": "*fp32", "p_extra": "*fp32"}
NO_PRODUCT = ("positive",)


def pointers(kernel: str) -> dict[str, str]:
    """Types of a kernel's pointers by prefix; every other one is the features' dtype."""
    return POINTERS | SMOOTH if kernel.endswith("smooth") else POINTERS


def cases() -> Iterator[tuple[str, str, str, int, str, str]]:
    """(op, kernel, dtype, dim, variant, tile); the number of features is not a kernel's constant, so dim is 0."""
    import torch

    from fastxattn.ops.contrastive.triton import tiles
    from fastxattn.ops.late_interaction import kernels_triton as late
    from fastxattn.ops.retrieval import kernels_triton as retrieval

    for dtype, real in (("fp16", torch.float16), ("fp32", torch.float32)):
        for kernel, like in tiles.LIKE.items():
            tile = tiles.pick(like, real)
            yield "contrastive", kernel, dtype, 0, "rich", f"{tile.block_m}x{tile.block_n} w{tile.warps} s{tile.stages}"
        for kernel in ("maxsim", "maxsim_smooth"):
            rows = late.SMOOTH_ROWS if (kernel, dtype) == ("maxsim_smooth", "fp16") else 64
            yield "late_interaction", kernel, dtype, 0, "plain", f"{rows}x64 w8 s2"
        for kernel in ("maxsim_gradient", "maxsim_gradient_smooth"):
            yield "late_interaction", kernel, dtype, 0, "plain", "32x32 w8 s1"
    for tile in retrieval.TILES.values():
        shown = "{BLOCK_M}x{BLOCK_N} w{num_warps} s{num_stages}".format(**tile)
        yield "retrieval", "topk", "fp32", 0, "plain", shown


def kernel_of(op: str, name: str, dtype: str) -> tuple[Any, dict[str, Any]]:
    """The kernel and its constants other than BLOCK_M and BLOCK_N."""
    import torch

    from fastxattn.ops.contrastive.triton import kernels, tiles
    from fastxattn.ops.late_interaction import kernels_triton as late
    from fastxattn.ops.retrieval import kernels_triton as retrieval

    single = dtype == "fp32"
    tile = tiles.pick(tiles.LIKE.get(name, "stats"), torch.float32 if single else torch.float16)
    constants = {
        "EXACT_BY_ROW": True,
        "EXCLUDE_SELF": True,
        "MEANS": True,
        "SPLITS": 2,
        "ROWS": True,
        "COLUMNS": True,
        "BLOCK_K": tile.block_k,
        "STEPS": tile.steps,
        "BLOCKED": name == "blocked",
        "PRECISION": "ieee" if single else "tf32",
        "FROM_A": True,
        "FROM_B": True,
        "OWN": True,
        "MET": True,
        "SMOOTH": name.endswith("smooth"),
        "BLOCK_D": 64,
        "WIDTH": 16,
    }
    if op == "retrieval":
        tile = retrieval.TILES[16]
        return retrieval.topk_kernel, constants | {name: tile[name] for name in ("BLOCK_K", "STEPS")}
    if op == "late_interaction":
        constants |= {"BLOCK_K": 32 if single else 64, "STEPS": 4 if single else 1}
        return (late.maxsim_gradient_kernel if "gradient" in name else late.maxsim_kernel), constants
    return {
        "stats": kernels.stats_kernel,
        "slope": kernels.slope_kernel,
        "sigmoid": kernels.sigmoid_kernel,
        "blocked": kernels.positive_kernel,
        "positive": kernels.positive_kernel,
    }[name], constants
