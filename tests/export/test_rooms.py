"""The operators besides attention, each in a small module, through the file and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastxattn.export as export
from fastxattn.ops.attention.api import varlen_cross_attention
from fastxattn.ops.context_attention.api import context_attention
from fastxattn.ops.importance.api import key_importance
from fastxattn.ops.pruning.api import prune_tokens
from fastxattn.ops.pruning.budget import Budget
from fastxattn.packed import PackedTokens
from tests.export.models import DIM, HEADS, packed


class Importance(torch.nn.Module):
    def forward(self, text: PackedTokens, image: PackedTokens, weight: Tensor | None = None) -> Tensor:
        q, k = text.values.unflatten(-1, (HEADS, DIM)), image.values.unflatten(-1, (2, DIM))
        cu = text.cu_seqlens, image.cu_seqlens
        _, lse = varlen_cross_attention(q, k, k, *cu, return_lse=True)
        return key_importance(q, k, lse, *cu, reduce="none")


class Context(torch.nn.Module):
    def forward(self, text: PackedTokens, image: PackedTokens) -> Tensor:
        q = text.values.unflatten(-1, (2, 16))
        return context_attention(q, image.values, text.cu_seqlens, image.cu_seqlens, scale=0.25)


class Prune(torch.nn.Module):
    def forward(self, image: PackedTokens) -> dict[str, Tensor]:
        scores = image.values[:, 0]
        protected = image.values[:, 1] > 1.0
        rows, kept = prune_tokens(image.values, scores, image.cu_seqlens, Budget.ratio(0.5), protected=protected)
        back = kept.scatter_back(rows, fill="zero")
        return {"rows": rows, "index": kept.keep_index, "offsets": kept.cu_seqlens, "back": back}


@pytest.mark.parametrize(
    ("module", "widths"), [(Importance(), (32, 16)), (Context(), (32, 16)), (Prune(), (8,))], ids=lambda x: type(x).__name__
)
def test_room(module: torch.nn.Module, widths: tuple[int, ...], tmp_path: Path) -> None:
    module.eval()
    export.to_onnx(module, [packed(2, 3, width=w, seed=w) for w in widths], tmp_path / "m.onnx")
    report = export.verify(tmp_path / "m.onnx", module, [packed(4, 7, 1, width=w, seed=w) for w in widths])
    assert report.ok, str(report)
