"""The attention function behind ``attn_implementation="fastxattn"``.

transformers calls it by the names ``query, key, value, attention_mask`` with tensors (batch, heads, length, dim).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastxattn.integrations import calls
from fastxattn.integrations.core import attend_padded, attend_rows, torch_streams, worth
from fastxattn.integrations.masks import PackedMask, Visible, recognise
from fastxattn.integrations.transformers.capturing import wants_maps
from fastxattn.integrations.transformers.masking import IntervalMask


@partial(calls.counted, otherwise=calls.of_attention)
def fastxattn_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | PackedMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of query (batch, heads, Lq, D) over key and value (batch, kv_heads, Lk, D | Dv).

    ``is_causal`` counts only where the caller passes it and no mask says more: the attribute of the same name on
    modules is not read. Attention maps (``output_attentions=True``) are computed plainly, from the dense formula.
    Queries that see no key give 0; with a ``position_bias`` they average all values, as with transformers' sdpa.

    Returns (batch, Lq, heads, Dv) and the attention map or None.

    Raises:
        ValueError: an argument whose meaning would be lost: attention sinks, or a paged cache.
    """
    if cache is not None:
        raise ValueError(
            "attn_implementation='fastxattn' does not run paged caches; use 'sdpa' for continuous batching"
        )
    if kwargs.get("s_aux") is not None or kwargs.get("sinks") is not None:
        raise ValueError("attn_implementation='fastxattn' does not implement attention sinks; use 'eager'")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    softcap = kwargs.get("softcap") or 0.0
    if isinstance(attention_mask, PackedMask):
        out = attend_rows(query, key, value, attention_mask, scale=scale, softcap=softcap, dropout_p=dropout)
        return out, None
    batch = max(query.shape[0], key.shape[0])
    if is_causal and attention_mask is None and query.shape[2] > 1:
        attention_mask = _causal(query.shape[2], key.shape[2], query.device)
    if wants_maps(module, None, kwargs):
        return _with_weights(query, key, value, attention_mask, position_bias, scale, softcap, dropout)
    if position_bias is None and not softcap and not worth(query, key):
        return _sdpa(query, key, value, attention_mask, scale, dropout), None
    if isinstance(attention_mask, IntervalMask):
        visible = attention_mask.visible
        if attention_mask.causal and torch_runs_causal(query) and position_bias is None and not softcap:
            return _sdpa(query, key, value, None, scale, dropout, causal=True), None
    else:
        visible = recognise(attention_mask, batch, query.shape[2], key.shape[2])
    if position_bias is not None and not softcap and _blind(visible):
        return _sdpa(query, key, value, _biased(attention_mask, position_bias), scale, dropout), None
    bias = None if position_bias is None or _is_zero(position_bias) else position_bias
    if visible.everything and bias is None and not softcap and torch_streams(query, key):
        return _sdpa(query, key, value, None, scale, dropout), None
    return attend_padded(query, key, value, visible, bias=bias, scale=scale, softcap=softcap, dropout_p=dropout), None


def torch_runs_causal(query: Tensor) -> bool:
    """Whether a causal mask over all tokens goes to torch's kernel: on GPUs, as in the original model."""
    return query.is_cuda


def _causal(queries: int, keys: int, device: torch.device) -> Tensor:
    """(1, 1, Lq, Lk): torch's alignment, the first query sees the first key."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril()[None, None]


def _blind(visible: Visible) -> bool:
    """Whether some query sees no key, or all keys at one score; not read in a trace or on other devices."""
    tensors = (visible.bias, visible.ranges, visible.keys)
    if torch.compiler.is_compiling() or any(t is not None and t.device.type != "cpu" for t in tensors):
        return False
    if visible.uniform is not None or visible.literal:
        return True
    if visible.bias is not None:
        return bool((visible.bias == -torch.inf).all(-1).any())
    if (ranges := visible.packed_ranges()) is not None:
        return bool((ranges[:, 0] >= ranges[:, 1]).any())
    return visible.keys is not None and not bool(visible.keys.any(1).all())


def _biased(mask: Tensor | None, position_bias: Tensor) -> Tensor:
    """Mask and bias in one, hidden keys at the lowest finite number."""
    if mask is None or mask.dtype != torch.bool:
        return position_bias if mask is None else position_bias + mask
    return torch.where(mask, position_bias, torch.finfo(position_bias.dtype).min)


def _is_zero(position_bias: Tensor) -> bool:
    # T5's cross-attention passes a bias of zeros; a trainable one is never looked into.
    return (
        not position_bias.requires_grad
        and position_bias.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not bool(position_bias.any())
    )


def _repeat(key: Tensor, heads: int) -> Tensor:
    return key if key.shape[1] == heads else key.repeat_interleave(heads // key.shape[1], dim=1)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dropout: float, causal: bool = False
) -> Tensor:
    """torch's own kernel, for problems too small or of a kind that the package's would not speed up."""
    gqa = bool(k.shape[1] != q.shape[1])  # while exporting, a symbol
    if mask is not None and mask.dtype == torch.bool and mask.shape[0] == 1 and k.shape[0] > 1:
        mask = mask.expand(k.shape[0], -1, -1, -1)
    if q.shape[0] != k.shape[0]:
        batch = max(q.shape[0], k.shape[0])
        q, k, v = (t.expand(batch, -1, -1, -1) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=scale, enable_gqa=gqa)
    return out.transpose(1, 2)


def _with_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    position_bias: Tensor | None,
    scale: float,
    softcap: float,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    scores = query @ _repeat(key, query.shape[1]).mT * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if position_bias is not None:
        scores, mask = scores + _biased(mask, position_bias), None
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    # Rows without keys give zeros, not the NaN of a softmax over nothing.
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).nan_to_num(nan=0.0).to(query.dtype)
    weights = F.dropout(weights, dropout, dropout > 0)
    return (weights @ _repeat(value, query.shape[1])).transpose(1, 2), weights
