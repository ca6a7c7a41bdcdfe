"""Whole models, small: fastxattn.nn modules on packed tokens and accelerated transformers models on padded ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastxattn.export as export
from fastxattn import nn
from fastxattn.packed import PackedTokens
from tests.export.models import packed

transformers = pytest.importorskip("transformers")
from benchmarks.export_zoo import MODELS, Model, build  # noqa: E402  (it imports transformers)


def qformer_config() -> Any:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    return transformers.Blip2QFormerConfig(**sizes, encoder_hidden_size=96)


class PackedQFormer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.QFormer.from_hf(transformers.Blip2QFormerModel(qformer_config()))
        self.queries = torch.nn.Parameter(torch.randn(1, 8, 64))

    def forward(self, image: PackedTokens) -> Tensor:
        return self.model(self.queries.expand(image.cu_seqlens.shape[0] - 1, -1, -1), image)


class FlamingoBlock(torch.nn.Module):
    """Text reads the image before it; one query per sequence is a decoder's step."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.GatedCrossAttentionBlock(64, 4, 128, 96)
        for gate in (self.block.alpha_cross_attn, self.block.alpha_dense):
            torch.nn.init.constant_(gate, 0.5)

    def forward(self, text: PackedTokens, image: PackedTokens) -> Tensor:
        return self.block(text, image).to_padded()[0]  # rows past the last offset are nobody's


PACKED: dict[str, tuple[Callable[[], torch.nn.Module], Callable[[bool], Any]]] = {
    "Q-Former, packed": (PackedQFormer, lambda big: [packed(*((3, 0, 9) if big else (5, 7)), width=96)]),
    "Perceiver resampler": (
        lambda: nn.PerceiverResampler(64, 2, 4, 16, 8),
        lambda big: [packed(*((3, 0, 9) if big else (5, 7)), width=64)],
    ),
    "Flamingo block": (
        FlamingoBlock,
        lambda big: [
            packed(*(n if big else m), width=w) for n, m, w in (((3, 0, 2), (5, 7), 64), ((4, 9, 1), (6, 5), 96))
        ],
    ),
    "decoder step": (
        FlamingoBlock,
        lambda big: [
            packed(*((1, 1, 1) if big else (1, 1)), width=64),
            packed(*((4, 9, 1) if big else (6, 5)), width=96),
        ],
    ),
}


@pytest.mark.parametrize("name", PACKED)
def test_packed_module(name: str, tmp_path: Path) -> None:
    make, inputs = PACKED[name]
    torch.manual_seed(0)
    module = make().eval()
    done = export.to_onnx(module, inputs(False), tmp_path / "m.onnx")
    assert sum(done.nodes.values()) >= 1
    report = export.verify(done.path, module, inputs(True))
    assert report.ok, str(report)


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.name)
def test_accelerated_model(model: Model, tmp_path: Path) -> None:
    module, inputs = build(model, small=True, accelerated=True)
    done = export.to_onnx(module, inputs(2), tmp_path / "m.onnx", dynamic=model.dynamic)
    # However small the example is: the file serves larger inputs too.
    assert sum(done.nodes.values()) >= 1
    report = export.verify(done.path, module, inputs(3))
    assert report.ok, str(report)
