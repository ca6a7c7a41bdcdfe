"""The rules that all losses, late interaction and retrieval share: dtypes, autocast, numbers and devices."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import fastxattn
from fastxattn import infonce_loss, late_interaction_loss, maxsim, recall_at_k, sigmoid_loss, topk_similarity
from fastxattn.nn import BLIP2ITCLoss, FILIPLoss, InfoNCELoss, MultiTaskLoss, SigmoidLoss
from fastxattn.ops.retrieval import quantize_int8
from fastxattn.runtime import native
from fastxattn.runtime.backend import use_backend
from tests.loss_calls import infonce

needs_native = pytest.mark.skipif(native.cpu_library().library is None, reason="needs the CPU kernels")
G = torch.Generator().manual_seed(0)
N, M, D = 6, 6, 8
A, B, HARD, QUEUE, TEACHER = (torch.randn(s, generator=G) for s in ((N, D), (M, D), (N, 2, D), (9, D), (N, 3)))
CU = torch.tensor([0, 3, 6], dtype=torch.int32)
IDS, TARGETS = torch.tensor([0, 1, 1, -1, 2, 0]), torch.tensor([1, 1, 0, -1, 5, 3])
Features = dict[str, torch.Tensor]

SIDES = {"image_features": A, "text_features": B}
CALLS: dict[str, tuple[Callable[..., Any], Features, dict[str, torch.Tensor]]] = {
    "infonce": (lambda image_features, text_features: infonce_loss(image_features, text_features, 5.0), SIDES, {}),
    "masks": (
        lambda image_features, text_features, targets, ignore_ids, weights: infonce_loss(
            image_features, text_features, 5.0, targets=targets, ignore_ids=ignore_ids, weights=weights
        ),
        SIDES,
        {"targets": TARGETS, "ignore_ids": IDS, "weights": torch.ones(N)},
    ),
    "hard negatives": (
        lambda image_features, text_features, hard_negatives: infonce_loss(
            image_features, text_features, 5.0, hard_negatives=hard_negatives
        ),
        SIDES | {"hard_negatives": HARD},
        {},
    ),
    "queues": (
        lambda image_features, text_features, image_queue, text_queue: infonce_loss(
            image_features, text_features, 5.0, image_queue=image_queue, text_queue=text_queue
        ),
        SIDES | {"image_queue": QUEUE, "text_queue": QUEUE},
        {},
    ),
    "teacher": (
        lambda image_features, text_features, t, u: infonce(image_features, text_features, 5.0, teacher=(t, u, 3.0)),
        SIDES | {"t": TEACHER, "u": TEACHER.flip(0)},
        {},
    ),
    "sigmoid": (
        lambda image_features, text_features, groups, weights: sigmoid_loss(
            image_features, text_features, 5.0, -2.0, groups=groups, weights=weights
        ),
        SIDES,
        {"groups": IDS, "weights": torch.rand(N, generator=G)},
    ),
    "maxsim": (
        lambda a, b, cu_seqlens_a, cu_seqlens_b: maxsim(a, b, cu_seqlens_a, cu_seqlens_b).sum(),
        {"a": A, "b": B},
        {"cu_seqlens_a": CU, "cu_seqlens_b": CU},
    ),
    "late interaction": (
        lambda a, b, cu_seqlens_a, cu_seqlens_b: late_interaction_loss(a, b, cu_seqlens_a, cu_seqlens_b, 5.0),
        {"a": A, "b": B},
        {"cu_seqlens_a": CU, "cu_seqlens_b": CU},
    ),
    "InfoNCELoss": (lambda **sides: InfoNCELoss()(**sides, logit_scale=5.0, logit_bias=torch.tensor(1.0)), SIDES, {}),
    "SigmoidLoss": (lambda **sides: SigmoidLoss()(**sides, logit_scale=5.0, logit_bias=None), SIDES, {}),
    "FILIPLoss": (
        lambda a, b, cu_seqlens_a, cu_seqlens_b: FILIPLoss()(a, b, cu_seqlens_a, cu_seqlens_b, 5.0),
        {"a": A, "b": B},
        {"cu_seqlens_a": CU, "cu_seqlens_b": CU},
    ),
    "BLIP2ITCLoss": (
        lambda image_queries, text_features: BLIP2ITCLoss()(image_queries, text_features, 5.0),
        {"image_queries": A.view(3, 2, D), "text_features": B[:3]},
        {},
    ),
}
BACKENDS = ("reference", pytest.param("cpu", marks=needs_native))


@pytest.fixture(params=BACKENDS)
def backend(request):
    with use_backend(request.param):
        yield request.param


def grads(
    call: Callable[..., torch.Tensor],
    features: Features,
    others: dict[str, torch.Tensor],
    autocast: torch.dtype | None = None,
) -> Any:
    """Loss, and gradients taken outside of autocast, as PyTorch asks for."""
    leaves = {k: t.clone().requires_grad_() for k, t in features.items()}
    loss = _under(autocast, call, **leaves, **others)
    return loss.detach(), torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CALLS)
def test_autocast_casts_all_features_and_nothing_else(backend, name, dtype):
    call, features, others = CALLS[name]
    half = {k: t.to(dtype) for k, t in features.items()}
    expected, expected_grads = grads(call, half, others)
    some = {k: t if i % 2 else half[k] for i, (k, t) in enumerate(features.items())}  # mixed dtypes
    for given in (features, half, some, {k: t.half() for k, t in some.items()} if dtype == torch.float16 else half):
        loss, found = grads(call, given, others, dtype)
        assert loss.dtype == torch.float32
        assert torch.equal(loss, expected)
        for k, g, e in zip(given, found, expected_grads, strict=True):
            assert (g is None) == (e is None)
            if g is not None:
                assert g.dtype == given[k].dtype
                assert torch.equal(g.to(dtype), e)


@pytest.mark.parametrize("name", CALLS)
def test_float64_stays_float64_under_autocast(name):
    call, features, others = CALLS[name]
    wide = {k: t.double() for k, t in features.items()}
    expected, expected_grads = grads(call, wide, others)
    loss, found = grads(call, wide, others, torch.bfloat16)
    assert loss.dtype == torch.float64
    assert torch.equal(loss, expected)
    assert all(g is e is None or torch.equal(g, e) for g, e in zip(found, expected_grads, strict=True))


def test_search_is_not_rounded_by_autocast(backend):
    queries, corpus = A.bfloat16(), B.bfloat16()
    for rows, options in ((corpus, {}), (corpus, {"metric": "cosine"}), (corpus.double(), {})):
        if rows.dtype == torch.float64 and backend == "cpu":
            continue
        expected = topk_similarity(queries, rows, 3, **options)
        with torch.autocast("cpu", torch.bfloat16):
            assert all(map(torch.equal, topk_similarity(queries, rows, 3, **options), expected))


def test_dtypes_may_not_be_mixed_without_autocast():
    for call, features, others in CALLS.values():
        for name in list(features)[1:]:
            if name in ("t", "u"):
                continue
            with pytest.raises(TypeError, match=rf"^{name} must have dtype torch.float32"):
                call(**{**features, name: features[name].bfloat16()}, **others)


@pytest.mark.parametrize("name", CALLS)
def test_every_tensor_must_be_where_the_features_are(name):
    call, features, others = CALLS[name]
    for argument in (*list(features)[1:], *others):
        said = {"t": "teacher", "u": "teacher"}.get(argument, argument)
        given = {**features, **others}
        with pytest.raises(ValueError, match=rf"^{said}\S* must be on cpu as the features; got meta"):
            call(**{**given, argument: given[argument].to("meta")})


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("logit_scale", lambda t: infonce_loss(A, B, t)),
        ("logit_scale", lambda t: sigmoid_loss(A, B, t)),
        ("logit_bias", lambda t: sigmoid_loss(A, B, 1.0, t)),
        ("logit_bias", lambda t: InfoNCELoss()(A, B, 1.0, t)),
        ("logit_scale", lambda t: late_interaction_loss(A, B, CU, CU, t)),
        ("logit_scale", lambda t: BLIP2ITCLoss()(A.view(3, 2, D), B[:3], t)),
        ("teacher_logit_scale", lambda t: infonce(A, B, 1.0, teacher=(A, B, t))),
        ("corpus_scale", lambda t: topk_similarity(A, B.to(torch.int8), 1, corpus_scale=t.expand(M))),
    ],
)
def test_scales_must_be_where_the_features_are(name, call):
    with pytest.raises(ValueError, match=rf"^{name} must be on cpu as the features; got meta"):
        call(torch.ones((), device="meta"))


SCALES: dict[str, tuple[Callable[..., torch.Tensor], str]] = {
    "infonce": (lambda s: infonce_loss(A, B, s), "logit_scale"),
    "sigmoid": (lambda s: sigmoid_loss(A, B, s, -1.0), "logit_scale"),
    "bias": (lambda s: sigmoid_loss(A, B, 1.0, s), "logit_bias"),
    "late interaction": (lambda s: late_interaction_loss(A, B, CU, CU, s), "logit_scale"),
    "BLIP-2": (lambda s: BLIP2ITCLoss()(A.view(3, 2, D), B[:3], s), "logit_scale"),
    "teacher": (lambda s: infonce(A, B, 1.0, teacher=(A, B, s)), "teacher_logit_scale"),
}


@needs_native
@pytest.mark.parametrize("name", SCALES)
def test_scales_of_every_kind_give_the_same(name):
    call, _ = SCALES[name]
    expected = call(2.5)
    kinds = [np.float32(2.5), np.float64(2.5), np.array(2.5)]
    kinds += [torch.full(s, 2.5, dtype=t) for t in (torch.float64, torch.bfloat16, torch.float16) for s in ((), (1, 1))]
    for scale in kinds:
        assert torch.equal(call(scale), expected)
        if isinstance(scale, torch.Tensor) and name != "teacher":
            (grad,) = torch.autograd.grad(call(leaf := scale.clone().requires_grad_()), leaf)
            assert (grad.dtype, grad.shape) == (scale.dtype, scale.shape)
            assert grad.ne(0).all()
    assert torch.equal(call(np.int64(3)), call(torch.tensor(3)))


@needs_native
def test_a_float64_scale_does_not_change_the_backend():
    scale = torch.nn.Parameter(torch.tensor(np.log(1 / 0.07)))
    assert scale.dtype == torch.float64
    for loss in (infonce_loss, sigmoid_loss):
        assert fastxattn.explain(loss, A, B, scale).chosen == "cpu"
        assert loss(A, B, scale).dtype == torch.float32


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize(
    ("value", "error"),
    [
        (True, TypeError),
        (np.bool_(True), TypeError),
        (torch.tensor(True), TypeError),
        ("1", TypeError),
        (1j, TypeError),
        (float("nan"), ValueError),
        (float("inf"), ValueError),
        (np.float32("nan"), ValueError),
        (torch.ones(2), ValueError),
        (torch.ones(0), ValueError),
        (np.ones(2), ValueError),
    ],
)
def test_wrong_scales_are_refused_by_every_call(name, value, error):
    call, said = SCALES[name]
    for _ in range(2):
        with pytest.raises(error, match=f"^{said} must"):
            call(value)
        call(2.0)


@pytest.mark.parametrize(
    ("name", "call", "wrong"),
    [
        ("label_smoothing", lambda x: infonce_loss(A, B, 1.0, label_smoothing=x), (-0.1, 1.0, "nan")),
        ("label_smoothing", lambda x: BLIP2ITCLoss(x), (-0.1, 1.0, "nan")),
        ("false_negative_margin", lambda x: infonce_loss(A, B, 1.0, false_negative_margin=x), ("nan", "inf")),
        ("smooth", lambda x: maxsim(A, B, CU, CU, smooth=x), (0.0, -1.0, "nan", "inf")),
        ("smooth", lambda x: late_interaction_loss(A, B, CU, CU, 1.0, smooth=x), (0.0, "nan", "inf")),
        ("modality_dropout", lambda x: MultiTaskLoss({"x": 1.0}, modality_dropout=x), (-0.1, 1.0, "nan")),
        ("the weight of 'x'", lambda x: MultiTaskLoss({"x": x}), ("nan", "inf")),
    ],
)
def test_wrong_numbers_are_refused_by_every_call(name, call, wrong):
    call(0.5)
    for value in wrong:
        with pytest.raises(ValueError, match=f"^{name} must .*; got {value}"):
            call(float(value))
        with pytest.raises(ValueError, match=f"^{name} must .*; got {value}"):
            call(np.float64(value))
    for value in (True, "0.5"):
        with pytest.raises(TypeError, match=f"^{name} must be a number; got {type(value).__name__}"):
            call(value)


@pytest.mark.parametrize("k", [0, -1, True, 1.0, float("nan"), "1", None])
def test_only_whole_numbers_count_results(k):
    _, metrics = infonce_loss(A, B, 1.0, return_metrics=True)
    for name, call in (
        ("k", lambda: topk_similarity(A, B, k)),
        ("each of ks", lambda: recall_at_k(A, B, (k, 3))),
        ("each of ks", lambda: recall_at_k(A, B, (3, k))),
        ("k", lambda: metrics[0].recall(k)),
    ):
        with pytest.raises(ValueError, match=f"^{name} must be a whole number of at least 1; got"):
            call()


def test_numpy_numbers_count_results():
    assert recall_at_k(A, B, np.arange(1, 3)) == recall_at_k(A, B, (1, 2))
    assert all(map(torch.equal, topk_similarity(A, B, np.int32(2)), topk_similarity(A, B, 2)))


def test_the_meta_device():
    a, cu = A.to("meta"), CU.to("meta")
    assert infonce_loss(a, a, 1.0).is_meta
    assert topk_similarity(a, a, 2)[0].shape == (N, 2)
    with pytest.raises(RuntimeError, match="on the meta device there are none"):
        maxsim(a, a, cu, cu)


def test_cosine_in_float64_is_exact():
    queries, corpus = A.double(), B.double()
    scores, _ = topk_similarity(queries, corpus, M, metric="cosine", backend="reference")
    expected = torch.nn.functional.cosine_similarity(queries[:, None], corpus[None], dim=2).sort(1, descending=True)
    torch.testing.assert_close(scores, expected.values, rtol=1e-14, atol=1e-14)


@needs_native
def test_calls_of_many_kinds_compile_whole():
    infonce_loss(A, B, 1.0)  # loads the library
    for call in (
        lambda a, b: infonce(a, b, np.float32(2.0), groups=IDS),
        lambda a, b: infonce_loss(a, b, 2.0, ignore_ids=IDS, targets=TARGETS, exclude_self=True),
        lambda a, b: sigmoid_loss(a, b, torch.tensor(2.0, dtype=torch.float64), None),
    ):
        for kind in (torch.bfloat16, None):
            function = functools.partial(_under, kind, call)
            torch._dynamo.reset()
            compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
            torch.testing.assert_close(compiled(A, B), function(A, B))
    compiled = torch.compile(infonce_loss, backend="aot_eager", fullgraph=True)
    for scale in (1.0, 2.0, 3.0):  # a compiler makes the second one symbolic
        torch.testing.assert_close(compiled(A, B, scale), infonce_loss(A, B, scale))


def _under(dtype: torch.dtype | None, call: Callable[..., Any], *arguments: torch.Tensor, **named: torch.Tensor) -> Any:
    if dtype is None:
        return call(*arguments, **named)
    with torch.autocast("cpu", dtype):
        return call(*arguments, **named)


def test_quantized_rows_keep_their_scale():
    rows, scale = quantize_int8(B)
    with pytest.raises(ValueError, match=r"^corpus_scale must be on cpu as the features; got meta"):
        topk_similarity(A, rows, 2, corpus_scale=scale.to("meta"))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"groups": None}, TypeError, "groups must be a tensor or a pair of tensors; got NoneType"),
        ({"groups": IDS[:-1]}, ValueError, rf"groups must have shape \({N},\); got \({N - 1},\)"),
        ({"groups": (IDS, IDS[:-1])}, ValueError, rf"groups\[1\] must have shape \({N},\); got \({N - 1},\)"),
        ({"groups": IDS, "ignore_ids": IDS.float()}, TypeError, "ignore_ids must be an int32 or int64 tensor"),
    ],
    ids=["none", "one", "pair", "ignore_ids"],
)
def test_wrong_ids_are_named_as_they_were_passed(options, error, message):
    with pytest.raises(error, match=message):
        fastxattn.multi_positive_infonce_loss(A, B, 5.0, **options)
