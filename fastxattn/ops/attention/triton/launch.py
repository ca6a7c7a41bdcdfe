"""Host side of the Triton attention kernels: allocates, chooses tiles and schedule, launches. Never synchronises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastxattn.ops.attention.schema import NEEDS
from fastxattn.ops.attention.triton import backward, config, forward
from fastxattn.ops.attention.triton.config import Tile
from fastxattn.runtime import tuning

allow_tf32 = False
"""True lets float32 products run on the tensor cores in TF32 (10 bits of mantissa)."""


def padded_dim(dim: int) -> int:
    """Head dims are padded to a power of two inside the kernel, 16 at least (the matrix units' depth)."""
    return max(16, 1 << (dim - 1).bit_length())


@dataclass(frozen=True)
class Problem:
    """The arguments both directions share, as the schema names them, with last axes made contiguous."""

    query: Tensor
    key: Tensor
    value: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    seqused_q: Tensor | None
    seqused_k: Tensor | None
    query_index: Tensor | None
    key_index: Tensor | None
    kv_range: Tensor | None
    key_bias: Tensor | None
    bias: Tensor | None
    scale: float
    softcap: float
    dropout_p: float
    dropout_seed: Tensor | None

    @staticmethod
    def of(*arguments: Any) -> Problem:
        query, key, value, *rest = arguments
        problem = Problem(dense_rows(query), dense_rows(key), dense_rows(value), *rest)
        if not problem.dropout_p:
            problem.__dict__["dropout_seed"] = None
        for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "query_index", "key_index", "kv_range"):
            tensor = getattr(problem, name)
            problem.__dict__[name] = None if tensor is None else tensor.contiguous()
        return problem

    @property
    def batch(self) -> int:
        return self.cu_seqlens_q.numel() - 1

    @property
    def group(self) -> int:
        return self.query.shape[1] // self.key.shape[1]

    @property
    def slots_q(self) -> int:
        return self.query.shape[0] if self.query_index is None else self.query_index.numel()

    @property
    def slots_k(self) -> int:
        return self.key.shape[0] if self.key_index is None else self.key_index.numel()

    @property
    def dims(self) -> tuple[int, int]:
        return padded_dim(self.query.shape[2]), padded_dim(self.value.shape[2])

    def tile(self, kernel: str) -> Tile:
        block_d, block_dv = self.dims
        return tuning.tuned("attention", kernel, self.query, max(block_d, block_dv)) or config.pick(
            kernel, itemsize=self.query.element_size(), block_d=block_d, block_dv=block_dv
        )

    def runtime(self) -> dict[str, Any]:
        """Arguments of every kernel that reads queries and keys."""
        bias = self.bias
        strides = [0 if bias is None or bias.shape[i] == 1 else bias.stride(i) for i in range(4)]
        return dict(
            p_q=self.query, p_k=self.key, p_v=self.value, p_cu_q=self.cu_seqlens_q, p_cu_k=self.cu_seqlens_k,
            p_used_q=self.seqused_q, p_used_k=self.seqused_k, p_index_q=self.query_index, p_index_k=self.key_index,
            p_range=self.kv_range, p_key_bias=self.key_bias, p_bias=bias, p_seed=self.dropout_seed,
            rows_q=self.query.shape[0], rows_k=self.key.shape[0], slots_q=self.slots_q, slots_k=self.slots_k,
            batch=self.batch, kv_heads=self.key.shape[1],
            stride_qr=self.query.stride(0), stride_qh=self.query.stride(1), stride_kr=self.key.stride(0),
            stride_kh=self.key.stride(1), stride_vr=self.value.stride(0), stride_vh=self.value.stride(1),
            stride_key_bias=0 if self.key_bias is None else self.key_bias.stride(0),
            stride_bias_b=strides[0], stride_bias_h=strides[1], stride_bias_q=strides[2], stride_bias_k=strides[3],
            scale=self.scale, softcap=self.softcap, dropout_p=self.dropout_p,
        )  # fmt: skip

    def constants(self, tile: Tile) -> dict[str, Any]:
        """Compile-time arguments of the same kernels."""
        block_d, block_dv = self.dims
        return dict(
            GROUP=self.group, SOFTCAP=self.softcap != 0.0,
            KEY_BIAS_HEADS=self.key_bias is not None and self.key_bias.ndim == 2,
            HEAD_DIM=self.query.shape[2], VALUE_DIM=self.value.shape[2], BLOCK_D=block_d, BLOCK_DV=block_dv,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, PRECISION="tf32" if allow_tf32 else "ieee",
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


def dense_rows(x: Tensor) -> Tensor:
    """Kernels take any strides whose last axis is contiguous; others are copied once."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def tiles(slots: int, batch: int, group: int, block: int) -> int:
    """How many tile numbers there are (see common.py); at most one per sequence is empty."""
    return slots * group // block + batch


def attention_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """``fastxattn::attention_triton``; see :mod:`fastxattn.ops.attention.schema`."""
    problem = Problem.of(*arguments)
    query, value = problem.query, problem.value
    rows, heads = query.shape[:2]
    kv_heads, batch, group = problem.key.shape[1], problem.batch, problem.group
    out = query.new_zeros(rows, heads, value.shape[2])
    lse = query.new_full((heads, rows), -torch.inf, dtype=torch.float32)
    if out.numel() == 0 or batch == 0 or problem.key.shape[0] == 0:
        return out, lse
    splits = config.splits_for(problem.slots_q, problem.slots_k, batch, group)
    tile = problem.tile("split" if splits > 1 else "forward")
    programs = tiles(problem.slots_q, batch, group, tile.block_m) * kv_heads
    part, part_lse = out, lse
    if splits > 1:
        part = query.new_empty(splits, *out.shape, dtype=torch.float32)
        part_lse = lse.new_empty(splits, *lse.shape)
    runtime, constants = problem.runtime(), problem.constants(tile)
    with _device(query):
        forward.attention_forward[(programs * splits,)](
            **runtime, p_out=part, p_lse=part_lse, SPLITS=splits, SPLIT_KEYS=config.SPLIT_KEYS, **constants
        )
        if splits > 1:
            names = ("p_cu_q", "p_cu_k", "p_used_q", "p_used_k", "p_index_q", "rows_q", "slots_q", "slots_k", "batch")
            forward.attention_merge[(programs,)](
                p_part=part, p_part_lse=part_lse, p_out=out, p_lse=lse, **{name: runtime[name] for name in names},
                kv_heads=kv_heads, GROUP=group, VALUE_DIM=value.shape[2], BLOCK_DV=constants["BLOCK_DV"],
                BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, SPLITS=splits, SPLIT_KEYS=config.SPLIT_KEYS, num_warps=4,
            )  # fmt: skip
    return out, lse


def attention_backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``fastxattn::attention_backward_triton``; the last argument is ``needs``."""
    *arguments_, needs = arguments
    problem = Problem.of(*arguments_)
    query, key, value, key_bias, bias = problem.query, problem.key, problem.value, problem.key_bias, problem.bias
    grads = {name: query.new_empty(0) for name in NEEDS}
    wanted = {name for name, bit in NEEDS.items() if needs & bit}
    for name, x in (("query", query), ("key", key), ("value", value), ("key_bias", key_bias), ("bias", bias)):
        if name in wanted and x is not None:
            grads[name] = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    if query.numel() and key.shape[0] and problem.batch and out.numel():
        with _device(query):
            _launch_backward(problem, dense_rows(grad_out), grad_lse, out.contiguous(), lse.contiguous(), grads, wanted)
    return grads["query"], grads["key"], grads["value"], grads["key_bias"], grads["bias"]


def _launch_backward(
    p: Problem, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, grads: dict[str, Tensor],
    wanted: set[str],
) -> None:  # fmt: skip
    rows, heads, head_dim = p.query.shape
    kv_heads, group = p.key.shape[1], p.group
    delta = torch.empty_like(lse)
    shared = p.runtime() | dict(
        p_dout=grad_out, p_lse=lse, p_delta=delta, stride_or=grad_out.stride(0), stride_oh=grad_out.stride(1)
    )
    splits = config.splits_for(p.slots_q, p.slots_k, p.batch, group) if "query" in wanted else 1
    tile = p.tile("backward_query")
    grad_query = grads["query"]
    if splits > 1:
        grad_query = p.query.new_zeros(splits, rows, heads, head_dim, dtype=torch.float32)
    programs = tiles(p.slots_q, p.batch, group, tile.block_m) * kv_heads
    backward.attention_backward_query[(programs * splits,)](
        **shared, p_out=out, p_dlse=None if grad_lse is None else grad_lse.contiguous(), p_dq=grad_query,
        NEED_DQ="query" in wanted, SPLITS=splits, SPLIT_KEYS=config.SPLIT_KEYS, **p.constants(tile),
    )  # fmt: skip
    if splits > 1:
        grads["query"].copy_(grad_query.sum(0))
    if wanted & {"key", "value", "key_bias"}:
        _launch_backward_key(p, shared, grads, wanted)
    if "bias" in wanted and p.bias is not None:
        _launch_backward_bias(p, shared, grads)


def _launch_backward_key(p: Problem, shared: dict[str, Any], grads: dict[str, Tensor], wanted: set[str]) -> None:
    kv_heads = p.key.shape[1]
    tile = p.tile("backward_key")
    by_slot: dict[str, Tensor | None] = {"key": None, "value": None, "key_bias": None}
    for name, x in (("key", p.key), ("value", p.value), ("key_bias", p.key_bias)):
        if name in wanted and x is not None:
            columns = x.shape[1:] if x.ndim > 1 else (kv_heads,)
            direct = p.key_index is None and x.ndim > 1
            by_slot[name] = grads[name] if direct else x.new_zeros(p.slots_k, *columns)
    backward.attention_backward_key[(tiles(p.slots_k, p.batch, 1, tile.block_n) * kv_heads,)](
        **shared, p_dk=by_slot["key"], p_dv=by_slot["value"], p_dkey_bias=by_slot["key_bias"], **p.constants(tile)
    )
    for name, slots in by_slot.items():
        if slots is None or slots is grads[name]:
            continue
        slots = slots.sum(1) if slots.ndim > grads[name].ndim else slots
        if p.key_index is None:
            grads[name] = slots
        else:  # several slots may stand for one row
            grads[name].index_add_(0, p.key_index.clamp(0, p.key.shape[0] - 1), slots)


def _launch_backward_bias(p: Problem, shared: dict[str, Any], grads: dict[str, Tensor]) -> None:
    bias = p.bias
    assert bias is not None
    tile = p.tile("backward_bias")
    batch, heads, rows, columns = bias.shape
    places_q, places_k = (max(t.shape[0] // p.batch, 1) for t in (p.query, p.key))
    row_blocks = -(-rows // tile.block_m) if rows > 1 or places_q == 1 else 1
    column_blocks = -(-columns // tile.block_n) if columns > 1 or places_k == 1 else 1
    grad = torch.zeros(bias.shape, dtype=torch.float32, device=bias.device)
    arguments = {k: v for k, v in shared.items() if k not in ("p_index_q", "p_index_k", "kv_heads")}
    backward.attention_backward_bias[(batch * heads * row_blocks * column_blocks,)](
        **arguments,
        p_dbias=grad,
        p_slot_q=_slot_of_row(p.query_index, p.cu_seqlens_q, p.seqused_q, p.query.shape[0]),
        p_slot_k=_slot_of_row(p.key_index, p.cu_seqlens_k, p.seqused_k, p.key.shape[0]),
        heads=p.query.shape[1], bias_heads=heads, bias_rows=rows, bias_columns=columns, places_q=places_q,
        places_k=places_k, BATCH_SHARED=batch == 1 and p.batch > 1, HEADS_SHARED=heads == 1 and p.query.shape[1] > 1,
        ROWS_SHARED=rows == 1 and places_q > 1, COLUMNS_SHARED=columns == 1 and places_k > 1, **p.constants(tile),
    )  # fmt: skip
    grads["bias"] = grad.to(bias.dtype)


def _slot_of_row(index: Tensor | None, offsets: Tensor, used: Tensor | None, rows: int) -> Tensor | None:
    """The slot, counted in its own sequence, that each row stands in; -1 for none. None when slot = row."""
    if index is None:
        return None
    slots = torch.arange(index.numel(), device=index.device)
    sequence = torch.searchsorted(offsets[1:].contiguous(), slots, right=True).clamp_(max=offsets.numel() - 2)
    place = slots - offsets[sequence]
    length = offsets.diff() if used is None else used
    target = torch.where((place >= 0) & (place < length[sequence]), index, rows)
    inverse = torch.full((rows + 1,), -1, dtype=torch.int32, device=index.device)
    return inverse.scatter_(0, target.long().clamp(0, rows), place.to(torch.int32))[:rows]


def _device(x: Tensor) -> Any:
    """Kernels launch on the current CUDA device; make it the tensors' own."""
    return torch.cuda.device(x.device) if x.is_cuda else torch.autograd.profiler.record_function("fastxattn")
