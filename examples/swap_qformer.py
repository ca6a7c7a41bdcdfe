"""Swap BLIP-2's Q-Former in one line: checked against float64, timed against the share of padding, swapped back.

    python examples/swap_qformer.py [--layers 12] [--rounds 5] [--out build/swap_qformer.png]

The class is transformers' own with random weights; images are random features of different lengths.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import transformers

import fastxattn
from fastxattn.runtime.timing import interleaved

QUERIES, WIDTH = 32, 1408


def inputs(model: torch.nn.Module, lengths: list[int]) -> dict[str, torch.Tensor]:
    """A padded batch of images with ``lengths`` patches each."""
    generator = torch.Generator().manual_seed(0)
    hidden = model.config.hidden_size
    return {
        "query_embeds": torch.randn(len(lengths), QUERIES, hidden, generator=generator) * 0.02,
        "encoder_hidden_states": torch.randn(len(lengths), max(lengths), WIDTH, generator=generator),
        "encoder_attention_mask": (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long(),
    }


def batches(size: int, longest: int) -> dict[str, list[int]]:
    """The same longest image each time, the others shorter and shorter."""
    shares = {"no padding": 1.0, "a quarter": 0.5, "half": 0.0}
    return {
        name: torch.linspace(longest * low, longest, size).round().int().clamp(min=1).tolist()
        for name, low in shares.items()
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--longest", type=int, default=512, help="patches of the largest image")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("build/swap_qformer.png"))
    options = parser.parse_args()
    sizes = batches(options.batch, options.longest)
    torch.manual_seed(0)
    config = transformers.Blip2QFormerConfig(num_hidden_layers=options.layers)
    model = transformers.Blip2QFormerModel(config).eval()

    # One line. `verify` runs both and a float64 copy, and undoes the swap if it were wrong or slower.
    report = fastxattn.accelerate(model, verify=inputs(model, sizes["half"]))
    print(report)
    fastxattn.restore(model)

    times: dict[str, list[float]] = {"transformers": [], "fastxattn": []}
    for name, lengths in sizes.items():
        batch = inputs(model, lengths)
        fast = transformers.Blip2QFormerModel(config).eval()
        fast.load_state_dict(model.state_dict())
        fastxattn.accelerate(fast)
        found = interleaved(
            {"transformers": lambda b=batch: model(**b), "fastxattn": lambda b=batch, f=fast: f(**b)},
            rounds=options.rounds,
        )
        for provider, timing in found.items():
            times[provider].append(timing.median * 1e3)
        ratio = found["fastxattn"].ratio_to(found["transformers"])
        print(f"{name:<12} padding {1 - sum(lengths) / len(lengths) / max(lengths):.0%}: {ratio:.2f}x")
    draw(times, list(sizes), options.out)


def draw(times: dict[str, list[float]], names: list[str], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3))
    for i, (provider, values) in enumerate(times.items()):
        bars = axes.bar([n + 0.38 * i for n in range(len(names))], values, 0.36, label=provider)
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
    axes.set_xticks([n + 0.19 for n in range(len(names))], [f"{n} is padding" if n != names[0] else n for n in names])
    axes.set_ylabel("ms per batch")
    axes.margins(y=0.25)
    axes.legend(fontsize=8, frameon=False, loc="upper left", ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
