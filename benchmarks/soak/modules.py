"""Random problems of the modules: their outputs, and the gradients of their inputs and of every parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.soak.trials import Draw, Maker, Trial
from fastxattn import PackedTokens
from fastxattn import nn as modules
from fastxattn.runtime.backend import use_backend
from fastxattn.testing import offsets

Inputs = dict[str, Tensor]
Call = Callable[[nn.Module, Inputs], Any]


def tokens(values: Tensor, of: list[int]) -> PackedTokens:
    """``values`` as sequences of these lengths."""
    return PackedTokens(values, offsets(of), max(of, default=0))


def trial(d: Draw, module: nn.Module, inputs: Inputs, call: Call, case: str) -> Trial:
    """``call(module, inputs)`` with the module's parameters among the differentiable inputs."""
    parameters = {f"parameter {name}": p.detach().to(d.dtype) for name, p in module.named_parameters()}

    def run(x: Inputs, backend: str) -> Any:
        own = {name.removeprefix("parameter "): t for name, t in x.items() if name.startswith("parameter ")}
        with use_backend(backend):
            out = torch.func.functional_call(_Called(module, call), {f"module.{n}": t for n, t in own.items()}, (x,))
        parts = out if isinstance(out, tuple) else (out,)
        return tuple(t.values if isinstance(t, PackedTokens) else t for t in parts)

    return Trial(f"{type(module).__name__}: {case}", d.dtype, {**inputs, **parameters}, run)


class _Called(nn.Module):
    """A call of a module as a module, for ``functional_call``."""

    def __init__(self, module: nn.Module, call: Call) -> None:
        super().__init__()
        self.module, self.call = module, call

    def forward(self, x: Inputs) -> Any:
        return self.call(self.module, x)


def build(d: Draw, make: Callable[[], nn.Module]) -> nn.Module:
    """A module whose parameters depend on the draw alone."""
    with torch.random.fork_rng():
        torch.manual_seed(d.r.randrange(1 << 30))
        return make().eval()


def sides(d: Draw, width_q: int, width_k: int) -> tuple[list[int], list[int], Inputs]:
    batch = d.r.randint(1, 3)
    of_q, of_k = d.lengths(batch, 65), d.lengths(batch)
    return of_q, of_k, {"query": d.rows(sum(of_q), width_q), "context": d.rows(sum(of_k), width_k)}


def multihead(d: Draw) -> Trial:
    heads, width = d.of(1, 2, 4), d.of(16, 40, 96)
    absorb = "off" if d.small else d.of("auto", "on", "off")
    of_q, of_k, inputs = sides(d, 16 * heads, width)

    def make() -> nn.Module:
        return modules.MultiheadCrossAttention(16 * heads, heads, kdim=width, vdim=width, absorb=absorb)

    def call(m: nn.Module, x: Inputs) -> Any:
        return m(tokens(x["query"], of_q), tokens(x["context"], of_k))

    return trial(d, build(d, make), inputs, call, f"{of_q} x {of_k}, {heads} heads, width {width}, absorb {absorb}")


def pooler(d: Draw) -> Trial:
    absorb = "off" if d.small else d.of("auto", "on", "off")
    of = d.lengths(d.r.randint(1, 3))
    kind = d.of("attentional", "siglip", "perceiver")

    def make() -> nn.Module:
        if kind == "attentional":
            return modules.AttentionalPooler(32, 48, 2, queries=5, absorb=absorb)
        if kind == "siglip":
            return modules.SiglipPooler(48, 3, 64, absorb=absorb)
        return modules.PerceiverResampler(48, 2, 2, 16, 4, absorb=absorb)

    def call(m: nn.Module, x: Inputs) -> Any:
        return m(tokens(x["context"], of))

    return trial(d, build(d, make), {"context": d.rows(sum(of), 48)}, call, f"{of}, absorb {absorb}")


def both_ways(d: Draw) -> Trial:
    shared = d.often(0.5)
    of_q, of_k, inputs = sides(d, 32, 32 if shared else 48)

    def make() -> nn.Module:
        if shared:
            return modules.SharedCrossAttention(32, 2, absorb="off")
        return modules.CoAttention(32, 48, 64, 2)

    def call(m: nn.Module, x: Inputs) -> Any:
        return m(tokens(x["query"], of_q), tokens(x["context"], of_k))

    return trial(d, build(d, make), inputs, call, f"{of_q} x {of_k}")


def gated(d: Draw) -> Trial:
    of_q, of_k, inputs = sides(d, 32, 48)

    def make() -> nn.Module:
        block = modules.GatedCrossAttentionBlock(32, 2, 64, 48, absorb="off")
        with torch.no_grad():
            block.alpha_cross_attn.add_(0.5)
            block.alpha_dense.add_(0.5)
        return block

    def call(m: nn.Module, x: Inputs) -> Any:
        return m(tokens(x["query"], of_q), tokens(x["context"], of_k))

    return trial(d, build(d, make), inputs, call, f"{of_q} x {of_k}")


def qformer(d: Draw) -> Trial:
    of, absorb = d.lengths(d.r.randint(1, 3)), "off" if d.small else d.of("auto", "on", "off")
    inputs = {"query": d.rows(1, 4, 32), "context": d.rows(sum(of), 48)}

    def call(m: nn.Module, x: Inputs) -> Any:
        return m(x["query"], tokens(x["context"], of))[0]

    return trial(
        d, build(d, lambda: modules.QFormer(32, 2, 2, 64, 48, absorb=absorb)), inputs, call, f"{of}, absorb {absorb}"
    )


MODULES: dict[str, Maker] = {
    "module: multihead": multihead,
    "module: pooler": pooler,
    "module: both ways": both_ways,
    "module: gated": gated,
    "module: Q-Former": qformer,
}
