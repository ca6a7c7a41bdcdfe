"""Train two small models twice, eager and accelerated, from the same seed: the loss curves coincide.

    python examples/train_parity.py [--steps 150] [--out docs/images/train_parity.png]

Scenes are canvases of different sizes with coloured shapes; captions name them, so both images and texts are ragged.
The first model is BLIP-2-style (patches -> Q-Former -> words of the caption), the second a CLIP.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

import fastxattn

COLOURS, SHAPES, PATCH, END = 6, 4, 8, 19
WORDS = COLOURS + SHAPES


@dataclass
class Scenes:
    """A batch: pictures (batch, 3, side, side) with the patches that exist, captions with their words."""

    pixels: Tensor
    sizes: Tensor
    ids: Tensor
    words: Tensor


def scenes(batch: int, generator: torch.Generator, side: int = 64) -> Scenes:
    """Scenes with 1 to 4 objects on canvases of 24 to ``side`` pixels, in the top left corner of the picture."""
    palette = torch.rand(COLOURS, 3, generator=torch.Generator().manual_seed(5)) * 2 - 1
    pixels, sizes = torch.zeros(batch, 3, side, side), torch.zeros(batch, dtype=torch.long)
    ids, words = torch.full((batch, 10), END), torch.zeros(batch, WORDS)
    for b in range(batch):
        sizes[b] = size = PATCH * int(torch.randint(3, side // PATCH + 1, (1,), generator=generator))
        pixels[b, :, :size, :size] = torch.randn(3, size, size, generator=generator) * 0.2
        for n in range(int(torch.randint(1, 5, (1,), generator=generator))):
            draw = torch.randint(0, 1000, (4,), generator=generator).tolist()
            colour, shape = draw[0] % COLOURS, draw[1] % SHAPES
            y, x = (PATCH * (d % (size // PATCH)) for d in draw[2:])
            grid = torch.arange(PATCH)
            stamp = [
                torch.ones(PATCH, PATCH, dtype=torch.bool),
                grid[:, None] >= grid,
                ((grid[:, None] - 3.5) ** 2 + (grid - 3.5) ** 2) < 13,
                (grid[:, None] + grid) % 4 < 2,
            ][shape]
            pixels[b, :, y : y + PATCH, x : x + PATCH] = torch.where(stamp, palette[colour][:, None, None], 0.0)
            ids[b, 2 * n : 2 * n + 2] = torch.tensor([1 + colour, 1 + COLOURS + shape])
            words[b, colour] = words[b, COLOURS + shape] = 1
    return Scenes(pixels, sizes, ids, words)


class Blip2Style(nn.Module):
    """Patches of a ragged batch of images, read by a Q-Former whose queries name the caption's words."""

    def __init__(self) -> None:
        super().__init__()
        config = hf.Blip2QFormerConfig(
            hidden_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=192,
            encoder_hidden_size=192,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.queries = nn.Parameter(torch.randn(1, 8, 96) * 0.02)
        self.position = nn.Parameter(torch.randn(1, 64, 192) * 0.02)
        self.qformer = hf.Blip2QFormerModel(config)
        self.head = nn.Linear(96, WORDS)

    def forward(self, batch: Scenes) -> Tensor:
        patches = F.unfold(batch.pixels, PATCH, stride=PATCH).transpose(1, 2) + self.position
        side = batch.pixels.shape[-1] // PATCH
        place, per_side = torch.arange(side), batch.sizes[:, None] // PATCH
        there = ((place < per_side)[:, :, None] & (place < per_side)[:, None]).flatten(1)
        queries = self.queries.expand(len(patches), -1, -1)
        out = self.qformer(queries, encoder_hidden_states=patches, encoder_attention_mask=there.long())
        return F.binary_cross_entropy_with_logits(self.head(out.last_hidden_state.mean(1)), batch.words)


class SmallClip(nn.Module):
    """A CLIP of transformers with its own contrastive loss."""

    def __init__(self) -> None:
        super().__init__()
        small = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 192}
        text = {**small, "vocab_size": 20, "max_position_embeddings": 10, "eos_token_id": END, "bos_token_id": 0}
        vision = {**small, "image_size": 64, "patch_size": PATCH}
        self.clip = hf.CLIPModel(
            hf.CLIPConfig(text_config={**text, "pad_token_id": END}, vision_config=vision, projection_dim=64)
        )

    def forward(self, batch: Scenes) -> Tensor:
        return self.clip(input_ids=batch.ids, pixel_values=batch.pixels, return_loss=True).loss  # type: ignore[no-any-return]


def saved_bytes(step: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass, each storage once."""
    seen: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        step()
    return sum(seen.values())


def train(make: Callable[[], nn.Module], fast: bool, steps: int, batch: int = 32) -> dict[str, Any]:
    """Losses, seconds per step and bytes kept for the backward pass."""
    torch.manual_seed(0)
    model = make().train()
    if fast:
        print(fastxattn.accelerate(model, exact=False))  # CLIP's text is read at its end token only
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-4)
    generator, losses, seconds = torch.Generator().manual_seed(1), [], []
    memory = saved_bytes(lambda: model(scenes(batch, torch.Generator().manual_seed(2))))
    for _ in range(steps):
        data = scenes(batch, generator)
        start = time.perf_counter()
        loss = model(data)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    return {"losses": losses, "seconds": sorted(seconds)[len(seconds) // 2], "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", type=Path, default=Path("docs/images/train_parity.png"))
    options = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    for axis, (name, make) in zip(axes, (("BLIP-2-style", Blip2Style), ("CLIP", SmallClip)), strict=True):
        eager, fast = (train(make, fast, options.steps) for fast in (False, True))
        gap = max(abs(a - b) for a, b in zip(eager["losses"], fast["losses"], strict=True))
        print(
            f"{name}: largest difference of the losses {gap:.2g} over {options.steps} steps; last "
            f"{eager['losses'][-1]:.4f} and {fast['losses'][-1]:.4f}; {eager['seconds'] * 1e3:.0f} ms and "
            f"{fast['seconds'] * 1e3:.0f} ms per step; {eager['memory'] / 2**20:.0f} MiB and "
            f"{fast['memory'] / 2**20:.0f} MiB kept for backward"
        )
        axis.plot(eager["losses"], label="eager", linewidth=3, alpha=0.4)
        axis.plot(fast["losses"], label="accelerated", linewidth=1)
        axis.set_title(f"{name}: largest difference {gap:.1g}", fontsize=10)
        axis.set_xlabel("step")
        axis.set_ylabel("loss")
        axis.legend(fontsize=8)
    figure.tight_layout()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=110)


if __name__ == "__main__":
    main()
