"""What every cell of the composition table must be: right, or refused with a text; docs/guide/transforms.md."""

from __future__ import annotations

from tests.compositions.row import Row
from tests.compositions.rows import ROWS

SECOND = "cannot be differentiated again"
FORWARD = "do not support forward-mode differentiation"
TRANSFORMED = "torch.func transforms go through fastxattn's functions in eager mode"
DEVICE = "device: "
CONTENTS = "(?i)data|contents|item|nonzero|dynamic|no backend supports"
"""Of a result whose shape or value depends on what meta and fake tensors lack: PyTorch's own messages, any of them."""

HEADINGS = {
    "eager": "eager forward and backward",
    "compile": "`torch.compile(fullgraph=True)`",
    "inductor": "the same with inductor (some rows)",
    "one tensor twice, compiled": "compiled with one tensor twice",
    "compiled func.grad": "compiled `torch.func.grad`",
    "export": "`torch.export`",
    "autocast": "autocast",
    "checkpoint": "checkpoint",
    "checkpoint, reentrant": "reentrant checkpoint",
    "saved-tensor hooks": "`save_on_cpu` and saved-tensor hooks",
    "second derivative": "`create_graph=True`",
    "forward mode": "forward mode",
    "vmap": "`vmap`",
    "func.grad": "`func.grad`",
    "vmap(grad)": "`vmap(grad)`",
    "jacrev(jacrev)": "`jacrev(jacrev)`",
    "is_grads_batched": "`is_grads_batched`",
    "one tensor twice": "one tensor twice",
    "backward twice": "backward twice",
    "deepcopy, pickle": "`deepcopy` and `pickle`",
    "meta": "meta device",
    "FakeTensorMode": "`FakeTensorMode`",
    "one argument on meta": "one argument on meta",
    "no_grad, inference": "`no_grad` and `inference_mode`",
    "some gradients": "gradients of some arguments",
    "strides": "any strides",
    "threads": "threads",
    "defaults": "any default dtype and device",
    "fork": "after `fork`",
}
"""Columns in the order of the page."""
OF_DERIVATIVES = {
    "checkpoint",
    "checkpoint, reentrant",
    "saved-tensor hooks",
    "second derivative",
    "forward mode",
    "vmap",
    "func.grad",
    "vmap(grad)",
    "jacrev(jacrev)",
    "is_grads_batched",
    "backward twice",
    "some gradients",
    "compiled func.grad",
}
SLOW = {"inductor"}
"""Columns that compile for long and ask the same of every row: some rows stand for all."""
SAMPLED = ("varlen_cross_attention", "infonce_loss", "MultiheadCrossAttention, padded, masks")

PLAIN = {
    "topk_similarity",
    "topk_similarity, cosine",
    "topk_similarity, int8",
    "PackedTokens",
    "pixel_shuffle",
    "VisualProjector",
    "ModalityGate",
    "MultiTaskLoss",
}
"""Made of PyTorch's operations where derivatives are concerned: of any order and mode."""
LINEAR = {"gather_rows", "merge_rows", "prune_tokens", "Selection", "TokenPruner, packed", "TokenPruner, padded"}
"""Kernels that are each other's derivative: of any order, in reverse mode."""
WITHOUT_SHAPES = {
    "meta": {"maxsim", "late_interaction_loss", "FILIPLoss", "BLIP2ITCLoss", "recall_at_k"},
    "FakeTensorMode": {"recall_at_k"},
}
"""Rows that read contents of their arguments, on these devices."""


def applies(row: Row, column: str) -> bool:
    """Whether the cell means anything."""
    if column in OF_DERIVATIVES and not row.derivative:
        return False
    if column == "deepcopy, pickle":
        return row.build is not None
    if column in ("one tensor twice", "one tensor twice, compiled"):
        return bool(row.same)
    if column == "one argument on meta":
        return len(row.made(0)) > 1
    return column not in SLOW or row.name in SAMPLED


def expected(row: Row, column: str) -> str:
    """Empty: right. Else a regular expression that the error matches."""
    if column == "one argument on meta":
        return DEVICE
    kernels = row.name not in PLAIN and row.derivative
    if column in ("second derivative", "jacrev(jacrev)") and kernels and row.name not in LINEAR:
        return SECOND
    if column == "forward mode" and kernels:
        return FORWARD
    if column == "compiled func.grad" and kernels:
        return TRANSFORMED
    if row.name in WITHOUT_SHAPES.get(column, ()):
        return CONTENTS
    return ""


def mark(row: Row, column: str) -> str:
    """The cell on the page."""
    return "" if not applies(row, column) else "refused" if expected(row, column) else "yes"


def markdown() -> str:
    """The page's table: columns in which every row is right are one line of words."""
    everywhere = [c for c in HEADINGS if all(mark(row, c) in ("", "yes") for row in ROWS)]
    refused = [c for c in HEADINGS if c not in everywhere and any(mark(row, c) == "yes" for row in ROWS)]
    nowhere = [c for c in HEADINGS if c not in everywhere and c not in refused]
    lines = [
        f"Right for every row: {'; '.join(HEADINGS[c] for c in everywhere)}.",
        "",
        f"Refused for every row: {'; '.join(HEADINGS[c] for c in nowhere)}.",
        "",
        f"| | {' | '.join(HEADINGS[c] for c in refused)} |",
        f"|---|{'---|' * len(refused)}",
    ]
    lines += [f"| {_code(row.name)} | {' | '.join(mark(row, c) for c in refused)} |" for row in ROWS]
    return "\n".join(lines) + "\n"


def _code(name: str) -> str:
    first, comma, rest = name.partition(",")
    return f"`{first}`{comma}{rest}"
