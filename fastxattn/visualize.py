"""Pictures of token pruning: kept patches and importance over an image.

Every function returns a ``PIL.Image.Image``: notebooks show it, ``.save("kept.png")`` writes it. Needs Pillow
(``pip install 'fastxattn[visualize]'``).

Example::

    >>> import torch, fastxattn
    >>> from skimage import data
    >>> from fastxattn import visualize
    >>> photo = data.astronaut()  # (512, 512, 3) uint8
    >>> patches = torch.tensor(photo).unfold(0, 32, 32).unfold(1, 32, 32).float()  # (16, 16, 3, 32, 32)
    >>> scores = patches.std((2, 3, 4)).flatten()  # contrast; in a model: fastxattn.key_importance
    >>> offsets = torch.tensor([0, 256], dtype=torch.int32)
    >>> kept = fastxattn.select_tokens(scores, offsets, fastxattn.Budget.ratio(0.25))
    >>> pictures = {
    ...     "importance": visualize.importance_map(photo, scores, grid=(16, 16)),
    ...     "64 of 256 patches": visualize.kept_patches(photo, kept, grid=(16, 16)),
    ... }
    >>> visualize.panels(pictures).size
    (1072, 552)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastxattn.ops.pruning import Selection

if TYPE_CHECKING:
    from PIL.Image import Image

HEAT = ((0, 0, 4), (58, 12, 96), (137, 34, 106), (212, 72, 66), (251, 146, 17), (252, 255, 164))
"""Colours of a heat map from the lowest to the highest score; colours between are interpolated."""
GAP, TITLE = 16, 24  # pixels between panels, height of a title


def kept_patches(
    image: Any, kept: Selection | Tensor, grid: tuple[int, int], *, prefix: int = 0, sequence: int = 0
) -> Image:
    """Draw which patches of an image a pruning step kept.

    Kept patches are shown as they are, merged ones in the average colour of the row that they were merged into, dropped
    ones pale.

    Args:
        image: (3, height, width) or (height, width, 3) uint8 or in [0, 1], as a tensor, array or ``PIL.Image``.
        kept: a :class:`fastxattn.Selection`, or a tensor of this image: (prefix + patches,) bool, or indices of tokens.
        grid: rows and columns of patches; patches are numbered row by row.
        prefix: tokens before the patches, such as CLS and registers.
        sequence: of a selection of several images, the one to draw.

    Raises:
        ValueError: ``kept`` is of another number of tokens, or ``image`` has another shape.
        ImportError: Pillow is missing.
    """
    pixels, place = _canvas(image, grid)
    patches = grid[0] * grid[1]
    colours = torch.zeros(patches, 3).index_add_(0, place.flatten(), pixels.flatten(0, 1))
    colours /= place.flatten().bincount(minlength=patches)[:, None]
    kept = kept.to(torch.device("cpu"))
    if isinstance(kept, Selection):
        index, stands, merged = _drawn(kept, colours, prefix, sequence)
    else:
        if kept.dtype == torch.bool and kept.shape != (prefix + patches,):
            raise ValueError(f"kept must have shape ({prefix + patches},); got {tuple(kept.shape)}")
        index = kept.nonzero().flatten() if kept.dtype == torch.bool else kept.long()
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < prefix + patches:
            raise ValueError(f"kept must hold indices in 0..{prefix + patches - 1}; got {index.tolist()}")
        stands, merged = torch.zeros(patches, dtype=torch.bool), colours
    index = index[index >= prefix] - prefix
    shown = torch.zeros(patches, dtype=torch.bool)
    shown[index] = True
    pale = 0.80 + 0.14 * pixels.mean(2, keepdim=True).expand_as(pixels)
    gone = torch.where(stands[place][..., None], 0.45 * merged[place] + 0.52, pale)
    return _picture(torch.where(shown[place][..., None], pixels, gone))


def _drawn(kept: Selection, colours: Tensor, prefix: int, sequence: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of one sequence: kept tokens, (patches,) whether a row stands for the patch, (patches, 3) that row's colour."""
    if not 0 <= sequence < len(kept):
        raise ValueError(f"sequence must lie in 0..{len(kept) - 1}; got {sequence}")
    start, end = kept.source_cu_seqlens[sequence : sequence + 2].tolist()
    if end - start != prefix + len(colours):
        raise ValueError(
            f"kept must have {prefix + len(colours)} tokens (prefix and grid) in sequence {sequence}; got {end - start}"
        )
    tokens = torch.zeros(kept.assignment.shape[0], 3)
    tokens[start:end] = torch.cat([colours.mean(0).expand(prefix, 3), colours])
    kept = replace(kept, average=True)  # a weighted sum of colours would be too dark
    merged = kept.scatter_back(kept.reduce(tokens), fill="zero")
    index = kept.keep_index[(kept.keep_index >= start) & (kept.keep_index < end)].long() - start
    patches = slice(start + prefix, end)
    return index, kept.assignment[patches] >= 0, merged[patches]


def importance_map(
    image: Any, scores: Tensor, grid: tuple[int, int], *, prefix: int = 0, opacity: float = 0.6
) -> Image:
    """Draw scores of patches as a heat map over an image, from the lowest (dark) to the highest (bright).

    Args:
        image: as in :func:`kept_patches`.
        scores: (prefix + patches,) floating point, for example of :func:`fastxattn.key_importance`. NaN and infinite
            scores count as the lowest.
        grid: rows and columns of patches; patches are numbered row by row.
        prefix: tokens before the patches, such as CLS and registers; their scores are not drawn.
        opacity: of the heat map, in [0, 1].

    Raises:
        ValueError: a shape or ``opacity`` is wrong.
        ImportError: Pillow is missing.
    """
    pixels, place = _canvas(image, grid)
    if scores.shape != (prefix + grid[0] * grid[1],):
        raise ValueError(f"scores must have shape ({prefix + grid[0] * grid[1]},); got {tuple(scores.shape)}")
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity must lie in [0, 1]; got {opacity}")
    drawn = scores[prefix:].detach().cpu().double()
    finite = drawn[drawn.isfinite()]
    low, high = (float(finite.min()), float(finite.max())) if finite.numel() else (0.0, 0.0)
    level = torch.where(drawn.isfinite(), (drawn - low) / ((high - low) or 1.0), 0.0) * (len(HEAT) - 1)
    below = level.floor().clamp(0, len(HEAT) - 2).long()
    table = torch.tensor(HEAT) / 255
    heat = torch.lerp(table[below], table[below + 1], (level - below).float()[:, None])[place]
    grey = pixels.mean(2, keepdim=True).expand_as(pixels)
    return _picture(torch.lerp(grey, heat, opacity))


def panels(pictures: Mapping[str, Image], *, columns: int = 4, caption: str = "") -> Image:
    """Put pictures of equal size beside one another, each under its title.

    Args:
        pictures: by title.
        columns: panels in a row.
        caption: a line below all.

    Raises:
        ValueError: no pictures, or pictures of different sizes.
        ImportError: Pillow is missing.
    """
    from PIL import Image, ImageDraw, ImageFont

    sizes = {picture.size for picture in pictures.values()}
    if len(sizes) != 1:
        raise ValueError(f"pictures must have one size; got {sorted(sizes)}")
    (width, height), across = sizes.pop(), min(columns, len(pictures))
    down = math.ceil(len(pictures) / across)
    step_x, step_y = width + GAP, height + GAP + TITLE
    sheet = Image.new("RGB", (across * step_x + GAP, down * step_y + (TITLE if caption else 0)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    for n, (title, picture) in enumerate(pictures.items()):
        left, top = GAP + n % across * step_x, n // across * step_y
        pen.text((left, top + 4), title, fill="black", font=font)
        sheet.paste(picture, (left, top + TITLE))
    if caption:
        pen.text((GAP, down * step_y), caption, fill="#555555", font=font)
    return sheet


def _canvas(image: Any, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(height, width, 3) float32 in [0, 1], and the patch of every pixel: (height, width)."""
    if isinstance(image, Tensor):
        pixels = image.detach().cpu()
    else:
        import numpy as np  # arrays and Pillow's images both need it

        pixels = torch.from_numpy(np.array(image.convert("RGB") if hasattr(image, "convert") else image))
    if pixels.ndim == 3 and pixels.shape[0] == 3 and pixels.shape[2] != 3:
        pixels = pixels.permute(1, 2, 0)
    if pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"image must have shape (3, height, width) or (height, width, 3); got {tuple(pixels.shape)}")
    height, width = pixels.shape[:2]
    if not (1 <= grid[0] <= height and 1 <= grid[1] <= width):
        raise ValueError(f"grid must have 1 to {height} rows and 1 to {width} columns; got {grid}")
    pixels = pixels / 255.0 if pixels.dtype == torch.uint8 else pixels.float().clamp(0, 1)
    row, column = torch.arange(height) * grid[0] // height, torch.arange(width) * grid[1] // width
    return pixels, row[:, None] * grid[1] + column


def _picture(pixels: Tensor) -> Image:
    from PIL import Image

    return Image.fromarray((pixels * 255).round().to(torch.uint8).numpy())
