"""Fused similarity and top-k against sorting every score."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch

from fastxattn.ops.retrieval import api, quantize_int8, recall_at_k, topk_similarity
from fastxattn.runtime import native

pytestmark = pytest.mark.skipif(native.cpu_library().library is None, reason="needs the CPU kernels")


def whole(rows: int, d: int, seed: int) -> torch.Tensor:
    """Small whole numbers: every product is exact, ties abound, results must be equal to the last bit."""
    return torch.randint(-4, 5, (rows, d), generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("isa", native.available_cpu_isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_exact_with_ties(isa, dtype):
    native.force_cpu_isa(isa)
    try:
        queries, corpus = whole(70, 40, 0), whole(9000, 40, 1).to(dtype)
        expected = topk_similarity(queries, corpus, 7, backend="reference")
        actual = topk_similarity(queries, corpus, 7, backend="cpu")
        assert torch.equal(actual[0], expected[0])
        assert torch.equal(actual[1], expected[1])
    finally:
        native.force_cpu_isa("auto")


@pytest.mark.parametrize(
    ("q", "rows", "d", "k"), [(1, 1, 1, 1), (3, 5, 7, 9), (65, 300, 63, 3), (0, 10, 4, 2), (2, 0, 4, 2)]
)
def test_shapes(q, rows, d, k):
    queries, corpus = whole(q, d, 0), whole(rows, d, 1)
    for actual, expected in zip(
        topk_similarity(queries, corpus, k, backend="cpu"),
        topk_similarity(queries, corpus, k, backend="reference"),
        strict=True,
    ):
        assert torch.equal(actual, expected)


def test_cosine_strides_and_nonfinite():
    torch.manual_seed(0)
    queries, corpus = torch.randn(5, 20), torch.randn(400, 32)[:, :20]
    corpus[3] = 0
    corpus[9] = float("nan")
    corpus[17, 0] = float("-inf")
    for metric in ("inner", "cosine"):
        actual = topk_similarity(queries, corpus, 12, metric=metric, backend="cpu")
        expected = topk_similarity(queries, corpus, 12, metric=metric, backend="reference")
        assert torch.equal(actual[1], expected[1])
        torch.testing.assert_close(actual[0], expected[0], equal_nan=True)


def test_minus_infinity_fills_up_last():
    queries, corpus = torch.ones(1, 2), torch.tensor([[-torch.inf, 0], [1, 1], [-torch.inf, 0], [-torch.inf, 0]])
    for k in (2, 3, 6):
        actual = topk_similarity(queries, corpus, k, backend="cpu")
        assert actual[1].tolist()[0] == [1, 0, 2, 3, -1, -1][:k]


def test_int8_corpus_recalls_its_float_twin():
    torch.manual_seed(0)
    queries, corpus = torch.randn(20, 64), torch.randn(3000, 64)
    rows, scale = quantize_int8(corpus)
    for metric in ("inner", "cosine"):
        exact = topk_similarity(queries, corpus, 1, metric=metric)
        coarse = topk_similarity(queries, rows, 10, metric=metric, corpus_scale=scale)
        assert (coarse[1] == exact[1]).any(1).float().mean() >= 0.95
        torch.testing.assert_close(coarse[0][:, :1], exact[0], atol=0.5, rtol=0.02)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_memory_mapped_in_chunks(tmp_path, monkeypatch, dtype):
    corpus = whole(1000, 16, 1)
    path = tmp_path / "corpus.bin"
    corpus.numpy().astype(dtype).tofile(path)
    mapped = numpy.memmap(path, dtype=dtype, mode="r", shape=(1000, 16))
    monkeypatch.setattr(api, "CHUNK_BYTES", 70 * 16 * mapped.dtype.itemsize)
    queries = whole(9, 16, 2)
    scale = torch.linspace(1, 2, 1000)
    for options in ({}, {"metric": "cosine"}, {"corpus_scale": scale}):
        actual = topk_similarity(queries, mapped, 5, **options)
        expected = topk_similarity(queries, corpus, 5, backend="cpu", **options)
        assert torch.equal(actual[1], expected[1])
        assert torch.equal(actual[0], expected[0])


def test_same_for_any_number_of_threads():
    torch.manual_seed(0)
    queries, corpus, threads = torch.randn(70, 24), torch.randn(20000, 24), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = topk_similarity(queries, corpus, 9)
        torch.set_num_threads(3)
        three = topk_similarity(queries, corpus, 9)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one[0], three[0])
    assert torch.equal(one[1], three[1])


def test_recall_both_ways():
    a = torch.eye(6)
    b = torch.eye(6)[[0, 1, 2, 3, 5, 4]]
    result = recall_at_k(a, b, ks=(1, 6))
    assert result == {"a->b@1": 4 / 6, "a->b@6": 1.0, "b->a@1": 4 / 6, "b->a@6": 1.0}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"k": 0}, ValueError, "k must be a whole number"),
        ({"corpus": torch.zeros(4, 9)}, ValueError, "corpus must have shape"),
        ({"corpus": torch.zeros(4, 8, dtype=torch.int32)}, TypeError, "corpus must be float32"),
        ({"corpus": [1.0]}, TypeError, "corpus must be a tensor or a numpy.memmap; got list"),
        ({"metric": "l2"}, ValueError, "metric must be one of"),
        ({"corpus_scale": torch.zeros(3)}, ValueError, "corpus_scale must have shape"),
    ],
)
def test_bad_input(change, error, words):
    with pytest.raises(error, match=words):
        topk_similarity(**{"queries": torch.zeros(2, 8), "corpus": torch.zeros(4, 8), "k": 1, **change})


@pytest.mark.parametrize("metric", ["inner", "cosine"])
def test_scores_of_a_memory_mapped_corpus_have_the_same_gradient(
    metric: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunk by chunk as at once, with missing rows and a zero vector."""
    corpus, queries = torch.randn(7, 8), torch.randn(4, 8)
    corpus[2] = 0
    queries[1] = 0
    numpy.save(tmp_path / "corpus.npy", corpus.numpy())
    monkeypatch.setattr(api, "CHUNK_BYTES", 3 * 8 * 4)
    grads = []
    for rows in (corpus, numpy.load(tmp_path / "corpus.npy", mmap_mode="r")):
        leaf = queries.clone().requires_grad_()
        scores, found = topk_similarity(leaf, rows, 9, metric=metric)
        assert torch.equal(found[:, 7:], torch.full((4, 2), -1))
        scores.masked_fill(scores == -torch.inf, 0).sin().sum().backward()
        grads.append(leaf.grad)
    leaf = queries.clone().requires_grad_()
    left, right = leaf, corpus
    if metric == "cosine":
        left, right = (torch.nn.functional.normalize(t, dim=1) for t in (leaf, corpus))
    (left @ right.T).sin().sum().backward()
    zero = queries.abs().sum(1) == 0
    for grad in grads:
        torch.testing.assert_close(grad[~zero], leaf.grad[~zero])
        assert torch.isfinite(grad).all()
