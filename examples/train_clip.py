"""Train a small CLIP with a batch that is large for the machine: encoders in chunks, no N x N logits.

    python examples/train_clip.py [--batch 1024] [--steps 20] [--out docs/images/example_train_clip.png]

The scenes and captions are those of ``examples/search.py``. Afterwards the peak memory of the loss is measured against
the batch, beside the formula that builds the logits.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from search import COLOURS, SHAPES, DualEncoder, Thing, Words, caption, draw, random_things
from torch import Tensor

import fastxattn
from fastxattn.distributed import cached_backward
from fastxattn.runtime.timing import peak_extra_bytes


def data(count: int) -> tuple[Tensor, Tensor, Tensor, Words]:
    """Scenes, their captions as word numbers, and the number of each distinct caption (equal ones are positives)."""
    generator = torch.Generator().manual_seed(0)
    things = [random_things(generator) for _ in range(count)]
    captions = [caption(t) for t in things]
    words = Words([caption((Thing(c, s), Thing(c, s))) for c in COLOURS for s in SHAPES])
    numbers = {text: i for i, text in enumerate(dict.fromkeys(captions))}
    images = torch.stack([draw(t, generator) for t in things])
    return images, words(captions), torch.tensor([numbers[text] for text in captions]), words


def train(batch: int, steps: int, chunk: int) -> list[float]:
    """Losses of the steps."""
    images, captions, ids, words = data(batch)
    torch.manual_seed(0)
    model = DualEncoder(len(words.index) + 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []

    def loss(image: Tensor, text: Tensor, log_scale: Tensor) -> Tensor:
        return fastxattn.multi_positive_infonce_loss(image, text, log_scale.exp(), groups=ids, normalize=True)

    for _ in range(steps):
        optimizer.zero_grad()
        value = cached_backward(
            (model.encode_images, model.encode_captions),
            (images, captions),
            loss,
            chunk=chunk,
            parameters=(model.log_scale,),
        )
        optimizer.step()
        losses.append(value.item())
    return losses


def formula(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """CLIP's loss as it is usually written."""
    logits, labels = scale * a @ b.T, torch.arange(len(a))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def memory(sizes: list[int]) -> dict[str, list[float]]:
    """Peak extra MiB of loss and gradients, by batch size."""
    found: dict[str, list[float]] = {"the formula": [], "fastxattn": []}
    for n in sizes:
        a, b = (F.normalize(torch.randn(n, 64), dim=1).requires_grad_() for _ in range(2))
        for name, loss in (("the formula", formula), ("fastxattn", fastxattn.infonce_loss)):
            peak = peak_extra_bytes(lambda a=a, b=b, f=loss: torch.autograd.grad(f(a, b, 10.0), (a, b)))
            found[name].append(float("nan") if peak is None else peak / 2**20)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--out", type=Path, default=Path("docs/images/example_train_clip.png"))
    options = parser.parse_args()
    losses, peaks = train(options.batch, options.steps, options.chunk), memory(options.sizes)
    print(f"batch {options.batch} in chunks of {options.chunk}: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    for name, values in peaks.items():
        print(f"{name:<12} " + ", ".join(f"{v:.0f} MiB at {n}" for n, v in zip(options.sizes, values, strict=True)))
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3))
    axes[0].plot(losses)
    axes[0].set(xlabel=f"step, batch {options.batch}", ylabel="loss")
    for name, values in peaks.items():
        axes[1].plot(options.sizes, values, marker="o", ms=4, label=name)
    axes[1].set(xscale="log", yscale="log", xlabel="batch", ylabel="peak extra memory, MiB")
    axes[1].set_xticks(options.sizes, options.sizes)
    axes[1].minorticks_off()
    axes[1].legend(fontsize=8, frameon=False)
    figure.tight_layout()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=110)


if __name__ == "__main__":
    main()
