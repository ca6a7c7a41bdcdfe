"""Absorb the key and value projections, or project: the rule, in counted work.

Work of one attention with ``rows_q`` queries over ``rows_k`` context rows in ``batch`` sequences (pairs =
rows_q * rows_k / batch query-key pairs), heads H of width D over features of width E, in multiply-adds::

    project   2 rows_k E H D   projections     + 2 pairs H D   attention
    absorb    2 rows_q E H D   moved to query  + 2 pairs H E   context attention
              and output

Each term is divided by the speed its step was measured to reach, relative to the others; see
``docs/performance/context.md`` for the measurements. Absorbing wins when queries per sequence are fewer than about D,
weighted by how much faster this library's kernels run than the projections' matrix product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastxattn.runtime import native

# Multiply-add rates relative to each other: the projection's GEMM, the attention kernel, the context kernel; measured
# on a CPU with AVX-512 and bf16 dot products. What is not listed has no compiled context kernel.
_RATES = {
    ("cpu", torch.float32): (65.0, 65.0, 95.0),
    ("cpu", torch.bfloat16): (195.0, 100.0, 190.0),
    ("cpu", torch.float16): (65.0, 65.0, 95.0),
}


@dataclass(frozen=True)
class Choice:
    """The two ways' weighted work, in arbitrary but common units."""

    project: float
    absorb_work: float
    project_per_row: float = 0.0
    """The part that grows with the context, per context row."""
    absorb_per_row: float = 0.0
    obstacle: str | None = None
    """Why absorbing is out of the question, whatever the work."""

    @property
    def absorb(self) -> bool:
        """Whether absorbing is cheaper; where a trace does not know the context's size, for a large one."""
        if self.obstacle is not None:
            return False
        cheaper = self.absorb_work < self.project
        if isinstance(cheaper, torch.SymBool):
            from torch.fx.experimental.symbolic_shapes import guard_or_false

            return guard_or_false(self.absorb_per_row < self.project_per_row)
        return cheaper

    def __str__(self) -> str:
        if self.obstacle is not None:
            return f"project the context: {self.obstacle}"
        verb = "absorb the projections" if self.absorb else "project the context"
        return f"{verb}: weighted work {self.absorb_work:.3g} absorbed, {self.project:.3g} projected"


def choose(
    rows_q: int,
    rows_k: int,
    batch: int,
    heads: int,
    head_dim: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Choice:
    """Weigh the two ways; from shapes alone, so that nothing waits for a device.

    Args:
        rows_q: queries, all sequences together.
        rows_k: context rows, all sequences together.
        batch: sequences.
        heads: attention heads.
        head_dim: their width.
        width: width of the context's features.
        dtype: of the products.
        device: device type.
    """
    obstacle = None
    if (device, dtype) not in _RATES:
        obstacle = f"context attention has no compiled kernel for {dtype} on {device}"
    elif not torch.compiler.is_compiling():  # a tracer cannot load a library
        obstacle = native.cpu_library().reason
    gemm, attention, context = _RATES.get((device, dtype), (1.0, 1.0, 1.0))
    pairs, inner = rows_q * rows_k / max(batch, 1), heads * head_dim
    per_sequence = rows_q / max(batch, 1)
    return Choice(
        project=2 * rows_k * width * inner / gemm + 2 * pairs * inner / attention,
        absorb_work=2 * rows_q * width * inner / gemm + 2 * pairs * heads * width / context,
        project_per_row=2 * width * inner / gemm + 2 * per_sequence * inner / attention,
        absorb_per_row=2 * per_sequence * heads * width / context,
        obstacle=obstacle,
    )
