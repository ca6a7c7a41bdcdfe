"""Patches of a photograph without a model: what ``fastxattn prune`` applies strategies to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastxattn import visualize
from fastxattn.ops.pruning import Budget, Selection, received_scores
from fastxattn.ops.pruning.strategies import STRATEGIES, find_strategy

if TYPE_CHECKING:
    from PIL.Image import Image

LONG_SIDE = 448  # pixels that the long side is scaled to, about
SIDE = 14  # of a patch, in pixels
FREQUENCIES = 6


@dataclass
class Patches:
    """A photograph cut into patches, row by row, with the features that strategies need."""

    photo: Image
    grid: tuple[int, int]
    tokens: Tensor  # (rows * columns, channels)
    attention: Tensor  # (rows * columns,) that each patch receives

    def select(self, strategy: str, keep: float) -> Selection:
        """Apply ``strategy`` with a budget of a share ``keep`` of the patches."""
        chosen, total = find_strategy(strategy), self.tokens.shape[0]
        known = {"attention": self.attention, "columns": self.grid[1]}
        needs: dict[str, Any] = {name: known[name] for name in chosen.needs if name in known}
        budget, offsets = Budget.count(max(1, round(keep * total))), torch.tensor([0, total], dtype=torch.int32)
        return chosen(self.tokens, offsets, budget, protected=None, max_seqlen=total, **needs)


def read_photo(path: str | Path) -> Image:
    """The photograph in RGB: the long side scaled to about 448 pixels, both sides multiples of a patch."""
    from PIL import Image, ImageOps

    with Image.open(path) as opened:
        photo = ImageOps.exif_transpose(opened).convert("RGB")
    factor = LONG_SIDE / max(photo.size)
    width, height = (max(SIDE, round(side * factor / SIDE) * SIDE) for side in photo.size)
    return photo.resize((width, height))


def patches_of(photo: Image) -> Patches:
    """Describe patches by their lowest cosine coefficients in each colour: flat, edge, texture, colour.

    Constant parts weigh little, so that contrast decides. Attention is the similarity among patches, inverted: the
    patch that resembles the fewest others receives most.
    """
    import numpy as np

    pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1) / 255.0
    blocks = pixels.unfold(1, SIDE, SIDE).unfold(2, SIDE, SIDE)  # (3, rows, columns, side, side)
    waves = torch.cos(torch.arange(FREQUENCIES)[:, None] * (torch.arange(SIDE) + 0.5) * torch.pi / SIDE)
    features = torch.einsum("crsyx,fy,gx->rscfg", blocks, waves, waves) / SIDE
    features[..., 0, 0] = (features[..., 0, 0] - features[..., 0, 0].mean((0, 1))) / 4
    tokens = features.flatten(2).flatten(0, 1)
    unit = torch.nn.functional.normalize(tokens, dim=1)[:, None]
    received = received_scores(unit, unit, torch.tensor([0, len(tokens)], dtype=torch.int32), scale=8.0)
    rows, columns = blocks.shape[1:3]
    return Patches(photo, (rows, columns), tokens, received.max() - received + 1e-6)


def prune_photo(path: str | Path, out: str | Path, strategies: Sequence[str], keep: float) -> list[str]:
    """Draw what strategies keep of a photograph, one panel each; returns the panels' titles.

    Args:
        path: the photograph, any format that Pillow reads.
        out: the picture to write; its ending decides the format (png, jpg, webp, pdf).
        strategies: names of ``fastxattn.ops.pruning.STRATEGIES``; all when empty or ``["all"]``.
        keep: share of the patches, in (0, 1].

    Raises:
        ValueError: an unknown strategy, or ``keep`` outside (0, 1].
        FileNotFoundError: no photograph at ``path``.
        ImportError: Pillow is missing.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep must lie in (0, 1]; got {keep}")
    names = list(STRATEGIES) if list(strategies) in ([], ["all"]) else list(strategies)
    if unknown := [name for name in names if name not in STRATEGIES]:
        raise ValueError(f"strategy must be all or one of {', '.join(STRATEGIES)}; got {unknown[0]!r}")
    patches = patches_of(read_photo(path))
    pictures = {"the photograph": patches.photo}
    for name in names:
        chosen = patches.select(name, keep)
        title = f"{name}: {chosen.rows} of {len(patches.tokens)}"
        pictures[title] = visualize.kept_patches(patches.photo, chosen, patches.grid)
    caption = "pale: dropped; flat colour: merged. Scores: patch frequencies, no trained model"
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    visualize.panels(pictures, caption=caption).save(out)
    return list(pictures)[1:]
