"""The operators besides attention, each in a small module, through the file and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastxattn.export as export
from fastxattn.ops.attention.api import varlen_cross_attention
from fastxattn.ops.contrastive.api import infonce_loss, sigmoid_loss
from fastxattn.ops.importance.api import key_importance
from fastxattn.ops.late_interaction.api import maxsim
from fastxattn.ops.pruning.api import select_tokens
from fastxattn.ops.pruning.rows import merge_rows
from fastxattn.ops.retrieval.api import topk_similarity
from fastxattn.packed import PackedTokens
from tests.export.models import DIM, HEADS, Context, Importance, Prune, packed


class Late(torch.nn.Module):
    def forward(self, a: PackedTokens, b: PackedTokens) -> Tensor:
        return maxsim(a.values, b.values, a.cu_seqlens, b.cu_seqlens)


class TopK(torch.nn.Module):
    def forward(self, queries: Tensor, corpus: Tensor) -> tuple[Tensor, Tensor]:
        return topk_similarity(queries, corpus, 4)


class Losses(torch.nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return infonce_loss(a, b, 10.0) + sigmoid_loss(a, b, 10.0, -10.0)


@pytest.mark.parametrize(
    ("module", "widths"),
    [(Importance(), (32, 16)), (Context(), (32, 16)), (Prune(), (8,)), (Late(), (8, 8))],
    ids=lambda x: type(x).__name__,
)
def test_operation(module: torch.nn.Module, widths: tuple[int, ...], tmp_path: Path) -> None:
    module.eval()
    export.to_onnx(module, [packed(2, 3, width=w, seed=w) for w in widths], tmp_path / "m.onnx")
    report = export.verify(tmp_path / "m.onnx", module, [packed(4, 7, 1, width=w, seed=w) for w in widths])
    assert report.ok, str(report)


def test_importance_with_every_option(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    text, image = packed(3, 4), packed(5, 6, width=16)
    spans = torch.tensor([[0, 2], [3, 3], [0, 5], [0, 4], [1, 2], [2, 4], [6, 6]], dtype=torch.int32)
    bias, weight = torch.randn(11, HEADS, generator=generator), torch.randn(HEADS, 7, generator=generator)
    index = torch.tensor([0, 1, 2, 5, 4, 3, 6], dtype=torch.int32)

    class Full(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, spans: Tensor, bias: Tensor, weight: Tensor, index: Tensor) -> Tensor:
            options = {"kv_range": spans, "key_bias": bias, "softcap": 4.0}
            cu = text.cu_seqlens, image.cu_seqlens
            _, lse = varlen_cross_attention(q, k, k, *cu, return_lse=True, **options)
            return key_importance(q, k, lse, *cu, query_index=index, row_weight=weight, reduction="sum", **options)

    args = text.values.unflatten(-1, (HEADS, DIM)), image.values.unflatten(-1, (2, DIM)), spans, bias, weight, index
    export.to_onnx(Full().eval(), args, tmp_path / "m.onnx")
    report = export.verify(tmp_path / "m.onnx", Full().eval(), args)
    assert report.ok, str(report)


def test_selection_ranks_as_the_library_does(tmp_path: Path) -> None:
    class Select(torch.nn.Module):
        def forward(self, scores: Tensor, cu: Tensor, counts: Tensor, protected: Tensor) -> Tensor:
            return select_tokens(scores, cu, counts, protected=protected).assignment

    inf, nan = float("inf"), float("nan")
    scores = torch.tensor([0.0, -0.0, 1.0, 1.0, nan, -inf, 2.0, nan, 3.0, inf, 0.5, 0.5])
    cu = torch.tensor([0, 6, 6, 11], dtype=torch.int32)
    protected = torch.zeros(12, dtype=torch.bool)
    protected[[4, 7]] = True
    cases = {}
    for counts in ([0, 0, 0], [1, 1, 1], [3, 0, 2], [99, 5, -1]):
        cases[str(counts)] = ((scores, cu, torch.tensor(counts, dtype=torch.int32), protected), {})
    module, args = Select().eval(), cases["[3, 0, 2]"][0]
    export.to_onnx(module, args, tmp_path / "m.onnx")
    report = export.verify(tmp_path / "m.onnx", module, args, cases=cases)
    assert report.ok, str(report)


def test_merging_rows(tmp_path: Path) -> None:
    class Merge(torch.nn.Module):
        def forward(self, x: Tensor, assignment: Tensor, share: Tensor) -> Tensor:
            return merge_rows(x, assignment, share, 4)

    x = torch.randn(6, 8)
    x[2] = float("nan")  # assigned to nothing
    args = x, torch.tensor([0, 3, -1, 0, 1, 3], dtype=torch.int32), torch.rand(6)
    export.to_onnx(Merge().eval(), args, tmp_path / "m.onnx")
    report = export.verify(tmp_path / "m.onnx", Merge().eval(), args)
    assert report.ok, str(report)


@pytest.mark.parametrize(
    ("module", "sizes"), [(TopK(), ((2, 8), (5, 8))), (Losses(), ((5, 8), (5, 8)))], ids=["topk", "losses"]
)
def test_similarities(module: torch.nn.Module, sizes: tuple[tuple[int, ...], ...], tmp_path: Path) -> None:
    module.eval()
    generator = torch.Generator().manual_seed(4)

    def inputs(more: int) -> tuple[Tensor, ...]:
        return tuple(
            torch.nn.functional.normalize(torch.randn(n + more, d, generator=generator), dim=1) for n, d in sizes
        )

    export.to_onnx(module, inputs(0), tmp_path / "m.onnx")
    few = torch.randn(3, 8), torch.randn(3, 8)  # fewer rows than the four best that are asked for
    report = export.verify(tmp_path / "m.onnx", module, inputs(3), cases={"few rows": (few, {})})
    assert report.ok, str(report)
