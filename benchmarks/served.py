"""Which attention calls of Transformers models ``accelerate`` serves, on the tiny models of ``served_zoo``.

    python -m benchmarks.served            # print the table
    python -m benchmarks.served --write    # and put it into docs/guide/models.md

A call is counted where an attention kernel runs: an operator of fastxattn, torch's scaled_dot_product_attention, or a
softmax over three or more axes. Sizes are tiny, so the rule that leaves small problems to torch is off.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import served_zoo_pairs  # noqa: F401  fills BUILDERS
from benchmarks.served_zoo import BUILDERS
from fastxattn.integrations import Report, accelerate, core

DOC = Path(__file__).parents[1] / "docs" / "guide" / "models.md"
MARKS = ("<!-- served -->", "<!-- /served -->")

NOTES = {
    "Aria": "the projector asks torch.nn.MultiheadAttention for weights",
    "BridgeTower": "the model returns the self-attention maps of its cross-modal layers always",
    "CLAP": "audio windows (Swin) carry a bias per pair of positions: nothing to gain at 8 x 8 tokens",
    "ColQwen2": "the images of a batch in one call",
    "CLIP": "`exact=False` also cuts texts after their end token, which is the larger gain",
    "Conditional DETR": "the ResNet backbone has no attention",
    "GIT": "refused: its layers add masks to scores themselves, and transformers has no sdpa for it",
    "GroundingDINO": "Swin windows and deformable attention: nothing to gain",
    "GroupViT": "group assignment is a softmax over groups, not attention over keys",
    "MM-GroundingDINO": "Swin windows and deformable attention: nothing to gain",
    "Qwen2-VL": "the images of a batch in one call",
    "Qwen2.5-VL": "the images and windows of a batch in one call",
    "Qwen3-VL": "the images of a batch in one call",
    "Qwen3-VL MoE": "the images of a batch in one call",
    "SAM 2": "its image encoder also computes maps that it drops",
    "SigLIP 2 NaFlex": "padded patches are skipped, in the pooling head too",
}
"""What stands beside a count."""


class Calls(TorchDispatchMode):
    """Counts attention: ``served`` by the package, ``others`` by torch."""

    def __init__(self) -> None:
        super().__init__()
        self.served = self.others = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        self.served += name.startswith("fastxattn.")
        self.others += "_scaled_dot_product" in name or (name.startswith("aten._softmax.") and args[0].ndim > 2)
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Row:
    name: str
    served: int
    total: int
    difference: float
    """Largest difference of any output, divided by the largest value of that output (or 1)."""
    report: Report

    def __str__(self) -> str:
        verdict = "served" if self.served == self.total else "in part" if self.served else "falls back"
        return f"| {self.name} | {verdict} | {self.served} of {self.total} | {NOTES.get(self.name, '')} |"


@contextmanager
def smallest() -> Iterator[None]:
    """Problems of every size count as worth a kernel."""
    before, core.SMALL = core.SMALL, 0
    try:
        yield
    finally:
        core.SMALL = before


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """The model in evaluation, with weights that keep activations at one scale, and its inputs."""
    torch.manual_seed(0)
    model, inputs = BUILDERS[name]()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model.eval(), inputs


def outputs(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """Every floating-point tensor that the model returns."""
    torch.manual_seed(1)
    found: Any = model(**inputs)
    return [t for t in pytree.tree_leaves(dict(found)) if isinstance(t, Tensor) and t.is_floating_point()]


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Of two results, relative to each output's largest value; infinite where shapes or non-finite values differ."""
    worst = 0.0 if len(ours) == len(theirs) else torch.inf
    for a, b in zip(ours, theirs, strict=False):
        if a.shape != b.shape or not torch.equal(a.isfinite(), b.isfinite()):
            return torch.inf
        at = b.isfinite()
        if bool(at.any()):
            worst = max(worst, (a[at] - b[at]).abs().max().item() / max(b[at].abs().max().item(), 1.0))
    return worst


def run(name: str) -> Row:
    """One row of the table."""
    model, inputs = build(name)
    fast, calls = copy.deepcopy(model), Calls()
    with smallest(), torch.no_grad():
        expected = outputs(model, inputs)
        report = accelerate(fast)
        with calls:
            ours = outputs(fast, inputs)
    return Row(name, calls.served, calls.served + calls.others, difference(ours, expected), report)


def table(rows: list[Row]) -> str:
    """The table, in the order of names."""
    lines = [str(row) for row in sorted(rows, key=lambda row: row.name.lower())]
    return "\n".join(["| model | accelerated | attention calls served | notes |", "|---|---|---|---|", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the table into docs/guide/models.md")
    text = table([run(name) for name in BUILDERS])
    print(text)
    if parser.parse_args().write:
        before, _, rest = DOC.read_text().partition(MARKS[0])
        DOC.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{rest.partition(MARKS[1])[2]}")


if __name__ == "__main__":
    main()
