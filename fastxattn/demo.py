"""``fastxattn demo``: BLIP-2's Q-Former on real photographs and captions, eager against accelerated.

The model is Hugging Face's ``Blip2QFormerModel`` at its real size with random weights (nothing is downloaded). The
photographs come with scikit-image, each at its own resolution, so that their patch counts differ; the captions differ
in length. Both models get the same padded batch; what is compared are the valid tokens.
"""

from __future__ import annotations

import copy
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastxattn.runtime.timing import Timing, device_name, interleaved, peak_extra_bytes

PATCH = 14
QUERIES = 32
PATIENCE = 60.0
"""Seconds for a dtype's timed rounds. Where three would take longer (bfloat16 in plain PyTorch, on older processors),
the runs that are compared with float64 are the only ones."""

# (file, longest side in pixels, caption)
PHOTOS = [
    ("astronaut", 448, "a smiling astronaut in an orange suit in front of a flag and a model of the space shuttle"),
    ("chelsea", 448, "a tabby cat looks into the camera"),
    ("coffee", 336, "an espresso on a saucer with a spoon"),
    ("rocket", 448, "a rocket on its launch pad at night, lit by floodlights, with clouds of vapour drifting off"),
    ("camera", 224, "a man filming"),
    ("coins", 336, "rows of ancient coins"),
    ("horse", 168, "a horse"),
    ("page", 280, "a page of a printed book with a paragraph of text that explains how images are segmented"),
    ("moon", 280, "the surface of the moon with a crater"),
    ("hubble_deep_field", 448, "hundreds of distant galaxies of many colours and shapes on a black sky"),
    ("logo", 196, "a logo"),
    ("retina", 392, "the back of an eye with its blood vessels"),
]


@dataclass
class Batch:
    """Padded inputs of the Q-Former, float32."""

    query_embeds: Tensor  # (batch, queries + longest caption, hidden)
    attention_mask: Tensor  # (batch, queries + longest caption)
    encoder_hidden_states: Tensor  # (batch, most patches, image width)
    encoder_attention_mask: Tensor  # (batch, most patches)

    def to(self, dtype: torch.dtype) -> dict[str, Any]:
        """Keyword arguments of the model."""
        return {
            "query_embeds": self.query_embeds.to(dtype),
            "query_length": QUERIES,
            "attention_mask": self.attention_mask,
            "encoder_hidden_states": self.encoder_hidden_states.to(dtype),
            # Four axes: given two, transformers 5 expands the mask to queries plus words, which the queries' own
            # cross-attention then refuses. A mask with an axis of one broadcasts.
            "encoder_attention_mask": self.encoder_attention_mask.bool()[:, None, None, :],
        }


def photographs() -> list[Tensor]:
    """The photographs as (3, height, width) in [0, 1], sides multiples of the patch size."""
    from skimage import color, data, transform, util  # type: ignore[attr-defined]

    images = []
    for name, longest, _ in PHOTOS:
        array = util.img_as_float(getattr(data, name)())
        array = color.gray2rgb(array)[..., :3] if array.ndim == 2 else array[..., :3]
        scale = longest / max(array.shape[:2])
        height, width = (max(PATCH, int(side * scale) // PATCH * PATCH) for side in array.shape[:2])
        small = transform.resize(array, (height, width), anti_aliasing=True)
        images.append(torch.tensor(small, dtype=torch.float32).permute(2, 0, 1))
    return images


def build_batch(config: Any) -> Batch:
    """Patch-embed the photographs, embed the captions, pad both."""
    generator = torch.Generator().manual_seed(0)
    patches = nn.Conv2d(3, config.encoder_hidden_size, PATCH, PATCH)
    words = nn.Embedding(config.vocab_size, config.hidden_size)
    queries = torch.randn(QUERIES, config.hidden_size, generator=generator)
    with torch.no_grad():
        images = [patches(image[None]).flatten(2)[0].T for image in photographs()]
        # A word's row in the table is a hash of the word: random weights need no real vocabulary.
        ids = [[zlib.crc32(w.encode()) % config.vocab_size for w in text.split()] for *_, text in PHOTOS]
        texts = [torch.cat([queries, words(torch.tensor(row))]) for row in ids]
    pad, lengths = nn.utils.rnn.pad_sequence, lambda parts: torch.tensor([len(p) for p in parts])
    masks = [torch.arange(int(n.max())) < n[:, None] for n in (lengths(texts), lengths(images))]
    return Batch(pad(texts, batch_first=True), masks[0].long(), pad(images, batch_first=True), masks[1].long())


def useful_flops(config: Any, batch: Batch) -> float:
    """Floating-point operations of one forward on valid tokens only, K/V projected once per layer."""
    text, image = batch.attention_mask.sum(1).double(), batch.encoder_attention_mask.sum(1).double()
    d, width, inner = config.hidden_size, config.encoder_hidden_size, config.intermediate_size
    self_attention = 8 * text * d * d + 4 * text * text * d
    cross = 4 * QUERIES * d * d + 4 * image * width * d + 4 * QUERIES * image * d
    feed_forward = 4 * text * d * inner
    layers = config.num_hidden_layers
    crosses = -(-layers // config.cross_attention_frequency)
    return float((layers * (self_attention + feed_forward) + crosses * cross).sum())


@dataclass
class Row:
    """One line of the demo's table."""

    dtype: str
    provider: str
    milliseconds: float
    speedup: float
    gflops: float
    peak_mib: float | None
    error: float
    runs: int
    """How many the time is the median of."""


@dataclass
class Result:
    """What the demo measured; ``agrees`` is the check without which no speed is shown."""

    device: str
    threads: int
    patches: list[int]
    words: list[int]
    rows: list[Row] = field(default_factory=list)
    agrees: bool = True


def run(layers: int = 12, rounds: int = 5, progress: Any = None) -> Result:
    """Run the comparison; ``progress`` is called with a description before each step."""
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    import fastxattn

    say = progress or (lambda text: None)
    torch.manual_seed(0)
    say("building BLIP-2's Q-Former and the batch")
    config = Blip2QFormerConfig(num_hidden_layers=layers, use_qformer_text_input=True)
    config._attn_implementation = "sdpa"
    model = Blip2QFormerModel(config).eval()
    batch = build_batch(config)
    valid = batch.attention_mask.bool()
    say("float64 reference")
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(**batch.to(torch.float64)).last_hidden_state[valid]
    result = Result(
        device_name(),
        torch.get_num_threads(),
        batch.encoder_attention_mask.sum(1).tolist(),
        (valid.sum(1) - QUERIES).tolist(),
    )
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        eager = copy.deepcopy(model).to(dtype)
        fast = copy.deepcopy(eager)
        fastxattn.accelerate(fast)
        inputs = batch.to(dtype)

        def call(which: nn.Module, inputs: dict[str, Any] = inputs) -> Tensor:
            with torch.no_grad():
                out: Tensor = which(**inputs).last_hidden_state
                return out

        providers = {"eager, padded": lambda e=eager: call(e), "fastxattn": lambda f=fast: call(f)}
        say(f"{name}: do the outputs agree?")
        first = {p: _first(run) for p, run in providers.items()}
        errors = {p: float((run.output[valid].double() - exact).abs().max()) for p, run in first.items()}
        # The budget of a whole network in one dtype: no further from float64 than twice plain PyTorch.
        result.agrees &= errors["fastxattn"] <= 2 * errors["eager, padded"]
        timings = {p: Timing((run.seconds,)) for p, run in first.items()}
        peaks = {p: run.peak for p, run in first.items()}
        if 5 * sum(run.seconds for run in first.values()) <= PATIENCE:  # a warm one, three rounds, one for memory
            say(f"{name}: time per batch")
            timings = interleaved(providers, rounds=rounds, max_seconds=PATIENCE / 2)
            say(f"{name}: peak memory")
            peaks = {p: peak_extra_bytes(run, warm=True) for p, run in providers.items()}
        for p, peak in peaks.items():
            seconds = timings[p].median
            result.rows.append(
                Row(
                    name,
                    p,
                    seconds * 1e3,
                    timings[p].ratio_to(timings["eager, padded"]),
                    useful_flops(config, batch) / seconds / 1e9,
                    None if peak is None else peak / 2**20,
                    errors[p],
                    len(timings[p].rounds),
                )
            )
    return result


@dataclass(frozen=True)
class First:
    """A provider's first run."""

    output: Tensor
    seconds: float
    peak: int | None


def _first(call: Callable[[], Tensor]) -> First:
    found: list[Tensor] = []
    seconds = [0.0]

    def timed() -> None:
        start = time.perf_counter()
        found.append(call())
        seconds[0] = time.perf_counter() - start

    peak = peak_extra_bytes(timed, warm=True)  # nothing but this batch's own: loading a kernel takes little memory
    return First(found[0], seconds[0], peak)


def draw(result: Result, path: Path) -> None:
    """The table as a picture: time, useful rate and peak memory beside one another."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [
        ("time per batch, ms", [r.milliseconds for r in result.rows]),
        ("useful GFLOP/s", [r.gflops for r in result.rows]),
        ("peak extra memory, MiB", [r.peak_mib or 0.0 for r in result.rows]),
    ]
    labels = [f"{r.provider}\n{r.dtype}" for r in result.rows]
    colours = ["#9aa5b1" if r.provider.startswith("eager") else "#1f6feb" for r in result.rows]
    figure, axes = plt.subplots(1, 3, figsize=(12, 4))
    for axis, (title, values) in zip(axes, panels, strict=True):
        bars = axis.bar(range(len(values)), values, color=colours)
        axis.bar_label(bars, fmt="%.0f", fontsize=9)
        axis.set_xticks(range(len(values)), labels, fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    counts = f"{len(result.patches)} photographs of {min(result.patches)} to {max(result.patches)} patches"
    figure.suptitle(f"BLIP-2 Q-Former, {counts}; {result.device}, {result.threads} threads", fontsize=11)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
