"""Random attention problems as NumPy arrays, for the sanitizer run and for agreement between instruction sets.

Imports NumPy only: the sanitizer run happens in a process of its own, without torch.
"""

from __future__ import annotations

from typing import Any

import numpy as np

DIMS = (1, 2, 7, 8, 15, 16, 17, 31, 33, 64, 80, 128, 256)
LENGTHS = (0, 1, 2, 3, 4, 5, 15, 16, 17, 63, 65, 95, 96, 97, 130, 257)


def to_bf16(x: np.ndarray) -> np.ndarray:
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bits(x: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return (x.astype(np.uint32) << 16).view(np.float32)
    return x.view(np.float16).astype(np.float32) if dtype == "float16" else x


def as_dtype(x: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return to_bf16(x)
    return x.astype(np.float16).view(np.uint16) if dtype == "float16" else x.astype(np.float32)


def make_case(seed: int) -> tuple[list[np.ndarray], np.ndarray, dict[str, Any]]:
    """query, key, value; grad_out; and the keywords of the native module's functions. Sizes hug block boundaries."""
    rng = np.random.default_rng(seed)
    batch = int(rng.integers(0, 4))
    kv_heads, group = int(rng.integers(1, 4)), int(rng.choice([1, 1, 2, 5]))
    heads, head_dim, value_dim = kv_heads * group, int(rng.choice(DIMS)), int(rng.choice(DIMS))
    lq, lk = rng.choice(LENGTHS, batch), rng.choice(LENGTHS, batch)
    if seed % 10 == 0 and batch:  # long enough to split the keys, and to cut the backward pass
        lk[0] = 2100
        lq[0] = int(rng.choice([1, 40, 2100 // group]))
        head_dim, value_dim = min(head_dim, 17), min(value_dim, 17)
    cu_q = np.concatenate([[0], np.cumsum(lq)]).astype(np.int32)
    cu_k = np.concatenate([[0], np.cumsum(lk)]).astype(np.int32)
    rows_q, rows_k = int(cu_q[-1] + rng.integers(0, 3)), int(cu_k[-1] + rng.integers(0, 3))
    dtype = str(rng.choice(["float32", "bfloat16", "float16"]))
    options: dict[str, Any] = {"dtype": dtype, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    options["scale"] = float(rng.choice([head_dim**-0.5, head_dim**-0.5, -0.1, 0.0]))
    with_bias = rng.random() < 0.25
    if rng.random() < 0.3:
        options["seqused_q"] = np.array([rng.integers(0, n + 1) for n in lq], dtype=np.int32)
    if rng.random() < 0.3:
        options["seqused_k"] = np.array([rng.integers(0, n + 1) for n in lk], dtype=np.int32)
    if not with_bias and rng.random() < 0.3:
        slots, rows_q = rows_q, rows_q + 2
        options["query_index"] = rng.permutation(rows_q)[:slots].astype(np.int32)
    if not with_bias and rng.random() < 0.3 and rows_k:
        options["key_index"] = rng.integers(0, rows_k, rows_k).astype(np.int32)  # rows repeat
    if rng.random() < 0.4:
        longest = int(max(lk, default=0)) + 4
        options["kv_range"] = rng.integers(-3, longest, (rows_q, 2)).astype(np.int32)
    if rng.random() < 0.3:
        shape = (rows_k,) if rng.random() < 0.5 else (rows_k, heads)
        options["key_bias"] = rng.standard_normal(shape).astype(np.float32)
    if with_bias:
        full = (batch, heads, int(max(lq, default=0)) + 1, int(max(lk, default=0)) + 1)
        shape4 = tuple(n if rng.random() < 0.6 else 1 for n in full)
        options["bias"] = rng.standard_normal(shape4).astype(np.float32)
    if rng.random() < 0.2:
        options["softcap"] = 3.0
    if rng.random() < 0.25:
        options["dropout_p"], options["seed"] = 0.3, int(rng.integers(0, 2**63))
    if rng.random() < 0.5:
        options["grad_lse"] = rng.standard_normal((heads, rows_q)).astype(np.float32)
    shapes = [(rows_q, heads, head_dim), (rows_k, kv_heads, head_dim), (rows_k, kv_heads, value_dim)]
    inputs = [as_dtype(rng.standard_normal(s), dtype) for s in shapes]
    grad_out = as_dtype(rng.standard_normal((rows_q, heads, value_dim)), dtype)
    return inputs, grad_out, options


def run_case(native: Any, seed: int, isa: str, workers: int = 1) -> list[np.ndarray]:
    """Every result of forward and backward, as float32."""
    inputs, grad_out, options = make_case(seed)
    forward = {k: v for k, v in options.items() if k != "grad_lse"}
    out, lse = native.attention(*inputs, isa, workers, **forward)
    grads = native.attention_backward(grad_out, out, lse, *inputs, isa, workers, **options)
    dtype = options["dtype"]
    wide = [from_bits(x, dtype) for x in (out, *grads[:3])]
    return [*wide, lse, *(g for g in grads[3:] if g is not None)]
