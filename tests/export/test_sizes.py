"""to_onnx: what it refuses to write, sizes of the example that stay open, names, and files of the user."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

import fastxattn
import fastxattn.export as export
from fastxattn.nn import AttentionalPooler, BLIP2ITCLoss, MultiheadCrossAttention, SiglipPooler
from tests.export.models import Context, packed


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        return self.function(x) if y is None else self.function(x, y)


def exported(function: Callable[..., Any], *args: Tensor, folder: Path, **options: Any) -> export.Session:
    return export.Session(export.to_onnx(Call(function).eval(), args, folder / "m.onnx", **options).path)


@pytest.mark.parametrize("right", [False, True])
@pytest.mark.parametrize("shape", [(7,), (2, 7), (2, 3, 7)], ids=str)
def test_searchsorted(shape: tuple[int, ...], right: bool, tmp_path: Path) -> None:
    values = torch.tensor([0.5, 1.0, float("nan"), 4.0]).expand(*shape[:-1], 4).contiguous()
    session = exported(
        lambda x, y: torch.searchsorted(x, y, right=right), torch.randn(shape).sort().values, values, folder=tmp_path
    )
    sequence = torch.randn(shape).sort().values
    values[..., 0] = sequence[..., 2]
    (got,) = session(sequence, values)
    assert torch.equal(got, torch.searchsorted(sequence, values, right=right))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["classes", "probabilities", "images"])
def test_cross_entropy(kind: str, weighted: bool, smoothing: float, reduction: str, tmp_path: Path) -> None:
    weight = torch.tensor([0.5, 1.0, 2.0, 0.25]) if weighted else None
    scores = torch.randn(3, 4, 5) if kind == "images" else torch.randn(3, 4)
    target = torch.randint(0, 4, (3, 5) if kind == "images" else (3,))
    target.view(-1)[0] = -100
    if kind == "probabilities":
        target = torch.randn(3, 4).softmax(1)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(x, y, weight, reduction=reduction, label_smoothing=smoothing)

    (got,) = exported(loss, scores, target, folder=tmp_path)(scores, target)
    torch.testing.assert_close(got, loss(scores, target), rtol=1e-5, atol=1e-5)


def test_blip2_itc_loss_keeps_its_label_smoothing(tmp_path: Path) -> None:
    module, args = BLIP2ITCLoss(0.1).eval(), (torch.randn(3, 2, 8), torch.randn(3, 8), torch.tensor(3.0))
    (got,) = export.Session(export.to_onnx(module, args, tmp_path / "m.onnx").path)(*args)
    torch.testing.assert_close(got, module(*args))


def test_a_part_in_training_mode_is_refused(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)).eval()
    module[1].train()
    with pytest.raises(ValueError, match=r"eval mode.*1 trains"):
        export.to_onnx(module, (torch.randn(2, 8),), tmp_path / "m.onnx")
    with pytest.raises(ValueError, match="different results for the same inputs"):
        exported(lambda x: nn.functional.dropout(x, 0.5, training=True), torch.randn(4, 8), folder=tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "branch",
    [
        lambda x: x * 2 if x.shape[0] > 1 else x,
        lambda x: x * 2 if x.shape[1] > 4 else x,
        lambda x: torch.cat([x] * x.shape[1], 1),
    ],
    ids=["batch", "length", "loop"],
)
def test_a_branch_on_a_size_is_refused_by_axis(branch: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"axis [01] of x at"):
        exported(branch, torch.randn(3, 5), folder=tmp_path)
    assert not any(tmp_path.iterdir())


def test_dynamic_fixes_an_axis_on_purpose(tmp_path: Path) -> None:
    session = exported(
        lambda x: x * 2 if x.shape[1] > 4 else x, torch.randn(3, 5), folder=tmp_path, dynamic={"x": {1: False}}
    )
    assert session(torch.ones(7, 5))[0].sum() == 70
    with pytest.raises(Exception, match="invalid dimensions"):
        session(torch.ones(3, 3))


def test_len_of_a_tensor_stays_open(tmp_path: Path) -> None:
    session = exported(lambda x: x.reshape(len(x), -1), torch.randn(1, 3, 4), folder=tmp_path)
    assert session(torch.ones(5, 2, 4))[0].shape == (5, 8)


def test_another_width_than_the_scales_is_refused(tmp_path: Path) -> None:
    session = exported(
        lambda x, y: fastxattn.cross_attention(x, y, y),
        torch.randn(2, 3, 4, 8),
        torch.randn(2, 5, 4, 8),
        folder=tmp_path,
    )
    with pytest.raises(Exception, match="invalid dimensions"):
        session(torch.randn(2, 3, 4, 16), torch.randn(2, 5, 4, 16))


class Classifier(nn.Module):
    """One learned query for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = (nn.MultiheadAttention(32, 4, batch_first=True) for _ in range(2))
        self.query = nn.Parameter(torch.randn(1, 1, 32))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.body(x, x, x, need_weights=False)[0]
        out: Tensor = self.head(self.query.expand(len(x), -1, -1), x, x, need_weights=False)[0]
        return out


ONE: dict[str, Callable[[], nn.Module]] = {
    "accelerated classifier": Classifier,
    "SiglipPooler": lambda: SiglipPooler(32, 4, 48),
    "AttentionalPooler": lambda: AttentionalPooler(32, 32, 4, 1),
    "TransformerEncoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), 1),
}


@pytest.mark.parametrize("name", ONE)
def test_a_batch_of_1_serves_every_batch(name: str, tmp_path: Path) -> None:
    module = ONE[name]().eval()
    if name == "accelerated classifier":
        fastxattn.accelerate(module)
    done = export.to_onnx(module, (torch.randn(1, 9, 32),), tmp_path / "m.onnx")
    for library in (False, True):
        session = export.Session(done.path, library=library)
        for batch, length in ((1, 9), (3, 9), (2, 5)):
            x = torch.randn(batch, length, 32)
            torch.testing.assert_close(session(x)[0], module(x).detach(), rtol=1e-4, atol=1e-5)


def test_absorbed_attention_declares_right_shapes(tmp_path: Path) -> None:
    done = export.to_onnx(Context().eval(), (packed(2, 3), packed(4, 5, width=16)), tmp_path / "m.onnx")
    onnx.checker.check_model(str(done.path), full_check=True)
    onnx.shape_inference.infer_shapes(onnx.load(done.path), strict_mode=True, data_prop=True)


def test_the_reference_evaluator_runs_the_bodies(tmp_path: Path) -> None:
    q, k = torch.randn(2, 3, 4, 8), torch.randn(2, 5, 4, 8)
    exported(lambda x, y: fastxattn.cross_attention(x, y, y), q, k, folder=tmp_path)
    got = ReferenceEvaluator(onnx.load(tmp_path / "m.onnx")).run(None, {"x": q.numpy(), "y": k.numpy()})[0]
    np.testing.assert_allclose(got, fastxattn.cross_attention(q, k, k).numpy(), rtol=1e-5, atol=1e-5)


def test_packed_results_keep_the_inputs_names(tmp_path: Path) -> None:
    module, args = MultiheadCrossAttention(32, 4).eval(), (packed(3, 7), packed(30, 20))
    done = export.to_onnx(module, args, tmp_path / "m.onnx")
    assert done.inputs == ("query_values", "query_cu_seqlens", "context_values", "context_cu_seqlens")
    assert done.outputs == ("values", "cu_seqlens")
    report = export.verify(done.path, module, args)
    assert report.ok, str(report)


class Names(nn.Module):
    def forward(self, out: Tensor, nested: dict[str, Any], *, late: Tensor) -> dict[str, Any]:
        total = out + nested["a"]["b"] + nested["a_b"] + late
        return {"out": total, "again": total, "late": late, "list": [total * 2, nested["a"]["b"]]}


@pytest.mark.parametrize("chosen", [False, True])
def test_names_of_nested_repeated_and_chosen_values(chosen: bool, tmp_path: Path) -> None:
    x = torch.randn(2, 3)
    args, kwargs = (x, {"a": {"b": x + 1}, "a_b": x + 2}), {"late": x + 3}
    options = {"input_names": list("pqrs"), "output_names": list("tuvwz")} if chosen else {}
    done = export.to_onnx(Names().eval(), args, tmp_path / "m.onnx", kwargs=kwargs, **options)
    if chosen:
        assert (done.inputs, done.outputs) == (tuple("pqrs"), tuple("tuvwz"))
    else:
        assert done.inputs == ("out", "nested_a_b", "nested_a_b_2", "late")
        assert done.outputs == ("output_out", "again", "output_late", "list_0", "list_1")
    onnx.checker.check_model(str(done.path), full_check=True)
    report = export.verify(done.path, Names().eval(), args, kwargs=kwargs)
    assert report.ok, str(report)


def test_somebody_elses_data_file_is_kept(tmp_path: Path) -> None:
    module, args, path = nn.Linear(32, 32).eval(), (torch.randn(2, 32),), tmp_path / "m.onnx"
    data = tmp_path / "m.onnx.data"
    data.write_text("mine")
    export.to_onnx(module, args, path)
    export.to_onnx(module, args, path, overwrite=True)
    assert data.read_text() == "mine"
    path.unlink()
    with pytest.raises(FileExistsError, match="overwrite=True"):
        export.to_onnx(module, args, path, external_data=True)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx.data"]


@pytest.mark.parametrize("fault", ["save", "check"])
def test_a_failed_export_changes_nothing(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, args, path = nn.Linear(32, 32).eval(), (torch.randn(2, 32),), tmp_path / "m.onnx"
    export.to_onnx(module, args, path, external_data=True)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    if fault == "save":
        monkeypatch.setattr(torch.onnx.ONNXProgram, "save", fail)
    else:
        monkeypatch.setattr(export.Session, "__call__", fail)
    with pytest.raises((OSError, ValueError)):
        export.to_onnx(module, args, path, external_data=True, overwrite=True)
    with pytest.raises((OSError, ValueError)):
        export.to_onnx(module, args, tmp_path / "new" / "m.onnx")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_lazily_negated_tensor_keeps_its_sign(tmp_path: Path) -> None:
    session = exported(lambda x: x * 1, torch.ones(2, 2), folder=tmp_path)
    x = torch.tensor([[1.0 + 2.0j]]).conj().imag
    assert session(x)[0].item() == -2.0


def test_a_mask_that_broadcasts_is_no_reason_to_refuse(tmp_path: Path) -> None:
    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerDecoderLayer(32, 4, 48, batch_first=True)

        def forward(self, tgt: Tensor, memory: Tensor, tgt_mask: Tensor, memory_mask: Tensor) -> Tensor:
            out: Tensor = self.layer(tgt, memory, tgt_mask=tgt_mask, memory_mask=memory_mask, tgt_is_causal=False)
            return out

    module = Step().eval()
    fastxattn.accelerate(module)
    masks = torch.ones(40, 40, dtype=torch.bool).triu(1), torch.zeros(40, 30, dtype=torch.bool)
    args = torch.randn(2, 40, 32), torch.randn(2, 30, 32), *masks
    done = export.to_onnx(module, args, tmp_path / "m.onnx")
    hidden = masks[0].clone()
    hidden[0] = True  # a query without keys: 0 here, NaN in torch's own float64 attention
    report = export.verify(done.path, module, args, cases={"a query without keys": ((*args[:2], hidden, masks[1]), {})})
    assert report.ok, str(report)
