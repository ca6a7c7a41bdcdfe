"""How a module is held to its original: the algebra in float64, the arithmetic in float32."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastxattn.testing.budget import FEW, measure_error

Run = Callable[[Any, list[torch.Tensor]], list[torch.Tensor]]


def compare(
    ours: nn.Module,
    original: nn.Module,
    inputs: list[torch.Tensor],
    run_ours: Run,
    run_original: Run,
    *,
    exact: float = 1e-9,
) -> None:
    """Outputs, input gradients and parameter gradients of both, from shared or equal parameters of one name.

    In float64 everything agrees to ``exact``, relative to its largest entry: the algebra is the same. In float32 each
    output and each gradient of more than FEW entries keeps the operator budget's bound on its largest error; smaller
    gradients keep it summed over all tensors, and all keep the bound on mean errors over the entries of all together.
    (The operators are held to the budget one by one. A module has dozens of gradients of a few entries: of 32
    independent ones, two equally good roundings have mean errors 1.25 times apart with a chance of 12 %, and entries
    here depend on a few tokens.)
    """
    names = [name for name, _ in ours.named_parameters()]
    theirs = dict(original.named_parameters())
    assert set(names) <= set(theirs)
    assert all(torch.equal(p, theirs[n]) for n, p in ours.named_parameters())

    def results(module: nn.Module, run: Run, dtype: torch.dtype) -> list[torch.Tensor]:
        module = copy.deepcopy(module).to(dtype)
        xs = [x.detach().clone().to(dtype).requires_grad_() for x in inputs]
        outs = run(module, xs)
        generator = torch.Generator().manual_seed(3)
        loss = torch.stack([(o * torch.randn(o.shape, generator=generator).to(dtype)).sum() for o in outs]).sum()
        parameters = dict(module.named_parameters())
        return [*outs, *torch.autograd.grad(loss, [*xs, *(parameters[n] for n in names)])]

    reference = results(original, run_original, torch.float64)
    outputs = len(reference) - len(names) - len(inputs)
    labels = [f"out{i}" for i in range(outputs)] + [f"input{i}" for i in range(len(inputs))] + names
    for label, a, r in zip(labels, results(ours, run_ours, torch.float64), reference, strict=True):
        torch.testing.assert_close(a, r, rtol=0, atol=exact * max(1.0, r.abs().max().item()), msg=label)

    single = results(ours, run_ours, torch.float32)
    eager = results(original, run_original, torch.float32)
    reports, entries = [], []
    for i, (label, a, r, e) in enumerate(zip(labels, single, reference, eager, strict=True)):
        if r.abs().max() < 1e-9:  # a key bias: its gradient is 0 and eager's the noise around it
            assert a.abs().max() < 1e-4, label
            continue
        report = measure_error(label, a, r, e, backward=i >= outputs)
        assert report.same_nonfinite, str(report)
        assert (i >= outputs and a.numel() <= FEW) or report.max_error <= report.max_budget, str(report)
        reports.append(report)
        entries.append(a.numel())
    largest, allowed = sum(r.max_error for r in reports), sum(r.max_budget for r in reports)
    assert largest <= allowed, f"largest errors sum to {largest:.3g}, their budgets to {allowed:.3g}"
    whole = sum(r.mean_error * n for r, n in zip(reports, entries, strict=True))
    allowed = sum(r.mean_budget * n for r, n in zip(reports, entries, strict=True))
    assert whole <= allowed, f"errors sum to {whole:.3g}, their budgets to {allowed:.3g}"
