"""Host side of the Triton attention kernels: allocates, chooses tiles and schedule, launches. Never synchronises."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastxattn.ops.attention.problem import Problem
from fastxattn.ops.attention.schema import NEEDS
from fastxattn.ops.attention.triton import backward, backward_bias, config, forward
from fastxattn.ops.attention.triton.config import Tile, padded_dim
from fastxattn.runtime import tuning
from fastxattn.runtime.cuda import capability

allow_tf32 = False
"""True lets float32 products run on the tensor cores in TF32 (10 bits of mantissa)."""


def precision() -> str:
    """How float32 products are formed."""
    return "tf32" if allow_tf32 else "ieee"


@dataclass(frozen=True)
class Launch:
    """A problem and what its launches are derived from."""

    problem: Problem

    @staticmethod
    def of(*arguments: Any) -> Launch:
        """From the operator's arguments, last axes made contiguous."""
        problem = Problem(*arguments)
        dense = {name: dense_rows(getattr(problem, name)) for name in ("query", "key", "value")}
        seed = problem.dropout_seed if problem.dropout_p else None
        return Launch(problem._replace(**dense, dropout_seed=seed))

    @property
    def batch(self) -> int:
        """Sequences."""
        return self.problem.cu_seqlens_q.numel() - 1

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.problem.query.shape[1] // self.problem.key.shape[1]

    @property
    def slots_q(self) -> int:
        """Query slots."""
        return self.problem.query.shape[0] if self.problem.query_index is None else self.problem.query_index.numel()

    @property
    def slots_k(self) -> int:
        """Key slots."""
        return self.problem.key.shape[0] if self.problem.key_index is None else self.problem.key_index.numel()

    @property
    def dims(self) -> tuple[int, int]:
        """Head dim and value dim as the kernels pad them."""
        return padded_dim(self.problem.query.shape[2]), padded_dim(self.problem.value.shape[2])

    def tile(self, kernel: str) -> Tile:
        """The tuned tile, or the shipped one."""
        p = self.problem
        rich = any(t is not None for t in (p.kv_range, p.key_bias, p.bias, p.dropout_seed))
        kind, dim = config.kind_of(p.query.element_size(), rich), max(*self.dims)
        return tuning.tuned("attention", kernel, kind, dim, p.query.device, config.Tile) or config.pick(
            kernel, kind, dim, ampere(p.query.device)
        )

    @property
    def splits(self) -> int:
        """Chunks that keys are cut into."""
        return config.splits_for(self.slots_q, self.slots_k, self.batch, self.group)

    def by_rows(self, kernel: str, splits: int) -> tuple[tuple[int], dict[str, Any]]:
        """Grid and compile-time arguments of a kernel whose programs are (tile of rows, key/value head, chunk)."""
        tile = self.tile(kernel)
        programs = tiles(self.slots_q, self.batch, self.group, tile.block_m) * self.problem.key.shape[1] * splits
        return (programs,), self.constants(tile) | {"SPLITS": splits, "SPLIT_KEYS": config.SPLIT_KEYS}

    def gradients(self, grad_out: Tensor, lse: Tensor) -> dict[str, Any]:
        """Arguments that every backward kernel has besides."""
        return {
            "p_dout": grad_out, "p_lse": lse, "stride_or": grad_out.stride(0), "stride_oh": grad_out.stride(1),
        }  # fmt: skip

    def runtime(self) -> dict[str, Any]:
        """Arguments of every kernel that reads queries and keys."""
        p = self.problem
        bias = p.bias
        strides = [0 if bias is None or bias.shape[i] == 1 else bias.stride(i) for i in range(4)]
        return {
            "p_q": p.query, "p_k": p.key, "p_v": p.value, "p_cu_q": p.cu_seqlens_q, "p_cu_k": p.cu_seqlens_k,
            "p_used_q": p.seqused_q, "p_used_k": p.seqused_k, "p_index_q": p.query_index, "p_index_k": p.key_index,
            "p_range": p.kv_range, "p_key_bias": p.key_bias, "p_bias": bias, "p_seed": p.dropout_seed,
            "rows_q": p.query.shape[0], "rows_k": p.key.shape[0], "slots_q": self.slots_q, "slots_k": self.slots_k,
            "batch": self.batch, "kv_heads": p.key.shape[1],
            "stride_qr": p.query.stride(0), "stride_qh": p.query.stride(1), "stride_kr": p.key.stride(0),
            "stride_kh": p.key.stride(1), "stride_vr": p.value.stride(0), "stride_vh": p.value.stride(1),
            "stride_key_bias": 0 if p.key_bias is None else p.key_bias.stride(0),
            "stride_bias_b": strides[0], "stride_bias_h": strides[1], "stride_bias_q": strides[2],
            "stride_bias_k": strides[3],
            "scale": p.scale, "softcap": p.softcap, "dropout_p": p.dropout_p,
        }  # fmt: skip

    def constants(self, tile: Tile) -> dict[str, Any]:
        """Compile-time arguments of the same kernels."""
        p = self.problem
        block_d, block_dv = self.dims
        return {
            "GROUP": self.group, "SOFTCAP": p.softcap != 0.0,
            "KEY_BIAS_HEADS": p.key_bias is not None and p.key_bias.ndim == 2,
            "HEAD_DIM": p.query.shape[2], "VALUE_DIM": p.value.shape[2], "BLOCK_D": block_d, "BLOCK_DV": block_dv,
            "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "PRECISION": precision(),
            "num_warps": warps_of(tile, p.query), "num_stages": tile.stages,
        }  # fmt: skip


@functools.cache
def ampere(device: torch.device) -> bool:
    """Whether a device is of compute capability 8, whose register files and matrix units want smaller tiles."""
    found = capability(device)
    return found is not None and found[0] == 8


def warps_of(tile: Tile, query: Tensor) -> int:
    """Warps to launch a tile with."""
    return config.warps_on(tile, query.element_size(), torch.version.hip is not None)


def dense_rows(x: Tensor) -> Tensor:
    """Kernels take any strides whose last axis is contiguous; others are copied once."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def tiles(slots: int, batch: int, group: int, block: int) -> int:
    """How many tile numbers there are (see common.py); at most one per sequence is empty."""
    return slots * group // block + batch


@tuning.or_shipped
def attention_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """``fastxattn::attention_triton``; see :mod:`fastxattn.ops.attention.schema`."""
    launch = Launch.of(*arguments)
    query, key, value = launch.problem[:3]
    rows, heads = query.shape[:2]
    kv_heads, batch, group = key.shape[1], launch.batch, launch.group
    out = query.new_zeros(rows, heads, value.shape[2])
    exact = query.dtype == torch.float32
    lse = query.new_full((heads, rows), -torch.inf, dtype=torch.float64 if exact else torch.float32)
    if out.numel() == 0 or batch == 0 or key.shape[0] == 0:
        return out, lse
    splits = config.splits_for(launch.slots_q, launch.slots_k, batch, group)
    tile = launch.tile("split" if splits > 1 else "forward")
    programs = tiles(launch.slots_q, batch, group, tile.block_m) * kv_heads
    part, part_lse = out, lse
    if splits > 1:
        part = query.new_empty(splits, *out.shape, dtype=torch.float32)
        part_lse = lse.new_empty(splits, *lse.shape)
    runtime, constants = launch.runtime(), launch.constants(tile)
    with on_device(query):
        forward.attention_forward[(programs * splits,)](
            **runtime, p_out=part, p_lse=part_lse, SPLITS=splits, SPLIT_KEYS=config.SPLIT_KEYS, **constants
        )
        if splits > 1:
            names = ("p_cu_q", "p_cu_k", "p_used_q", "p_used_k", "p_index_q", "rows_q", "slots_q", "slots_k", "batch")
            forward.attention_merge[(programs,)](
                p_part=part, p_part_lse=part_lse, p_out=out, p_lse=lse, **{name: runtime[name] for name in names},
                kv_heads=kv_heads, GROUP=group, VALUE_DIM=value.shape[2], BLOCK_DV=constants["BLOCK_DV"],
                BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, SPLITS=splits, SPLIT_KEYS=config.SPLIT_KEYS,
                num_warps=config.MERGE_WARPS,
            )  # fmt: skip
    return out, lse


@tuning.or_shipped
def attention_backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``fastxattn::attention_backward_triton``; the last argument is ``needs``."""
    *arguments_, needs = arguments
    launch = Launch.of(*arguments_)
    problem = launch.problem
    query, key = problem.query, problem.key
    grads = {name: query.new_empty(0) for name in NEEDS}
    wanted = {name for name, bit in NEEDS.items() if needs & bit}
    for name in grads:
        x = getattr(problem, name)
        if name in wanted and x is not None:
            grads[name] = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    if query.numel() and key.shape[0] and launch.batch and out.numel():
        with on_device(query):
            lse = lse.float().contiguous()  # an anchor: the sums make up for what rounding takes
            _launch_backward(launch, dense_rows(grad_out), grad_lse, out.contiguous(), lse, grads, wanted)
    return grads["query"], grads["key"], grads["value"], grads["key_bias"], grads["bias"]


def _launch_backward(
    launch: Launch, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, grads: dict[str, Tensor],
    wanted: set[str],
) -> None:  # fmt: skip
    p = launch.problem
    rows, heads, head_dim = p.query.shape
    need_query, exact = "query" in wanted, p.query.dtype == torch.float32
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    shared = launch.runtime() | launch.gradients(grad_out, lse)
    if exact:
        norm, delta = exact_rows(launch, out, grad_out, lse)
        shared |= {"p_norm": norm, "p_delta": delta if grad_lse is None else delta - grad_lse}
    else:
        shared |= {"p_norm": None, "p_delta": torch.empty_like(lse)}
    if need_query or not exact:
        splits = launch.splits if need_query else 1
        grid, constants = launch.by_rows("backward_query", splits)
        grad_query = grads["query"]
        if splits > 1:
            grad_query = p.query.new_zeros(splits, rows, heads, head_dim, dtype=torch.float32)
        backward.attention_backward_query[grid](
            **shared, p_out=out, p_dlse=grad_lse, p_dq=grad_query, NEED_DQ=need_query, **constants
        )
        if need_query and splits > 1:
            grads["query"].copy_(grad_query.sum(0))
    if wanted & {"key", "value", "key_bias"}:
        _launch_backward_key(launch, shared, grads, wanted)
    if "bias" in wanted and p.bias is not None:
        _launch_backward_bias(launch, shared, grads)


def exact_rows(launch: Launch, out: Tensor, grad_out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """What P adds up to by row and sum P dP, each (heads, rows) float32, as the float32 backward wants them."""
    rows, heads = out.shape[:2]
    splits = launch.splits
    grid, constants = launch.by_rows("backward_query", splits)
    center = (out * grad_out).sum(2).T.contiguous()
    totals, rests = lse.new_zeros(2, splits, heads, rows)
    backward.attention_backward_sums[grid](
        **launch.runtime(), **launch.gradients(grad_out, lse), p_center=center, p_totals=totals, p_rests=rests,
        **constants,
    )  # fmt: skip
    totals = totals.sum(0)
    norm = torch.where(totals == 0, 1.0, totals)
    return norm, center + rests.sum(0) / norm


def _launch_backward_key(launch: Launch, shared: dict[str, Any], grads: dict[str, Tensor], wanted: set[str]) -> None:
    p = launch.problem
    kv_heads = p.key.shape[1]
    tile = launch.tile("backward_key")
    by_slot: dict[str, Tensor | None] = {"key": None, "value": None, "key_bias": None}
    for name, x in (("key", p.key), ("value", p.value), ("key_bias", p.key_bias)):
        if name in wanted and x is not None:
            columns = x.shape[1:] if x.ndim > 1 else (kv_heads,)
            direct = p.key_index is None and x.ndim > 1
            by_slot[name] = grads[name] if direct else x.new_zeros(launch.slots_k, *columns)
    backward.attention_backward_key[(tiles(launch.slots_k, launch.batch, 1, tile.block_n) * kv_heads,)](
        **shared, p_dk=by_slot["key"], p_dv=by_slot["value"], p_dkey_bias=by_slot["key_bias"], **launch.constants(tile)
    )
    for name, slots in by_slot.items():
        if slots is None or slots is grads[name]:
            continue
        slots = slots.sum(1) if slots.ndim > grads[name].ndim else slots
        if p.key_index is None:
            grads[name] = slots
        else:  # several slots may stand for one row
            grads[name].index_add_(0, p.key_index.clamp(0, p.key.shape[0] - 1), slots)


def _launch_backward_bias(launch: Launch, shared: dict[str, Any], grads: dict[str, Tensor]) -> None:
    p = launch.problem
    bias = p.bias
    assert bias is not None
    tile = launch.tile("backward_bias")
    batch, heads, rows, columns = bias.shape
    places_q, places_k = (max(t.shape[0] // launch.batch, 1) for t in (p.query, p.key))
    row_blocks = -(-rows // tile.block_m) if rows > 1 or places_q == 1 else 1
    column_blocks = -(-columns // tile.block_n) if columns > 1 or places_k == 1 else 1
    grad = torch.zeros(bias.shape, dtype=torch.float32, device=bias.device)
    arguments = {k: v for k, v in shared.items() if k not in ("p_index_q", "p_index_k", "kv_heads")}
    backward_bias.attention_backward_bias[(batch * heads * row_blocks * column_blocks,)](
        **arguments,
        p_dbias=grad,
        p_slot_q=_slot_of_row(p.query_index, p.cu_seqlens_q, p.seqused_q, p.query.shape[0]),
        p_slot_k=_slot_of_row(p.key_index, p.cu_seqlens_k, p.seqused_k, p.key.shape[0]),
        heads=p.query.shape[1], bias_heads=heads, bias_rows=rows, bias_columns=columns, places_q=places_q,
        places_k=places_k, BATCH_SHARED=batch == 1 and launch.batch > 1,
        HEADS_SHARED=heads == 1 and p.query.shape[1] > 1,
        ROWS_SHARED=rows == 1 and places_q > 1, COLUMNS_SHARED=columns == 1 and places_k > 1, **launch.constants(tile),
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


def on_device(x: Tensor) -> Any:
    """Kernels launch on the current CUDA device; make it the tensors' own."""
    return torch.cuda.device(x.device) if x.is_cuda else torch.autograd.profiler.record_function("fastxattn")
