"""The mask function registered beside the attention function.

Without one, transformers hands *no mask at all* to an attention implementation it does not know. It must return four
axes (a 2-D mask breaks SigLIP2 and Pix2Struct); for "which keys exist" that is a stride-0 expansion over the queries,
which costs nothing and from which :func:`fastxattn.integrations.masks.recognise` reads the lengths.

A causal mask is always made, never left to ``is_causal``: that attribute is True on modules that are not causal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils


def fastxattn_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """(batch, 1, Lq, Lk) boolean, True = sees; None: everything is visible. Arguments as transformers passes them."""
    if mask_function is not masking_utils.bidirectional_mask_function:
        kwargs["allow_is_causal_skip"] = False
        return masking_utils.sdpa_mask(  # type: ignore
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_bidirectional_skip=False,
            device=device,
            **kwargs,
        )
    present = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if present is None:
        if allow_is_bidirectional_skip:
            return None
        present = torch.ones(1, kv_length, dtype=torch.bool, device=device)
    present = present[:, kv_offset : kv_offset + kv_length].to(torch.bool)
    return present[:, None, None, :].expand(batch_size, 1, q_length, kv_length)  # type: ignore
