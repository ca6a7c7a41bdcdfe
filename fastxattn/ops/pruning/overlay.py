"""A picture of what a strategy keeps of a photograph: ``fastxattn prune PHOTO --out FILE``."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fastxattn.ops.pruning.budget import Budget
from fastxattn.ops.pruning.scores import received_scores
from fastxattn.ops.pruning.selection import Selection
from fastxattn.ops.pruning.strategies import NEEDS_ATTENTION, STRATEGIES

PATCH, LONG_SIDE, FREQUENCIES = 16, 448, 6


def patch_tokens(pixels: Tensor) -> Tensor:
    """(rows * columns, channels) descriptors of the patches of ``pixels`` (3, height, width) in [0, 1].

    Lowest cosine coefficients of each patch and colour: no trained model is at hand here, and these say what a patch
    looks like (flat, edge, texture, colour). Constant parts weigh little, so that contrast decides.
    """
    grid = pixels.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)  # [3, rows, columns, PATCH, PATCH]
    place = torch.arange(PATCH) + 0.5
    waves = torch.cos(torch.arange(FREQUENCIES)[:, None] * place * torch.pi / PATCH)  # [FREQUENCIES, PATCH]
    features = torch.einsum("crsyx,fy,gx->rscfg", grid, waves, waves) / PATCH
    features[..., 0, 0] = (features[..., 0, 0] - features[..., 0, 0].mean((0, 1))) / 4
    return features.flatten(2).flatten(0, 1)


def select_patches(pixels: Tensor, strategy: str, keep: float) -> tuple[Selection, int, int]:
    """What ``strategy`` keeps of a picture (3, height, width), and its rows and columns of patches."""
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}; got {strategy!r}")
    if not 0 < keep <= 1:
        raise ValueError(f"keep must lie in (0, 1]; got {keep}")
    tokens = patch_tokens(pixels)
    rows, columns = pixels.shape[1] // PATCH, pixels.shape[2] // PATCH
    offsets = torch.tensor([0, tokens.shape[0]], dtype=torch.int32)
    needs = {}
    if strategy in NEEDS_ATTENTION:
        # Attention of patches to patches by likeness; the least expected patch is the most interesting one.
        unit = torch.nn.functional.normalize(tokens, dim=1)[:, None]
        received = received_scores(unit, unit, offsets, scale=8.0)
        needs["attention"] = (received.max() - received) + 1e-6
    budget = Budget.count(max(1, round(keep * tokens.shape[0])))
    return STRATEGIES[strategy](tokens, offsets, budget, **needs), rows, columns


def prune_photo(path: str | Path, out: str | Path, strategy: str = "divprune", keep: float = 0.25) -> tuple[int, int]:
    """Draw the patches of a photograph that a strategy keeps; the others fade.

    Args:
        path: the photograph, any format that Pillow reads.
        out: the picture to write.
        strategy: a name of ``fastxattn.ops.pruning.STRATEGIES``, or ``"all"`` for one panel each.
        keep: share of the patches (16 x 16 pixels after scaling the long side to 448).

    Returns:
        Patches kept and patches in all (of the last panel).

    Raises:
        ValueError: an unknown strategy, or ``keep`` outside (0, 1].
        FileNotFoundError: no photograph at ``path``.
        ImportError: matplotlib or Pillow is missing (``pip install fastxattn[bench]``).
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np
    from PIL import Image

    with Image.open(path) as photo:
        factor = LONG_SIDE / max(photo.size)
        width, height = (max(PATCH, round(side * factor / PATCH) * PATCH) for side in photo.size)
        pixels = torch.from_numpy(np.array(photo.convert("RGB").resize((width, height)))).permute(2, 0, 1) / 255.0
    names = [name for name in STRATEGIES if name != "tome" or keep >= 0.5] if strategy == "all" else [strategy]
    across = min(4, len(names))
    down = -(-len(names) // across)
    figure, axes = plt.subplots(
        down, across, figsize=(3.6 * across, 3.6 * down * height / width + 0.4 * down), squeeze=False
    )
    kept, total = 0, 0
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, name in zip(axes.flat, names, strict=False):
        selection, rows, columns = select_patches(pixels, name, keep)
        kept, total = selection.rows, rows * columns
        mask = torch.zeros(total)
        mask[selection.keep_index.long()] = 1
        mask = mask.view(rows, columns).repeat_interleave(PATCH, 0).repeat_interleave(PATCH, 1)
        shown = pixels * (0.18 + 0.82 * mask) + 0.30 * (1 - mask)
        axis.imshow(shown.permute(1, 2, 0).clamp(0, 1).numpy())
        axis.set_title(f"{name}: {kept} of {total}", fontsize=9)
    figure.tight_layout()
    figure.savefig(out, dpi=80)
    plt.close(figure)
    return kept, total
