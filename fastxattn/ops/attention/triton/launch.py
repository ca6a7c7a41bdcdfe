"""Host side of the Triton attention kernels: allocates, chooses tiles and schedule, launches. Never synchronises."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastxattn.ops.attention.problem import Problem
from fastxattn.ops.attention.triton import backward, forward, tiles
from fastxattn.ops.attention.triton.tiles import Tile, padded_dim
from fastxattn.runtime import tuning
from fastxattn.runtime.cuda import capability

allow_tf32 = False
"""True lets float32 products run on the tensor cores in TF32 (10 bits of mantissa)."""


def precision() -> str:
    """How float32 products are formed."""
    return "tf32" if allow_tf32 else "ieee"


_POINTERS = {
    "p_q": "query",
    "p_k": "key",
    "p_v": "value",
    "p_cu_q": "cu_seqlens_q",
    "p_cu_k": "cu_seqlens_k",
    "p_used_q": "seqused_q",
    "p_used_k": "seqused_k",
    "p_index_q": "query_index",
    "p_index_k": "key_index",
    "p_range": "kv_range",
    "p_key_bias": "key_bias",
    "p_bias": "bias",
    "p_seed": "dropout_seed",
}
"""The kernels' names of the problem's tensors. Numbers keep theirs; the constant of that name in capitals: not 0."""


@dataclass(frozen=True)
class Launch:
    """A problem and what its launches are derived from."""

    problem: Problem

    @staticmethod
    def of(problem: Problem) -> Launch:
        """With last axes made contiguous."""
        dense = {name: dense_rows(getattr(problem, name)) for name in ("query", "key", "value")}
        seed = problem.dropout_seed if problem.dropout_p else None
        return Launch(problem.replace(**dense, dropout_seed=seed))

    @property
    def dims(self) -> tuple[int, int]:
        """Head dim and value dim as the kernels pad them."""
        return padded_dim(self.problem.query.shape[2]), padded_dim(self.problem.value.shape[2])

    def tile(self, kernel: str) -> Tile:
        """The tuned tile, or the shipped one."""
        query = self.problem.query
        kind, dim = tiles.kind_of(query.element_size(), self.problem.rich), max(*self.dims)
        return tuning.tuned("attention", kernel, kind, dim, query.device, Tile) or tiles.pick(
            kernel, kind, dim, ampere(query.device)
        )

    @property
    def splits(self) -> int:
        """Chunks that keys are cut into."""
        p = self.problem
        return tiles.splits_for(p.slots_q, p.slots_k, p.batch, p.group)

    def start(self, kernel: Any, programs: int, tile: Tile, **others: Any) -> None:
        """Launch a kernel with the arguments that it names, of the problem's, the tile's and ``others``."""
        given = self.arguments | self.constants(tile) | others
        options = {"num_warps": warps_of(tile, self.problem.query), "num_stages": tile.stages}
        kernel[(programs,)](**{name: given[name] for name in kernel.arg_names}, **options)

    def start_by_rows(self, kernel: Any, name: str, splits: int, **others: Any) -> None:
        """Launch a kernel whose programs are (tile of rows, key/value head, chunk)."""
        tile, p = self.tile(name), self.problem
        programs = count_tiles(p.slots_q, p.batch, p.group, tile.block_m) * p.key.shape[1] * splits
        self.start(kernel, programs, tile, SPLITS=splits, SPLIT_KEYS=tiles.SPLIT_KEYS, **others)

    @functools.cached_property
    def arguments(self) -> dict[str, Any]:
        """Run-time arguments of kernels."""
        p = self.problem
        given: dict[str, Any] = {name: getattr(p, field) for name, field in _POINTERS.items()}
        given |= {name: getattr(p, name) for name in ("slots_q", "slots_k", "batch", *p.numbers)}
        given |= {"rows_q": p.query.shape[0], "rows_k": p.key.shape[0]}
        given |= {"heads": p.query.shape[1], "kv_heads": p.key.shape[1]}
        for letter, t in (("q", p.query), ("k", p.key), ("v", p.value)):
            given |= {f"stride_{letter}r": t.stride(0), f"stride_{letter}h": t.stride(1)}
        given["stride_key_bias"] = 0 if p.key_bias is None else p.key_bias.stride(0)
        for axis, letter in enumerate("bhqk"):
            full = p.bias is not None and p.bias.shape[axis] > 1
            given[f"stride_bias_{letter}"] = p.bias.stride(axis) if full and p.bias is not None else 0
        return given

    def constants(self, tile: Tile) -> dict[str, Any]:
        """Compile-time arguments of kernels."""
        p = self.problem
        block_d, block_dv = self.dims
        return {name.upper(): getattr(p, name) != 0.0 for name in p.numbers} | {
            "GROUP": p.group,
            "KEY_BIAS_HEADS": p.key_bias is not None and p.key_bias.ndim == 2,
            "HEAD_DIM": p.query.shape[2],
            "VALUE_DIM": p.value.shape[2],
            "BLOCK_D": block_d,
            "BLOCK_DV": block_dv,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "PRECISION": precision(),
        }


@functools.cache
def ampere(device: torch.device) -> bool:
    """Whether a device is of compute capability 8, whose register files and matrix units want smaller tiles."""
    found = capability(device)
    return found is not None and found[0] == 8


def warps_of(tile: Tile, query: Tensor) -> int:
    """Warps to launch a tile with."""
    return tiles.warps_on(tile, query.element_size(), torch.version.hip is not None)


def dense_rows(x: Tensor) -> Tensor:
    """Kernels take any strides whose last axis is contiguous; others are copied once."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def count_tiles(slots: int, batch: int, group: int, block: int) -> int:
    """How many tile numbers there are (see common.py); at most one per sequence is empty."""
    return slots * group // block + batch


@tuning.or_shipped
def attention_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """``fastxattn::attention_triton``; see :mod:`fastxattn.ops.attention.operator`."""
    launch = Launch.of(Problem.of(arguments))
    p, query = launch.problem, launch.problem.query
    rows, heads = query.shape[:2]
    out = query.new_zeros(rows, heads, p.value.shape[2])
    exact = query.dtype == torch.float32
    lse = query.new_full((heads, rows), -torch.inf, dtype=torch.float64 if exact else torch.float32)
    if out.numel() == 0 or p.batch == 0 or p.key.shape[0] == 0:
        return out, lse
    with on_device(query):
        if (splits := launch.splits) == 1:
            launch.start_by_rows(forward.attention_forward, "forward", 1, p_out=out, p_lse=lse)
            return out, lse
        part = query.new_empty(splits, *out.shape, dtype=torch.float32)
        part_lse = lse.new_empty(splits, *lse.shape)
        launch.start_by_rows(forward.attention_forward, "split", splits, p_out=part, p_lse=part_lse)
        tile = dataclasses.replace(launch.tile("split"), warps=tiles.MERGE_WARPS)
        programs = count_tiles(p.slots_q, p.batch, p.group, tile.block_m) * p.key.shape[1]
        chunks = {"SPLITS": splits, "SPLIT_KEYS": tiles.SPLIT_KEYS, "p_part": part, "p_part_lse": part_lse}
        launch.start(forward.attention_merge, programs, tile, p_out=out, p_lse=lse, **chunks)
    return out, lse


@tuning.or_shipped
def attention_backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    """``fastxattn::attention_backward_triton``; the last argument is ``needs``."""
    *fields, needs = arguments
    launch = Launch.of(Problem.of(fields))
    p = launch.problem
    grads = {name: p.query.new_empty(0) for name in p.bits}
    for name, bit in p.bits.items():
        x = getattr(p, name)
        if needs & bit and x is not None:
            grads[name] = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    if p.query.numel() and p.key.shape[0] and p.batch and out.numel():
        with on_device(p.query):
            lse = lse.float().contiguous()  # an anchor: the sums make up for what rounding takes
            _launch_backward(launch, (dense_rows(grad_out), grad_lse, out.contiguous(), lse), grads, needs)
    return tuple(grads.values())


def _launch_backward(
    launch: Launch, results: tuple[Tensor, Tensor | None, Tensor, Tensor], grads: dict[str, Tensor], needs: int
) -> None:
    """``results`` are grad_out, grad_lse, out and lse."""
    p = launch.problem
    grad_out, grad_lse, out, lse = results
    rows, heads, head_dim = p.query.shape
    need_query, exact = bool(needs & p.bits["query"]), p.query.dtype == torch.float32
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    shared = incoming(grad_out, lse)
    if exact:
        norm, delta = exact_rows(launch, out, grad_out, lse)
        shared |= {"p_norm": norm, "p_delta": delta if grad_lse is None else delta - grad_lse}
    else:
        shared |= {"p_norm": None, "p_delta": torch.empty_like(lse)}
    if need_query or not exact:
        splits = launch.splits if need_query else 1
        grad_query = grads["query"]
        if splits > 1:
            grad_query = p.query.new_zeros(splits, rows, heads, head_dim, dtype=torch.float32)
        own = shared | {"p_out": out, "p_dlse": grad_lse, "p_dq": grad_query, "NEED_DQ": need_query}
        launch.start_by_rows(backward.attention_backward_query, "backward_query", splits, **own)
        if need_query and splits > 1:
            grads["query"].copy_(grad_query.sum(0))
    if needs & (p.bits["key"] | p.bits["value"] | p.bits["key_bias"]):
        _launch_backward_key(launch, shared, grads, needs)
    if needs & p.bits["bias"] and p.bias is not None:
        _launch_backward_bias(launch, shared, grads, p.bias)


def incoming(grad_out: Tensor, lse: Tensor) -> dict[str, Any]:
    """Arguments that every backward kernel has besides."""
    return {"p_dout": grad_out, "p_lse": lse, "stride_or": grad_out.stride(0), "stride_oh": grad_out.stride(1)}


def exact_rows(launch: Launch, out: Tensor, grad_out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """What P adds up to by row and sum P dP, each (heads, rows) float32, as the float32 backward needs them."""
    rows, heads = out.shape[:2]
    center = (out * grad_out).sum(2).T.contiguous()
    totals, rests = lse.new_zeros(2, launch.splits, heads, rows)
    own = incoming(grad_out, lse) | {"p_center": center, "p_totals": totals, "p_rests": rests}
    launch.start_by_rows(backward.attention_backward_sums, "backward_query", launch.splits, **own)
    totals = totals.sum(0)
    norm = torch.where(totals == 0, 1.0, totals)
    return norm, center + rests.sum(0) / norm


def _launch_backward_key(launch: Launch, shared: dict[str, Any], grads: dict[str, Tensor], needs: int) -> None:
    p = launch.problem
    kv_heads = p.key.shape[1]
    tile = launch.tile("backward_key")
    by_slot: dict[str, Tensor | None] = {"key": None, "value": None, "key_bias": None}
    for name, x in (("key", p.key), ("value", p.value), ("key_bias", p.key_bias)):
        if needs & p.bits[name] and x is not None:
            columns = x.shape[1:] if x.ndim > 1 else (kv_heads,)
            direct = p.key_index is None and x.ndim > 1
            by_slot[name] = grads[name] if direct else x.new_zeros(p.slots_k, *columns)
    own = {"p_dk": by_slot["key"], "p_dv": by_slot["value"], "p_dkey_bias": by_slot["key_bias"]}
    programs = count_tiles(p.slots_k, p.batch, 1, tile.block_n) * kv_heads
    launch.start(backward.attention_backward_key, programs, tile, **shared, **own)
    for name, slots in by_slot.items():
        if slots is None or slots is grads[name]:
            continue
        slots = slots.sum(1) if slots.ndim > grads[name].ndim else slots
        if p.key_index is None:
            grads[name] = slots
        else:  # several slots may stand for one row
            grads[name].index_add_(0, p.key_index.clamp(0, p.key.shape[0] - 1), slots)


def _launch_backward_bias(launch: Launch, shared: dict[str, Any], grads: dict[str, Tensor], bias: Tensor) -> None:
    p = launch.problem
    tile = launch.tile("backward_bias")
    batch, heads, rows, columns = bias.shape
    places_q, places_k = (max(t.shape[0] // p.batch, 1) for t in (p.query, p.key))
    row_blocks = -(-rows // tile.block_m) if rows > 1 or places_q == 1 else 1
    column_blocks = -(-columns // tile.block_n) if columns > 1 or places_k == 1 else 1
    grad = torch.zeros(bias.shape, dtype=torch.float32, device=bias.device)
    own = {
        "p_dbias": grad,
        "p_slot_q": _slot_of_row(p.query_index, p.cu_seqlens_q, p.seqused_q, p.query.shape[0]),
        "p_slot_k": _slot_of_row(p.key_index, p.cu_seqlens_k, p.seqused_k, p.key.shape[0]),
        "bias_heads": heads,
        "bias_rows": rows,
        "bias_columns": columns,
        "places_q": places_q,
        "places_k": places_k,
        "BATCH_SHARED": batch == 1 and p.batch > 1,
        "HEADS_SHARED": heads == 1 and p.query.shape[1] > 1,
        "ROWS_SHARED": rows == 1 and places_q > 1,
        "COLUMNS_SHARED": columns == 1 and places_k > 1,
    }
    programs = batch * heads * row_blocks * column_blocks
    launch.start(backward.attention_backward_bias, programs, tile, **shared, **own)
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
