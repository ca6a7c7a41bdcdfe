"""Cost rule: absorb the key and value projections, or project the context, by counted work.

Work of one attention with ``rows_q`` queries over ``rows_k`` context rows in ``batch`` sequences (pairs =
rows_q * rows_k / batch query-key pairs), heads H of width D over features of width E, in multiply-adds::

    project   2 rows_k E H D   projections     + 2 pairs H D   attention
    absorb    2 rows_q E H D   moved to query  + 2 pairs H E   absorbed attention
              and output

A backward pass adds the gradients of weights and, where they have one, of the features: one product each per
projection. Attention adds 5 products to its 2, absorbed attention 3, or 5 with a gradient for the features.

Each term is divided by the speed its step was measured to reach, relative to the others; see
``docs/design/absorbed_attention.md`` for the measurements. Absorbing wins when queries per sequence are fewer than
about D, weighted by how much faster this library's kernels run than the projections' matrix product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastxattn.runtime import native

# Multiply-add rates relative to each other: the projection's GEMM, the attention kernel, the absorbed attention kernel,
# the small products that move projections to query and output; measured on a CPU with AVX-512 and bf16 dot products.
# Pairs that are not listed have no compiled kernel.
_RATES = {
    ("cpu", torch.float32): (65.0, 65.0, 95.0, 65.0),
    ("cpu", torch.bfloat16): (195.0, 100.0, 190.0, 195.0),
    ("cpu", torch.float16): (65.0, 65.0, 95.0, 65.0),
}
# The same on a CPU with vectors of 256 bits (Zen 3), where torch's float32 GEMM is ahead of these kernels.
_RATES_256 = {**_RATES, ("cpu", torch.float32): (65.0, 35.0, 40.0, 20.0)}


@dataclass(frozen=True)
class Choice:
    """The two ways' weighted work, in arbitrary but common units."""

    project: float
    absorb_work: float
    project_per_row: float = 0.0
    """The part that grows with the context, per context row."""
    absorb_per_row: float = 0.0
    obstacle: str | None = None
    """Why absorbing is impossible, whatever the work."""

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
    *,
    backward: bool = False,
    context_grad: bool = False,
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
        backward: a backward pass will follow.
        context_grad: the features get a gradient in it.
    """
    obstacle, rates = None, _RATES
    if (device, dtype) not in _RATES:
        obstacle = f"absorbed attention has no compiled kernel for {dtype} on {device}"
    elif not torch.compiler.is_compiling():  # a tracer cannot load a library
        obstacle = native.cpu_library().reason
        if native.narrow_cpu_vectors():
            rates = _RATES_256
    gemm, attention, context, small = rates.get((device, dtype), (1.0, 1.0, 1.0, 1.0))
    inner, per_sequence = heads * head_dim, rows_q / max(batch, 1)
    # How often each step's forward work is done.
    project_passes = 1 + backward + (backward and context_grad)
    attend_passes = 3.5 if backward else 1
    absorb_passes = (3.5 if context_grad else 2.5) if backward else 1
    move_passes = 3 if backward else 1
    project_per_row = project_passes * 2 * width * inner / gemm + attend_passes * 2 * per_sequence * inner / attention
    absorb_per_row = absorb_passes * 2 * per_sequence * heads * width / context
    return Choice(
        project=rows_k * project_per_row,
        absorb_work=move_passes * 2 * rows_q * width * inner / small + rows_k * absorb_per_row,
        project_per_row=project_per_row,
        absorb_per_row=absorb_per_row,
        obstacle=obstacle,
    )
