"""Writes a package of packed cross-attention with its projections, and inputs for main.cpp to run it on.

python examples/aoti/export_package.py build/aoti
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from fastxattn import PackedTokens, varlen_cross_attention
from fastxattn.export import load_kernels, to_aoti

HEADS, WIDTH = 12, 768


class CrossAttention(torch.nn.Module):
    """Text reads image, both packed."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key_value = torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, 2 * WIDTH)
        self.out = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, text: PackedTokens, image: PackedTokens) -> Tensor:
        q = self.query(text.values).unflatten(-1, (HEADS, -1))
        k, v = self.key_value(image.values).unflatten(-1, (2 * HEADS, -1)).chunk(2, dim=1)
        mixed = varlen_cross_attention(q, k, v, text.cu_seqlens, image.cu_seqlens)
        return self.out(mixed.flatten(1))


class Inputs(torch.nn.Module):
    """Tensors as attributes: what torch::jit::load reads without Python."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        for i, tensor in enumerate(tensors):
            self.register_buffer(f"input_{i}", tensor)

    def forward(self) -> None:
        return None


def ragged(lengths: list[int]) -> PackedTokens:
    return PackedTokens.from_list([torch.randn(n, WIDTH) for n in lengths])


def main(folder: Path) -> None:
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    module = CrossAttention().eval()
    package = to_aoti(module, (ragged([3, 4]), ragged([5, 6])), folder / "cross_attention.pt2", overwrite=True)
    text, image = ragged([5, 77, 0, 30]), ragged([64, 1024, 300, 577])
    tensors = [text.values, text.cu_seqlens, image.values, image.cu_seqlens]
    torch.jit.script(Inputs(tensors)).save(str(folder / "inputs.pt"))
    load_kernels()
    loaded = torch._inductor.aoti_load_package(str(package.path))
    (out,) = loaded(*tensors)
    with torch.no_grad():
        error = (out - module(text, image)).abs().max().item()
        print(f"{package.path}: {tuple(out.shape)} sum {out.double().sum().item():g}, off the module by {error:.1e}")
        times: dict[str, list[float]] = {"module": [], "package": []}
        for _ in range(20):
            for name, call in (("module", lambda: module(text, image)), ("package", lambda: loaded(*tensors))):
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
    print(", ".join(f"{name} {statistics.median(t) * 1e3:.1f} ms" for name, t in times.items()))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/aoti"))
