"""The Triton kernel of retrieval, in its interpreter or on a GPU, against sorting every score."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from fastxattn.ops import retrieval
from fastxattn.ops.retrieval import kernels_triton, quantize_int8
from tests.device import PRESENT, RUNS, WHY_NOT, there

pytestmark = pytest.mark.skipif(not RUNS, reason=WHY_NOT)
topk_similarity, recall_at_k = there(retrieval.topk_similarity), there(retrieval.recall_at_k)


@pytest.fixture(autouse=True)
def _few_rows_a_chunk(monkeypatch):
    if not PRESENT:
        monkeypatch.setattr(kernels_triton, "TILES", {16: kernels_triton.tile(16, 16, 32, 2, 8, 1)})


@pytest.mark.parametrize("metric", ["inner", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_agrees_with_sorting(dtype, metric):
    generator = torch.Generator().manual_seed(0)
    queries, corpus = torch.randn(3, 33, generator=generator), torch.randn(150, 33, generator=generator)
    corpus[20], corpus[124] = corpus[90], corpus[90]  # ties: the first row wins
    corpus[9] = 0
    queries[0] = corpus[90]
    scale = None
    if dtype == torch.int8:
        corpus, scale = quantize_int8(corpus)
    options = {"metric": metric, "corpus_scale": scale}
    scores, rows = topk_similarity(queries, corpus.to(dtype), 4, backend="triton", **options)
    want, want_rows = topk_similarity(queries, corpus.to(dtype), 4, backend="reference", **options)
    assert torch.equal(rows, want_rows)
    assert rows[0, :3].tolist() == [20, 90, 124]
    torch.testing.assert_close(scores, want, rtol=1e-5, atol=1e-5)


def test_nan_comes_first_and_too_few_rows_are_marked():
    corpus = torch.randn(24, 3)
    corpus[17], corpus[20] = float("nan"), float("nan")
    scores, rows = topk_similarity(torch.randn(2, 3), corpus, 30, backend="triton")
    assert rows[:, :2].tolist() == [[17, 20]] * 2
    assert scores[:, :2].isnan().all()
    assert (rows[:, 24:] == -1).all()
    assert (scores[:, 24:] == -torch.inf).all()
    assert sorted(rows[0, :24].tolist()) == list(range(24))
    for shape in ((0, 3), (4, 3)):
        scores, rows = topk_similarity(torch.randn(2, 3), torch.zeros(shape), 2, backend="triton")
        assert rows.tolist() == [[-1, -1]] * 2 if shape[0] == 0 else [[0, 1]] * 2


def test_infinite_scores_negative_zeros_and_strides():
    corpus = torch.zeros(6, 16)[:, :2]
    corpus[0, 0], corpus[1, 0], corpus[2, 0], corpus[3, 0] = -torch.inf, torch.inf, -0.0, 1.0
    got = topk_similarity(torch.tensor([[1.0, 0.0]]), corpus, 6, backend="triton")[1]
    assert got.tolist() == [[1, 3, 2, 4, 5, 0]]


def test_recall_and_refusals():
    a, b = torch.randn(9, 8), torch.randn(9, 8)
    assert recall_at_k(a, b, (1, 5), backend="triton") == recall_at_k(a, b, (1, 5), backend="reference")
    with pytest.raises(RuntimeError, match="k up to 128, got 129"):
        topk_similarity(a, b, 129, backend="triton")


def test_operator_keeps_its_schema():
    a, b = torch.randn(12, 8, device="cuda" if PRESENT else "cpu").split((3, 9))
    arguments = (a, b, None, 4, 0)
    checked = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.fastxattn.topk_similarity_triton, arguments, test_utils=checked)
