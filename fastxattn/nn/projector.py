"""VisualProjector: image features into a language model's width, valid tokens only, with pixel-shuffle."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastxattn.nn.packing import Layout, Tokens, pack
from fastxattn.ops.checks import readable
from fastxattn.packed import PackedTokens


def pixel_shuffle(tokens: PackedTokens, grids: Sequence[tuple[int, int]], factor: int) -> PackedTokens:
    """Merge factor x factor neighbours of each image's grid into one token of factor^2 times the width.

    Args:
        tokens: (total, width); sequence b is a grid of ``grids[b]`` = (rows, columns), row by row.
        grids: rows and columns of each image, multiples of ``factor``.
        factor: how many neighbours to merge along each axis.

    Returns:
        Tokens (total / factor^2, width * factor^2), features ordered (row in block, column in block, feature).

    Raises:
        TypeError: ``factor`` is not an int.
        ValueError: not one grid per image, or one that is no multiple of ``factor`` or whose size is not the image's
            number of tokens (on a GPU only the sum is compared, unless FASTXATTN_VALIDATE=1: looking waits for it).
    """
    if not isinstance(factor, int) or isinstance(factor, bool):
        raise TypeError(f"factor must be an int; got {type(factor).__name__}")
    if factor < 1:
        raise ValueError(f"factor must be at least 1; got {factor}")
    if len(grids) != tokens.batch_size:
        raise ValueError(f"grids must have one entry per image, {tokens.batch_size}; got {len(grids)}")
    if any(rows < 0 or columns < 0 or rows % factor or columns % factor for rows, columns in grids):
        raise ValueError(f"grids must be multiples of factor {factor}, at least 0; got {list(grids)[:8]}")
    if readable(tokens.cu_seqlens):
        for image, (length, (rows, columns)) in enumerate(zip(tokens.lengths.tolist(), grids, strict=True)):
            if rows * columns != length:
                raise ValueError(
                    f"grids must have the length of each image; image {image} has {length} tokens and "
                    f"grid {rows} x {columns}"
                )
    places, start = [], 0
    for rows, columns in grids:
        grid = torch.arange(start, start + rows * columns, device="cpu")
        places.append(grid.view(rows // factor, factor, columns // factor, factor).transpose(1, 2).flatten())
        start += rows * columns
    if start != tokens.values.shape[0]:
        raise ValueError(f"grids must cover the {tokens.values.shape[0]} tokens; they cover {start}")
    order = torch.cat(places).to(tokens.values.device) if places else tokens.cu_seqlens[:0].long()
    merged = tokens.values.index_select(0, order).reshape(-1, tokens.values.shape[1] * factor**2)
    longest = max([0, *(rows * columns // factor**2 for rows, columns in grids)])  # Dynamo knows no default
    return PackedTokens(merged, tokens.cu_seqlens // factor**2, longest)


class VisualProjector(nn.Module):
    """One linear layer or LLaVA's two, after an optional pixel-shuffle and norm; valid tokens only.

    ``state_dict``: ``linear_1`` (and ``linear_2``, ``layer_norm``), the names of ``LlavaMultiModalProjector`` and
    ``InternVLMultiModalProjector``; :meth:`from_hf` shares theirs and ``Idefics3Connector``'s parameters.

    Args:
        in_width: width of the image features.
        out_width: width of the language model.
        layers: 1 or 2.
        shuffle: pixel-shuffle factor; 1 for none.
        norm: layer norm on the (shuffled) features first.
        bias: biases of the linear layers.
        activation: between two layers.

    Source: Liu et al., "Visual instruction tuning", 2023; pixel-shuffle: Chen et al., "InternVL 1.5", 2024.
    """

    def __init__(
        self,
        in_width: int,
        out_width: int,
        *,
        layers: int = 2,
        shuffle: int = 1,
        norm: bool = False,
        bias: bool = True,
        activation: Any = F.gelu,
    ) -> None:
        if layers not in (1, 2):
            raise ValueError(f"layers must be 1 or 2; got {layers}")
        super().__init__()
        self.shuffle, self.activation = shuffle, activation
        width = in_width * shuffle**2
        self.layer_norm = nn.LayerNorm(width) if norm else None
        self.linear_1 = nn.Linear(width, out_width, bias=bias)
        self.linear_2 = nn.Linear(out_width, out_width, bias=bias) if layers == 2 else None

    @classmethod
    def from_hf(cls, module: Any) -> VisualProjector:
        """A projector that shares a LLaVA or InternVL projector's, or an Idefics3 connector's, parameters.

        InternVL shuffles before its projector: pass ``module`` and shuffle the features yourself, or set ``shuffle``.
        """
        state = module.state_dict(keep_vars=True)
        shuffle = getattr(module, "scale_factor", 1)
        if "modality_projection.proj.weight" in state:
            state = {"linear_1.weight": state["modality_projection.proj.weight"]}
        out_width, width = state["linear_1.weight"].shape
        with torch.device("meta"):
            new = cls(
                width // shuffle**2,
                out_width,
                layers=2 if "linear_2.weight" in state else 1,
                shuffle=shuffle,
                norm="layer_norm.weight" in state,
                bias="linear_1.bias" in state,
                activation=getattr(module, "act", F.gelu),
            )
        new.load_state_dict(state, assign=True)
        return new.train(module.training)

    def forward(
        self,
        tokens: Tokens,
        *,
        mask: torch.Tensor | None = None,
        grids: Sequence[tuple[int, int]] | None = None,
    ) -> Tokens:
        """Project.

        Args:
            tokens: (batch, length, in_width) or PackedTokens.
            mask: (batch, length) boolean, True = valid token (without pixel-shuffle).
            grids: rows and columns of each image, for pixel-shuffle; default: square grids of a padded tensor.

        Returns:
            As ``tokens``: (batch, length / shuffle^2, out_width) or PackedTokens.
        """
        packed, layout = pack(tokens, mask, name="tokens")
        if self.shuffle > 1:
            if mask is not None:
                raise ValueError("mask must be None with pixel-shuffle: give PackedTokens and their grids")
            if grids is None:
                if layout.padded is None:
                    raise ValueError("grids must be given to pixel-shuffle PackedTokens")
                side = math.isqrt(layout.padded[1])
                if side * side != layout.padded[1]:
                    raise ValueError(f"grids must be given where images are not square; got {layout.padded[1]} tokens")
                grids = [(side, side)] * layout.padded[0]
            packed = pixel_shuffle(packed, grids, self.shuffle)
            padded = None if layout.padded is None else (layout.padded[0], layout.padded[1] // self.shuffle**2)
            layout = Layout(packed, padded, None)
        states = packed.values if self.layer_norm is None else self.layer_norm(packed.values)
        states = self.linear_1(states)
        if self.linear_2 is not None:
            states = self.linear_2(self.activation(states))
        return layout.restore(states)
