"""Train a small dual encoder from scratch and search with it: images by caption and captions by image.

    python examples/search.py [--out build/search] [--steps 300] [--seed 0] [--json]

The encoder is trained, in seconds, with :func:`fastxattn.multi_positive_infonce_loss` on rendered scenes of
coloured shapes and their captions, then on crops of real photographs. Recall is measured on unseen scenes and crops,
before and after training, in both directions, with :func:`fastxattn.ops.retrieval.topk_similarity`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from fastxattn.ops.contrastive import multi_positive_infonce_loss
from fastxattn.ops.retrieval import recall_at_k, topk_similarity

COLOURS = {"red": (0.9, 0.1, 0.1), "green": (0.1, 0.8, 0.2), "blue": (0.15, 0.25, 0.95), "yellow": (0.95, 0.9, 0.1)}
SHAPES = ("circle", "square", "triangle", "cross")
SIZE, LENGTH = 32, 16  # pixels a side, words a caption

PHOTOGRAPHS = {
    "astronaut": "an astronaut in an orange suit before a flag",
    "chelsea": "a tabby cat looking at the camera",
    "coffee": "a cup of coffee on a wooden table",
    "rocket": "a rocket on its launch pad at night",
    "hubble_deep_field": "galaxies in deep space",
    "retina": "the retina of an eye",
    "immunohistochemistry": "stained tissue under a microscope",
    "camera": "a photographer with a camera on a lawn",
    "coins": "old coins in rows",
    "page": "a page of printed text",
    "brick": "a wall of bricks",
    "grass": "grass seen from above",
    "moon": "craters on the moon",
}


@dataclass(frozen=True)
class Thing:
    """One coloured shape."""

    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


def draw(things: tuple[Thing, ...], generator: torch.Generator) -> Tensor:
    """A (3, 32, 32) scene: one thing anywhere, or two side by side, on a grey ground with noise."""
    image = torch.full((3, SIZE, SIZE), 0.5) + 0.06 * torch.randn(3, SIZE, SIZE, generator=generator)
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    slot = SIZE // len(things)
    for place, thing in enumerate(things):
        radius = 4 + int(torch.randint(0, 3, (1,), generator=generator))
        free = slot - 2 * radius
        cx = place * slot + radius + int(torch.randint(0, max(1, free), (1,), generator=generator))
        cy = radius + int(torch.randint(0, SIZE - 2 * radius, (1,), generator=generator))
        dx, dy = (x - cx).float(), (y - cy).float()
        inside = {
            "circle": dx**2 + dy**2 <= radius**2,
            "square": (dx.abs() <= 0.85 * radius) & (dy.abs() <= 0.85 * radius),
            "triangle": (dy.abs() <= radius) & (dx.abs() <= (dy + radius) / 2),
            "cross": (torch.minimum(dx.abs(), dy.abs()) <= 1.3) & (torch.maximum(dx.abs(), dy.abs()) <= radius),
        }[thing.shape]
        image[:, inside] = torch.tensor(COLOURS[thing.colour])[:, None]
    return image


def caption(things: tuple[Thing, ...]) -> str:
    """What a scene shows, in words."""
    return f"a {things[0]}" if len(things) == 1 else f"a {things[0]} left of a {things[1]}"


def random_things(generator: torch.Generator) -> tuple[Thing, ...]:
    """One thing, or two, drawn evenly from all colours and shapes."""
    pick = torch.randint(0, 16, (2,), generator=generator).tolist()
    things = tuple(Thing(list(COLOURS)[p // 4], SHAPES[p % 4]) for p in pick)
    return things[: 1 + int(torch.randint(0, 4, (1,), generator=generator) > 0)]


class Words:
    """A vocabulary: every word of the captions it was made from; others share one unknown word."""

    def __init__(self, captions: list[str]) -> None:
        """Number the words in alphabetical order; 0 is padding and 1 the unknown word."""
        self.index = {word: i + 2 for i, word in enumerate(sorted({w for c in captions for w in c.split()}))}

    def __call__(self, captions: list[str]) -> Tensor:
        """(captions, LENGTH) word numbers."""
        rows = torch.zeros(len(captions), LENGTH, dtype=torch.long)
        for row, text in zip(rows, captions, strict=True):
            for place, word in enumerate(text.split()[:LENGTH]):
                row[place] = self.index.get(word, 1)
        return rows


class DualEncoder(nn.Module):
    """Images and captions into one space: three convolutions, and words that know their place."""

    def __init__(self, words: int, features: int = 64) -> None:
        super().__init__()
        self.image = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.GELU()),
            *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.GELU()),
            *(nn.Conv2d(32, 48, 3, stride=2, padding=1), nn.GELU()),
            *(nn.Flatten(), nn.Linear(48 * 16, 128), nn.GELU(), nn.Linear(128, features)),
        )
        self.words = nn.Embedding(words, 64, padding_idx=0)
        self.places = nn.Parameter(1 + 0.5 * torch.randn(LENGTH, 64))
        self.text = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, features))
        self.log_scale = nn.Parameter(torch.tensor(2.66))

    def encode_images(self, images: Tensor) -> Tensor:
        """(N, features), not normalised: the loss and the search do that."""
        features: Tensor = self.image(images - 0.5)
        return features

    def encode_captions(self, words: Tensor) -> Tensor:
        """(N, features) of (N, LENGTH) word numbers."""
        features: Tensor = self.text((self.words(words) * self.places).sum(1) / 2)
        return features


@dataclass
class Report:
    """What the search example found; ``recall`` maps a set's name to its figures."""

    recall: dict[str, dict[str, float]] = field(default_factory=dict)
    queries: dict[str, list[str]] = field(default_factory=dict)
    compositional: dict[str, bool] = field(default_factory=dict)
    heat_map: str = ""

    def __str__(self) -> str:
        lines = ["recall"]
        for name, figures in self.recall.items():
            lines.append(f"  {name:<34}" + "  ".join(f"{k} {v:.2f}" for k, v in figures.items()))
        lines.append("searches")
        lines += [f"  {query!r:<44} -> {'; '.join(found)}" for query, found in self.queries.items()]
        lines.append("told apart")
        lines += [f"  {case:<60} {'yes' if right else 'NO'}" for case, right in self.compositional.items()]
        return "\n".join([*lines, f"similarity heat map: {self.heat_map}"] if self.heat_map else lines)


def train(model: DualEncoder, words: Words, batches: int, sample: object, size: int = 192) -> None:
    """``batches`` steps on ``sample(size) -> (images, captions)``; equal captions are positives of each other."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=batches)
    for _ in range(batches):
        images, captions = sample(size)  # type: ignore[operator]
        numbers = {text: i for i, text in enumerate(dict.fromkeys(captions))}
        ids = torch.tensor([numbers[text] for text in captions])
        image_side, text_side = model.encode_images(images), model.encode_captions(words(captions))
        scale = model.log_scale.exp().clamp(max=50)
        loss = multi_positive_infonce_loss(image_side, text_side, scale, groups=ids, normalize=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def features(model: DualEncoder, words: Words, images: Tensor, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Both sides of a test set."""
    return model.encode_images(images), model.encode_captions(words(captions))


def photographs() -> dict[str, Tensor]:
    """Real photographs that scikit-image carries with it, (3, H, W) in [0, 1], by caption."""
    from skimage import data

    found = {}
    for name, text in PHOTOGRAPHS.items():
        try:
            image = torch.from_numpy(getattr(data, name)().copy()).float() / 255
        except Exception:  # not carried by this installation, and there may be no network to fetch it from
            continue
        image = image.expand(3, *image.shape) if image.dim() == 2 else image[..., :3].permute(2, 0, 1)
        found[text] = image.contiguous()
    return found


def crop(image: Tensor, unseen: bool, generator: torch.Generator) -> Tensor:
    """A 32 x 32 view of a random square: from the left three fifths for training, the right two fifths for tests."""
    _, height, width = image.shape
    low, high = (int(0.6 * width), width) if unseen else (0, int(0.6 * width))
    side = int(min(height, high - low) * (0.6 + 0.4 * torch.rand(1, generator=generator).item()))
    top = int(torch.randint(0, height - side + 1, (1,), generator=generator))
    left = low + int(torch.randint(0, high - low - side + 1, (1,), generator=generator))
    square = image[None, :, top : top + side, left : left + side]
    return nn.functional.interpolate(square, size=(SIZE, SIZE), mode="area")[0]


def run(
    output: Path | str | None = None,
    *,
    seed: int = 0,
    steps: int = 300,
    progress: Callable[[str], None] = lambda text: None,
) -> Report:
    """Train, search and measure; with ``output`` also write ``similarity.png`` and ``search.json`` there.

    Args:
        output: folder of the heat map and the figures; None writes nothing.
        seed: of the scenes, the split and the weights.
        steps: training steps on scenes; photographs take half as many more.
        progress: told what happens next.

    Raises:
        ValueError: ``steps`` is below 1.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1; got {steps}")
    progress("rendering scenes")
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    photos = photographs()
    scene_words = [caption((Thing(c, s), Thing(c, s))) for c in COLOURS for s in SHAPES]
    words = Words([*scene_words, *photos])
    model = DualEncoder(len(words.index) + 2)
    report = Report()

    def scenes(size: int) -> tuple[Tensor, list[str]]:
        things = [random_things(generator) for _ in range(size)]
        return torch.stack([draw(t, generator) for t in things]), [caption(t) for t in things]

    def distinct(size: int) -> tuple[Tensor, list[str]]:
        things = list(dict.fromkeys(random_things(generator) for _ in range(4 * size)))[:size]
        return torch.stack([draw(t, generator) for t in things]), [caption(t) for t in things]

    test_images, test_captions = distinct(100)
    report.recall["scenes, before training"] = recall_at_k(*features(model, words, test_images, test_captions), (1, 5))
    pool = scenes(2048)  # rendering costs more than training: draw once, then sample from it

    def from_pool(size: int) -> tuple[Tensor, list[str]]:
        rows = torch.randint(0, len(pool[1]), (size,), generator=generator)
        return pool[0][rows], [pool[1][i] for i in rows.tolist()]

    progress(f"learning {steps} batches of scenes")
    train(model, words, steps, from_pool)
    image_side, text_side = features(model, words, test_images, test_captions)
    report.recall["scenes, after training"] = recall_at_k(image_side, text_side, (1, 5))
    _search_scenes(report, model, words, test_images, test_captions)
    _compose(report, model, words, generator)
    if output is not None:
        report.heat_map = _heat_map(Path(output), image_side[:16], text_side[:16], test_captions[:16])
    if photos:
        progress(f"learning crops of {len(photos)} photographs")
        _photographs(report, model, words, photos, from_pool, generator, steps)
    if output is not None:
        facts = {"recall": report.recall, "queries": report.queries, "compositional": report.compositional}
        (Path(output) / "search.json").write_text(json.dumps(facts, indent=2))
    return report


@torch.no_grad()
def _search_scenes(report: Report, model: DualEncoder, words: Words, images: Tensor, captions: list[str]) -> None:
    image_side, text_side = features(model, words, images, captions)
    asked = captions[:3]
    for text, rows in zip(
        asked, topk_similarity(text_side[:3], image_side, 3, metric="cosine")[1].tolist(), strict=True
    ):
        report.queries[text] = [captions[row] for row in rows]
    rows = topk_similarity(image_side[3:5], text_side, 3, metric="cosine")[1].tolist()
    for text, found in zip(captions[3:5], rows, strict=True):
        report.queries[f"[image of {text}]"] = [captions[row] for row in found]


@torch.no_grad()
def _compose(report: Report, model: DualEncoder, words: Words, generator: torch.Generator) -> None:
    """Colour and shape must both be right, and in a pair each colour on its own shape."""
    red_circle, blue_square = Thing("red", "circle"), Thing("blue", "square")
    cases = [
        ((red_circle,), (Thing("red", "square"),)),
        ((red_circle,), (Thing("blue", "circle"),)),
        ((red_circle, blue_square), (blue_square, red_circle)),
        ((red_circle, blue_square), (Thing("blue", "circle"), Thing("red", "square"))),
    ]
    for right, wrong in cases:
        images = torch.stack([draw(right, generator) for _ in range(20)])
        texts = model.encode_captions(words([caption(right), caption(wrong)]))
        first = topk_similarity(model.encode_images(images), texts, 1, metric="cosine")[1]
        report.compositional[f"{caption(right)!r} from {caption(wrong)!r}"] = bool((first == 0).float().mean() > 0.75)


def _photographs(
    report: Report,
    model: DualEncoder,
    words: Words,
    photos: dict[str, Tensor],
    scenes: object,
    generator: torch.Generator,
    steps: int,
) -> None:
    texts = list(photos)
    unseen = torch.stack([crop(photos[text], True, generator) for text in texts])
    before = recall_at_k(*features(model, words, unseen, texts), (1, 5))
    report.recall[f"{len(texts)} photographs, scenes only"] = before
    pool = [(crop(photos[text], False, generator), text) for text in texts for _ in range(24)]

    def sample(size: int) -> tuple[Tensor, list[str]]:
        rows = torch.randint(0, len(pool), (size // 2,), generator=generator).tolist()
        images, captions = scenes(size - size // 2)  # type: ignore[operator]
        return torch.cat([images, torch.stack([pool[r][0] for r in rows])]), captions + [pool[r][1] for r in rows]

    train(model, words, max(steps // 2, 1), sample)
    image_side, text_side = features(model, words, unseen, texts)
    report.recall[f"{len(texts)} photographs, unseen crops"] = recall_at_k(image_side, text_side, (1, 5))
    rows = topk_similarity(text_side[:3], image_side, 1, metric="cosine")[1].tolist()
    for text, found in zip(texts[:3], rows, strict=True):
        report.queries[text] = [texts[found[0]]]


def _heat_map(output: Path, image_side: Tensor, text_side: Tensor, captions: list[str]) -> str:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    output.mkdir(parents=True, exist_ok=True)
    image, text = (nn.functional.normalize(x, dim=1) for x in (image_side, text_side))
    figure, axes = plt.subplots(figsize=(8, 7))
    shown = axes.imshow((image @ text.T).numpy(), cmap="magma", vmin=-1, vmax=1)
    axes.set_xticks(range(len(captions)), captions, rotation=60, ha="right", fontsize=7)
    axes.set_yticks(range(len(captions)), captions, fontsize=7)
    axes.set(xlabel="caption", ylabel="image of", title="Cosine similarity after training")
    figure.colorbar(shown)
    path = output / "similarity.png"
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
    return str(path)


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/search"), help="folder of the heat map and the figures")
    parser.add_argument("--steps", type=int, default=300, help="training steps on rendered scenes")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes and the weights")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps must be at least 1; got {options.steps}")
    report = run(options.out, seed=options.seed, steps=options.steps)
    print(json.dumps(asdict(report), indent=2) if options.json else report)


if __name__ == "__main__":
    main()
