"""The loss modules: same numbers as what they replace, and the balance of tasks and modalities."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastxattn.nn import BLIP2ITCLoss, FILIPLoss, InfoNCELoss, MultiTaskLoss, SigmoidLoss


def features(n: int = 30, d: int = 16):
    torch.manual_seed(0)
    return F.normalize(torch.randn(n, d), dim=1), F.normalize(torch.randn(n, d), dim=1)


def test_clip_signature():
    image, text = features()
    scale = torch.tensor(14.3)
    loss = InfoNCELoss(local_loss=True, gather_with_grad=True, cache_labels=True, rank=0, world_size=1)
    logits, labels = scale * image @ text.T, torch.arange(30)
    expected = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    torch.testing.assert_close(loss(image, text, scale), expected)
    torch.testing.assert_close(loss(image, text, scale, None, output_dict=True)["contrastive_loss"], expected)


def test_siglip_signature():
    image, text = features()
    scale, bias = torch.tensor(10.0), torch.tensor(-10.0)
    loss = SigmoidLoss(cache_labels=False, rank=0, world_size=1, dist_impl="bidir")
    signs = 2 * torch.eye(30) - 1
    expected = -F.logsigmoid(signs * (scale * image @ text.T + bias)).sum() / 30
    torch.testing.assert_close(loss(image, text, scale, bias), expected)
    torch.testing.assert_close(loss(image, text, scale, bias, output_dict=True)["contrastive_loss"], expected)


def test_filip():
    torch.manual_seed(0)
    image, text = torch.randn(3, 5, 8), torch.randn(3, 4, 8)
    cu_image, cu_text = torch.arange(0, 16, 5, dtype=torch.int32), torch.arange(0, 13, 4, dtype=torch.int32)
    similarity = torch.einsum("nid,mjd->nmij", image, text)
    rows, columns = similarity.amax(3).mean(2), similarity.amax(2).mean(2)
    labels = torch.arange(3)
    expected = (F.cross_entropy(2 * rows, labels) + F.cross_entropy(2 * columns.T, labels)) / 2
    actual = FILIPLoss()(image.flatten(0, 1), text.flatten(0, 1), cu_image, cu_text, 2.0)
    torch.testing.assert_close(actual, expected)


def test_blip2():
    torch.manual_seed(0)
    image, text = torch.randn(6, 32, 8), torch.randn(6, 8)
    scores = torch.einsum("td,iqd->tiq", text, image).amax(-1) * 3.0
    labels = torch.arange(6)
    expected = sum(F.cross_entropy(s, labels, label_smoothing=0.1) for s in (scores, scores.T)) / 2
    torch.testing.assert_close(BLIP2ITCLoss()(image, text, 3.0), expected)
    with pytest.raises(ValueError, match="text_features must have shape"):
        BLIP2ITCLoss()(image, text[:5], 3.0)


def test_multitask_weights():
    loss = MultiTaskLoss(
        {"itc": 1.0, "caption": 2.0}, {"itc": ("image", "text"), "caption": ("text",)}, {"image": 0.5, "text": 3.0}
    )
    parts = {"itc": torch.tensor(1.0, requires_grad=True), "caption": torch.tensor(10.0, requires_grad=True)}
    total = loss(parts)
    assert total.item() == pytest.approx(1.75 * 1 + 6 * 10)
    total.backward()
    assert parts["itc"].grad == 1.75
    with pytest.raises(ValueError, match="losses must be named after tasks"):
        loss({"other": torch.tensor(1.0)})


def test_modality_dropout_leaves_tasks_out_only_in_training():
    loss = MultiTaskLoss({"a": 1.0, "b": 1.0}, {"a": ("image",), "b": ("audio",)}, modality_dropout=0.5)
    generator = torch.Generator().manual_seed(0)
    parts = {"a": torch.tensor(1.0), "b": torch.tensor(10.0)}
    totals = [loss(parts, generator).item() for _ in range(200)]
    assert set(totals) == {1.0, 10.0, 11.0}  # never both gone
    assert 70 < totals.count(11.0) + 25 < 130
    assert loss.eval()(parts).item() == 11.0
