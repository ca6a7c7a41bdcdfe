"""What pruning costs in accuracy: a small ViT, trained here, on digits in noise and on photographs.

    python benchmarks/pruning_retention.py [--quick]

Two tasks on real images that need no download: scikit-learn's handwritten digits, each placed somewhere on a large
noisy canvas (the label is the digit), and crops of scikit-image's photographs (the label is the photograph;
test crops come
from a part that training never saw). A ViT of transformers is trained on each, then pruned by every strategy, without
retraining. Writes benchmarks/results/pruning_retention.csv and docs/images/pruning_retention.png.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastxattn.integrations.pruning import prune
from fastxattn.ops.pruning import Budget

ROOT = Path(__file__).resolve().parents[1]
SIZE, PATCH, AT = 64, 8, 2
TOKENS = (SIZE // PATCH) ** 2
SHARES = (0.5, 0.25, 0.11)
NAMES = (
    "attention",
    "evit",
    "visionzip",
    "prumerge",
    "divprune",
    "cdpruner",
    "tome",
    "pool",
    "uniform",
    "norm",
    "random",
)
Batch = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]


def digit_batches() -> tuple[Batch, Batch, int]:
    """Training and test images; the 597 test digits are never trained on."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images / 16.0, dtype=torch.float32)
    images = torch.nn.functional.interpolate(images[:, None], scale_factor=2.0, mode="bilinear")[:, 0]
    labels = torch.tensor(data.target)
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))

    def draw(rows: Tensor) -> Batch:
        def batch(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            chosen = rows[torch.randint(len(rows), (n,), generator=generator)]
            side = images.shape[-1]
            canvas = torch.randn(n, SIZE, SIZE, generator=generator) * 0.25
            corner = torch.randint(0, (SIZE - side) // PATCH + 1, (n, 2), generator=generator) * PATCH
            for i, (y, x) in enumerate(corner.tolist()):
                canvas[i, y : y + side, x : x + side] += 1.5 * images[chosen[i]]
            return canvas[:, None], labels[chosen]

        return batch

    return draw(shuffled[:1200]), draw(shuffled[1200:]), 10


def photo_batches() -> tuple[Batch, Batch, int]:
    """Crops of scikit-image photographs: left 60 % for training, right 40 % for testing."""
    from skimage import data
    from skimage.color import rgb2gray
    from skimage.transform import rescale

    names = (
        "astronaut",
        "brick",
        "camera",
        "chelsea",
        "coffee",
        "coins",
        "grass",
        "gravel",
        "moon",
        "page",
        "rocket",
        "text",
    )
    photos = []
    for name in names:
        photo = getattr(data, name)()
        photo = rgb2gray(photo) if photo.ndim == 3 else photo / 255.0
        factor = max(1.0, 260 / photo.shape[1] / 0.9, 110 / photo.shape[0])
        photos.append(torch.tensor(rescale(photo, factor) if factor > 1 else photo, dtype=torch.float32))

    def draw(test: bool) -> Batch:
        def batch(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            label = torch.randint(len(photos), (n,), generator=generator)
            crops = []
            for i in label.tolist():
                height, width = photos[i].shape
                split = int(0.6 * width)
                low, high = (split, width - SIZE) if test else (0, split - SIZE)
                x = int(torch.randint(low, max(high, low) + 1, (1,), generator=generator))
                y = int(torch.randint(0, height - SIZE + 1, (1,), generator=generator))
                crops.append(photos[i][y : y + SIZE, min(x, width - SIZE) : min(x, width - SIZE) + SIZE])
            pixels = torch.stack(crops)
            mean, std = pixels.mean((1, 2), keepdim=True), pixels.std((1, 2), keepdim=True)
            return ((pixels - mean) / (std + 0.05))[:, None], label

        return batch

    return draw(False), draw(True), len(photos)


def train(batch: Batch, classes: int, steps: int) -> torch.nn.Module:
    """A ViT of 3 layers and 64 channels on patches of 8 pixels."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128, image_size=SIZE,
        patch_size=PATCH, num_channels=1, num_labels=classes, hidden_dropout_prob=0.0,
    )  # fmt: skip
    model, generator = ViTForImageClassification(config), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    for step in range(steps):
        pixels, labels = batch(48, generator)
        loss = torch.nn.functional.cross_entropy(model(pixels).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"  step {step}: loss {loss.item():.3f}", flush=True)
    return model.eval()


@torch.no_grad()
def outputs(model: torch.nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Predicted classes and the CLS features behind them."""
    classes, features = [], []
    for part in pixels.split(100):
        out = model(part, output_hidden_states=True)
        classes.append(out.logits.argmax(1))
        features.append(out.hidden_states[-1][:, 0])
    return torch.cat(classes), torch.cat(features)


def interval(values: Tensor) -> float:
    """Half the width of the 95 % confidence interval of a mean."""
    return float(1.96 * values.double().std() / len(values) ** 0.5)


def measure(task: str, model: torch.nn.Module, test: Batch, images: int) -> list[dict[str, object]]:
    pixels, labels = test(images, torch.Generator().manual_seed(2))
    whole, reference = outputs(model, pixels)
    right = (whole == labels).float()
    rows: list[dict[str, object]] = [row(task, "unpruned", 1.0, right, torch.ones(images), right - right)]
    for name in NAMES:
        for share in SHARES:
            count = round(TOKENS * share)
            if name == "tome" and count < TOKENS // 2:
                continue  # one ToMe step removes at most half
            with prune(model, keep=Budget.count(count), strategy=name, at=AT):
                classes, features = outputs(model, pixels)
            correct = (classes == labels).float()
            agreement = torch.nn.functional.cosine_similarity(features, reference)
            rows.append(row(task, name, share, correct, agreement, correct - right))
            print("  ", rows[-1], flush=True)
    return rows


def row(task: str, name: str, share: float, correct: Tensor, agreement: Tensor, change: Tensor) -> dict[str, object]:
    fields: dict[str, object] = {"task": task, "strategy": name, "keep": share, "images": len(correct)}
    for field, values in (("accuracy", correct), ("feature_cosine", agreement), ("accuracy_change", change)):
        fields[field], fields[f"{field}_ci95"] = f"{float(values.mean()):.4f}", f"{interval(values):.4f}"
    return fields


def plot(rows: list[dict[str, object]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = list(dict.fromkeys(str(r["task"]) for r in rows))
    figure, axes = plt.subplots(1, len(tasks), figsize=(6 * len(tasks), 4.4), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        mine = [r for r in rows if r["task"] == task]
        axis.axhline(float(str(mine[0]["accuracy"])), color="black", lw=1, ls="--", label="unpruned")
        for i, name in enumerate(NAMES):
            points = [r for r in mine if r["strategy"] == name]
            x = [float(str(r["keep"])) * (1 + 0.012 * (i - len(NAMES) / 2)) for r in points]
            y, e = ([float(str(r[k])) for r in points] for k in ("accuracy", "accuracy_ci95"))
            axis.errorbar(x, y, e, marker="o", ms=3, lw=1, capsize=2, label=name, color=plt.cm.tab20(i))
        axis.set(xscale="log", xlabel="share of tokens kept", ylabel="accuracy", title=task)
        axis.set_xticks(SHARES, [f"{100 * s:.0f} %" for s in SHARES], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][-1].legend(fontsize=7, ncols=2)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few training steps: checks the script, proves nothing")
    quick = parser.parse_args().quick
    rows: list[dict[str, object]] = []
    for task, make, steps in (("digits in noise", digit_batches, 900), ("photograph crops", photo_batches, 200)):
        batch, test, classes = make()
        print(task, flush=True)
        model = train(batch, classes, 3 if quick else steps)
        rows += measure(task, model, test, 60 if quick else 1000)
    if quick:
        return
    path = ROOT / "benchmarks/results/pruning_retention.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, ROOT / "docs/images/pruning_retention.png")


if __name__ == "__main__":
    np.random.seed(0)
    main()
