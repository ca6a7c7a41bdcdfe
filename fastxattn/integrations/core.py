"""Between the layouts models use and the packed rows the ops take; shared by all adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastxattn.integrations import calls
from fastxattn.integrations.masks import PackedMask, Visible, hides_a_row, recognise
from fastxattn.nn.projected import ContextKV, KeyValueWeights, attend, cross_attend
from fastxattn.ops.attention import cross_attention, varlen_cross_attention
from fastxattn.packed import PackedTokens
from fastxattn.runtime import env, native

# Scores below which a call costs more to set up than any kernel can win back.
SMALL = 4096


def worth(query: Tensor, key: Tensor) -> bool:
    """Whether the fastxattn kernel would run this problem (batch, heads, length, dim) faster than torch's.

    An exported graph serves every size, so the example's size does not decide there.
    """
    if torch.compiler.is_exporting():
        return query.shape[-1] <= 256
    if env.default_backend == "reference":
        return True
    reason = _why_not(query, key)
    if reason:
        calls.note(reason)
    return not reason


def _why_not(query: Tensor, key: Tensor) -> str:
    if query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the kernels take no {query.dtype}"
    if query.shape[-1] > 256:
        return "its head_dim is above 256"
    if query.device.type == "cuda":
        return ""
    if query.device.type != "cpu":
        return f"there is no kernel for device {query.device.type!r}"
    if native.cpu_library().library is None:
        return "the CPU library is not installed (see `fastxattn env`)"
    if query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2] < SMALL:
        return "the problem is too small to gain"
    return ""


def torch_streams(query: Tensor, key: Tensor) -> bool:
    """Whether torch's kernel is the faster one for one query per key head that sees all keys.

    Both only read keys and values then. Without AVX-512, torch's float32 kernel reads them 1.3 to 1.4 times as fast.
    """
    if query.device.type != "cpu" or query.dtype != torch.float32 or torch.compiler.is_compiling():
        return False
    one = query.shape[2] == 1 and query.shape[1] == key.shape[1]
    faster = one and native.narrow_cpu_vectors()
    if faster:
        calls.note("torch's kernel reads keys and values faster for one query per head")
    return faster


def torch_takes_bias(query: Tensor, visible: Visible) -> bool:
    """Whether torch's kernel is the faster one for a dense bias: on a GPU, in 16 bits.

    There the mask cannot be read for its structure without waiting for the device, so no work can be saved, and the
    fastxattn kernel with a bias made BLIP-2's Q-Former take twice as long (H200).
    """
    plain = visible.keys is None and visible.ranges is None and visible.uniform is None
    return plain and query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)


def attend_padded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Visible,
    *,
    bias: Tensor | None = None,
    scale: float,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attention of (batch, heads, Lq, D) over (batch, kv_heads, Lk, D | Dv); returns (batch, Lq, heads, Dv)."""
    batch = max(query.shape[0], key.shape[0])
    if query.shape[0] != key.shape[0]:
        query, key, value = (t.expand(batch, -1, -1, -1) for t in (query, key, value))
    if visible.bias is not None:
        bias = visible.bias if bias is None else bias + visible.bias
    if visible.literal and not softcap:
        calls.note("only torch's arithmetic averages over rows of finfo.min that differ by head")
        return _torch_attention(query, key, value, bias, scale, dropout_p)
    if bias is not None and torch_takes_bias(query, visible) and not softcap:
        calls.note("torch's kernel is faster for a dense bias in 16 bits on a GPU")
        empty = (bias == -torch.inf).all(-1, keepdim=True)  # rows that see nothing give 0, there NaN
        out = _torch_attention(query, key, value, bias.masked_fill(empty, 0), scale, dropout_p)
        return out.masked_fill(empty.transpose(1, 2), 0)
    calls.served()
    if visible.uniform is not None:
        query = query.masked_fill(visible.uniform[:, None, :, None], 0)
    keys, ranges = visible.keys, visible.ranges
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "dropout_p": dropout_p}
    kv_heads = key.shape[2]
    if bias is None and not _flat(key) and key.transpose(1, 2).is_contiguous():
        # A key/value cache, (batch, kv_heads, length, dim) in memory: each of its heads is a sequence, uncopied.
        query = query.unflatten(2, (kv_heads, -1)).transpose(1, 2).flatten(0, 1)  # (batch * kv_heads, Lq, group, D)
        key, value = (t.transpose(1, 2).flatten(0, 1)[:, :, None] for t in (key, value))
        keys = None if keys is None else keys.repeat_interleave(kv_heads, 0)
        ranges = None if ranges is None else ranges.repeat_interleave(kv_heads, 0)
        out = cross_attention(query, key, value, key_mask=keys, kv_range=ranges, **options)
        return out.unflatten(0, (batch, kv_heads)).transpose(1, 2).flatten(2, 3)  # type: ignore
    return cross_attention(query, key, value, key_mask=keys, kv_range=ranges, bias=bias, **options)  # type: ignore


def _torch_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, dropout_p: float
) -> Tensor:
    gqa = key.shape[1] != query.shape[1]
    bias = None if bias is None else bias.to(query.dtype)
    out = F.scaled_dot_product_attention(query, key, value, bias, dropout_p, scale=scale, enable_gqa=gqa)
    return out.transpose(1, 2)


def _flat(tokens: Tensor) -> bool:
    """Whether (batch, length, ...) is rows at one distance from each other."""
    return tokens.shape[0] == 1 or tokens.stride(0) == tokens.shape[1] * tokens.stride(1)


def attend_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: PackedMask,
    *,
    scale: float,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attention over packed keys (1, kv_heads, total_k, D); queries padded or packed as ``mask`` says.

    Returns (batch, Lq, heads, Dv), or (1, total_q, heads, Dv).
    """
    calls.served()
    batch, _, length, _ = query.shape
    query, key, value = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
    offsets, longest = query_offsets(mask, batch, length, query.device)
    out = varlen_cross_attention(
        query,
        key,
        value,
        offsets,
        mask.cu_seqlens_k,
        longest,
        mask.max_seqlen_k,
        scale=scale,
        softcap=softcap,
        kv_range=mask.kv_range,
        dropout_p=dropout_p,
    )
    return out.unflatten(0, (batch, length))  # type: ignore


def query_offsets(mask: PackedMask, batch: int, length: int, device: torch.device) -> tuple[Tensor, int]:
    """Offsets and longest length of the queries that ``mask`` goes with."""
    if mask.cu_seqlens_q is not None:
        return mask.cu_seqlens_q, mask.max_seqlen_q
    return torch.arange(batch + 1, dtype=torch.int32, device=device) * length, length


def pack_keys(tokens: Tensor, keys: Tensor | None) -> PackedTokens:
    """The tokens (batch, length, width) that ``keys`` (batch, length) marks as valid."""
    return PackedTokens.from_padded(tokens, keys)


# torch.nn.MultiheadAttention's output layer has a class of its own, with nothing of its own.
_PLAIN = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)


def plain_type(module: nn.Module) -> bool:
    """Whether the class is ``nn.Linear``'s own: not an adapter's, a parametrised or a quantised one."""
    return type(module) in _PLAIN


def plain_linear(*modules: nn.Module) -> bool:
    """Whether each is an ``nn.Linear`` and nothing more, so that its weight can be used in another way than calling it.

    Hooks, adapters (LoRA), parametrisations and quantised layers must be called as they are.
    """
    return all(
        plain_type(m)
        and not (m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)
        and "forward" not in vars(m)
        for m in modules
    )


@dataclass(frozen=True)
class Called:
    """Key and value projections that must be called as they are (see :func:`plain_linear`)."""

    key: nn.Module
    value: nn.Module

    def project(self, context: PackedTokens, heads: int, value: PackedTokens | None = None) -> ContextKV:
        """Keys of ``context``'s rows and values of ``value``'s, (total_k, heads, D)."""
        source = context if value is None else value
        k, v = self.key(context.values), self.value(source.values)
        return ContextKV(
            k.unflatten(-1, (heads, -1)), v.unflatten(-1, (heads, -1)), context.cu_seqlens, context.max_seqlen
        )


Projections = KeyValueWeights | Called


def projections(key: nn.Linear, value: nn.Linear) -> Projections:
    """The two layers as weights, which may be absorbed, or as modules to call."""
    return KeyValueWeights.of(key, value) if plain_linear(key, value) else Called(key, value)


def read(
    query: Tensor,
    features: Tensor,
    mask: Tensor | PackedMask | None,
    weights: Projections,
    *,
    heads: int,
    scale: float,
    dropout_p: float = 0.0,
    values: Tensor | None = None,
) -> Tensor | None:
    """Multi-head attention of projected queries over raw features: only valid features are projected.

    Args:
        query: (batch, Lq, heads * D), projected.
        features: (batch, Lk, d_in), or packed (1, total_k, d_in) with a :class:`PackedMask`.
        mask: as the model has it; boolean True = sees.
        weights: the key and value projections.
        heads: number of heads.
        scale: of the scores.
        dropout_p: on the weights.
        values: features that the values are made of, when not ``features``; padded ones only.

    Returns:
        (batch, Lq, heads * Dv), or None for a problem too small to gain.
    """
    batch, length, _ = query.shape
    value_rows = None
    if isinstance(mask, PackedMask):
        packed = PackedTokens(features[0], mask.cu_seqlens_k, mask.max_seqlen_k)
    else:
        split = query.unflatten(-1, (heads, -1)).transpose(1, 2)
        if not worth(split, features[:, None]) and not (split.shape[-1] <= 256 and hides_a_row(mask)):
            return None
        visible = recognise(mask, batch, length, features.shape[1])
        packed = PackedTokens.from_padded(features, visible.keys)
        value_rows = None if values is None else PackedTokens.from_padded(values, visible.keys)
        if visible.bias is not None:
            kv = weights.project(packed, heads, value_rows)
            k, v = (t.unflatten(0, features.shape[:2]).transpose(1, 2) for t in (kv.key, kv.value))
            return attend_padded(split, k, v, visible, scale=scale, dropout_p=dropout_p).flatten(2)
        if visible.uniform is not None:
            query = query.masked_fill(visible.uniform[..., None], 0)
        mask = PackedMask(packed.cu_seqlens, packed.max_seqlen, kv_range=visible.packed_ranges())
    calls.served()
    offsets, longest = query_offsets(mask, batch, length, query.device)
    rows = query.reshape(batch * length, heads, -1)
    layout = PackedTokens(rows, offsets, longest)
    if isinstance(weights, KeyValueWeights):
        out = cross_attend(
            rows, layout, packed, weights, value=value_rows, kv_range=mask.kv_range, scale=scale, dropout_p=dropout_p
        )
    else:
        kv = weights.project(packed, heads, value_rows)
        out = attend(rows, layout, kv, kv_range=mask.kv_range, scale=scale, dropout_p=dropout_p)
    return out.view(batch, length, -1)
