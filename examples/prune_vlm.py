"""Prune the image tokens of a vision-language model before and inside its language model: what it saves.

    python examples/prune_vlm.py [--layers 4] [--rounds 5] [--out docs/images/example_prune_vlm.png]

The model is transformers' LLaVA with random weights and a photograph as its image: times are real, answers are not.
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from fastxattn import prune_model
from fastxattn.runtime.timing import interleaved

IMAGE_TOKEN, SIDE, PATCH = 999, 336, 14
TOKENS = (SIDE // PATCH) ** 2


def build(layers: int) -> Any:
    """A LLaVA of 576 image tokens, narrow enough for a quick run."""
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=layers,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
    )
    text = transformers.LlamaConfig(
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=layers,
        num_attention_heads=8,
        vocab_size=1000,
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN, vision_feature_layer=-2
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


def photograph() -> Tensor:
    """(3, 336, 336) in [0, 1]: a picture that scikit-image carries."""
    from skimage import data, transform

    picture = transform.resize(data.astronaut(), (SIDE, SIDE), anti_aliasing=True)
    return torch.tensor(picture, dtype=torch.float32).permute(2, 0, 1)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--out", type=Path, default=Path("docs/images/example_prune_vlm.png"))
    options = parser.parse_args()
    model, picture = build(options.layers), photograph()
    words = torch.randint(5, 990, (32,), generator=torch.Generator().manual_seed(0))
    inputs = {
        "input_ids": torch.cat([torch.tensor([1]), torch.full((TOKENS,), IMAGE_TOKEN), words])[None],
        "pixel_values": (picture[None] - 0.45) / 0.27,
    }
    whole = model(**inputs).logits[0, -1]
    places: dict[str, dict[str, Any]] = {
        "before the language model": {"strategy": "divprune"},
        f"in the language model, layer {options.layers // 2}": {"strategy": "attention", "at": options.layers // 2},
    }
    times, kept = {"unpruned": 1.0}, {}
    for name, how in places.items():
        with prune_model(model, keep=options.keep, **how) as pruning:
            pruned = model(**inputs).logits[0, -1]
            kept[name] = pruning.last.keep_index.clone()

        def shortened(how: dict[str, Any] = how) -> object:
            with prune_model(model, keep=options.keep, **how):
                return model(**inputs)

        found = interleaved({"unpruned": lambda: model(**inputs), name: shortened}, rounds=options.rounds)
        ratio = found[name].ratio_to(found["unpruned"])
        times[name] = 1 / ratio
        agree = torch.nn.functional.cosine_similarity(pruned, whole, dim=0).item()
        print(f"{name}: {len(kept[name])} of {TOKENS} tokens, {ratio:.2f}x, cosine of the last logits {agree:.3f}")
    draw(picture, times, kept, options.out)


def draw(picture: Tensor, times: dict[str, float], kept: dict[str, Tensor], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 1 + len(kept), figsize=(3.6 * (1 + len(kept)), 3.4))
    bars = axes[0].bar(range(len(times)), times.values(), color="tab:blue")
    axes[0].bar_label(bars, fmt="%.2f", fontsize=8)
    axes[0].set_xticks(range(len(times)), [textwrap.fill(n, 13) for n in times], fontsize=7)
    axes[0].set_ylabel("time of a prompt, unpruned = 1")
    for axis, (name, index) in zip(axes[1:], kept.items(), strict=True):
        mask = torch.zeros(TOKENS)
        mask[index.long()] = 1
        side = SIDE // PATCH
        mask = mask.view(side, side).repeat_interleave(PATCH, 0).repeat_interleave(PATCH, 1)
        axis.imshow((picture * (0.2 + 0.8 * mask) + 0.3 * (1 - mask)).permute(1, 2, 0).clamp(0, 1).numpy())
        axis.set_axis_off()
        axis.set_title(f"{name}: {len(index)} of {TOKENS}", fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
