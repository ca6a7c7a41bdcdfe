"""The attention operators: a forward and a backward one per compiled backend, with schema, fake and gradient.

Forward returns ``out`` (rows_q, heads, value_dim) in the query's dtype and ``lse`` (heads, rows_q) float32
(cpu, and triton of float32: float64, unrounded for what is made from it), with 0 and -inf in rows that no slot stands
for or that see no key. Backward returns the gradients of :attr:`Problem.bits`; those not asked for in ``needs`` are
empty tensors of shape (0,). All results are contiguous.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastxattn.ops.attention.checks import check_shapes
from fastxattn.ops.attention.problem import Problem
from fastxattn.runtime.operators import KernelFunction, define, differentiable, first_order, run
from fastxattn.runtime.reasons import at_first_call

_FORWARD = f"({Problem.schema()}) -> (Tensor out, Tensor lse)"
_BACKWARD = (
    f"(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, {Problem.schema()}, int needs) -> "
    f"({', '.join(f'Tensor grad_{name}' for name in Problem.bits)})"
)


def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    problem = Problem.of(arguments)
    check_shapes(problem)
    query = problem.query
    out = query.new_empty(query.shape[0], query.shape[1], problem.value.shape[2])
    return out, query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)


def _fake_forward_cpu(*arguments: Any) -> tuple[Tensor, Tensor]:
    out, lse = _fake_forward(*arguments)
    # An ONNX graph holds the node fastxattn::Attention, which returns float32.
    return out, lse if torch.onnx.is_in_onnx_export() else lse.double()


def _fake_forward_triton(*arguments: Any) -> tuple[Tensor, Tensor]:
    out, lse = _fake_forward(*arguments)
    return out, lse.double() if out.dtype == torch.float32 else lse


def _fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
    *fields, needs = arguments[4:]
    problem = Problem.of(fields)
    return tuple(
        t.new_empty(t.shape) if t is not None and needs & bit else problem.query.new_empty(0)
        for bit, t in zip(problem.bits.values(), problem.differentiated(), strict=True)
    )


class Attention(KernelFunction):
    """out, lse = Attention.apply(backend, *problem.values()); saves the problem and both results."""

    @staticmethod
    def forward(backend: str, *arguments: Any) -> tuple[Tensor, Tensor]:
        """Run the backend's forward operator."""
        out, lse = run(FORWARD[backend], *arguments)
        return out, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Save what the backward operator needs."""
        ctx.set_materialize_grads(False)
        ctx.backend = inputs[0]
        Problem.of(inputs[1:]).save(ctx, *output)

    @staticmethod
    @first_order("attention")
    def backward(
        ctx: Any, saved: tuple[Any, ...], grad_out: Tensor | None, grad_lse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Gradients of the differentiable fields; None for everything else."""
        problem, (out, lse) = Problem.restore(ctx, saved)
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        elif grad_out.stride(2) != 1:  # the expanded scalar that sum() sends
            grad_out = grad_out.contiguous()
        grad_lse = None if grad_lse is None else grad_lse.float()  # lse may be float64
        needs = Problem.needs(ctx.needs_input_grad[1:])
        grads = BACKWARD[ctx.backend](grad_out, grad_lse, out, lse, *problem.values(), needs)
        return None, *Problem.routed(grads, needs)


for _backend, _fake in {"cpu": _fake_forward_cpu, "triton": _fake_forward_triton, "cuda": _fake_forward}.items():
    define(f"attention_{_backend}", _FORWARD, _fake)
    define(f"attention_backward_{_backend}", _BACKWARD, _fake_backward)
    differentiable(f"attention_{_backend}", functools.partial(Attention.apply, _backend))

for _backend, _keys, _module in (
    ("triton", ("CUDA", "CPU"), "triton.launch"),  # on CPU tensors: the interpreter
    ("cuda", ("CUDA",), "kernels_cuda"),
):
    for _name in ("attention", "attention_backward"):
        _function = f"{_name}_forward" if _name == "attention" else _name
        at_first_call(f"{_name}_{_backend}", _keys, f"fastxattn.ops.attention.{_module}", _function)

FORWARD = {name: getattr(torch.ops.fastxattn, f"attention_{name}").default for name in ("cpu", "triton", "cuda")}
BACKWARD = {
    name: getattr(torch.ops.fastxattn, f"attention_backward_{name}").default for name in ("cpu", "triton", "cuda")
}
