"""to_onnx, Session and verify: small modules through the file and back."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch

import fastxattn.export as export
from fastxattn.export.operations import functions
from tests.export.models import Bare, Padded, Varlen, bare_inputs, packed, padded_inputs


@pytest.fixture(scope="module")
def varlen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Varlen]:
    module, path = Varlen().eval(), tmp_path_factory.mktemp("onnx") / "varlen.onnx"
    # One sequence of one token: nothing of the example may be baked in.
    args = packed(1), packed(1, width=24)
    export.to_onnx(module, args, path)
    return path, module


def test_packed_module_verifies_with_and_without_the_library(varlen: tuple[Path, Varlen]) -> None:
    path, module = varlen
    report = export.verify(path, module, (packed(3, 0, 5), packed(4, 2, 0, width=24)))
    assert report.ok, str(report)
    assert {c.library for c in report.checks} == {False, True}
    assert {"ragged, one empty", "only empty sequences", "NaN past the last offset"} <= {c.case for c in report.checks}


def test_names_and_open_axes(varlen: tuple[Path, Varlen]) -> None:
    model = onnx.load(varlen[0])
    onnx.checker.check_model(model, full_check=True)
    assert [v.name for v in model.graph.input] == ["text_values", "text_cu_seqlens", "image_values", "image_cu_seqlens"]
    assert [v.name for v in model.graph.output] == ["out", "lse"]
    assert all(v.type.tensor_type.shape.dim[0].dim_param for v in model.graph.input)
    assert [f.name for f in model.functions] == ["Attention"]


def test_verify_catches_a_wrong_file(varlen: tuple[Path, Varlen], tmp_path: Path) -> None:
    path, module = varlen
    model = onnx.load(path)
    node = next(n for n in model.graph.node if n.domain == "fastxattn")
    next(a for a in node.attribute if a.name == "scale").f *= 1.01
    onnx.save(model, tmp_path / "wrong.onnx")
    report = export.verify(tmp_path / "wrong.onnx", module, (packed(3, 2), packed(4, 2, width=24)))
    assert not report.ok
    assert "FAILED" in str(report)


@pytest.mark.parametrize("biased", [False, True])
def test_padded_module(biased: bool, tmp_path: Path) -> None:
    module = Padded(biased).eval()
    export.to_onnx(module, padded_inputs(1, 1, 1), tmp_path / "padded.onnx")
    report = export.verify(tmp_path / "padded.onnx", module, padded_inputs())
    assert report.ok, str(report)
    assert {"a row without tokens", "batch of 1", "batch doubled"} <= {c.case for c in report.checks}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_option_in_every_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    module = Bare().eval()
    export.to_onnx(module, bare_inputs(dtype), tmp_path / "bare.onnx")
    args = bare_inputs(dtype)
    poisoned = [a.clone() for a in args]
    poisoned[1][8] = float("nan")  # a row that key_index does not name
    report = export.verify(tmp_path / "bare.onnx", module, args, cases={"NaN in an unused row": (tuple(poisoned), {})})
    assert report.ok, str(report)


@pytest.mark.parametrize("opset", [20, 24])
def test_functions_import_the_models_opset(opset: int, tmp_path: Path) -> None:
    module = Padded().eval()
    done = export.to_onnx(module, padded_inputs(), tmp_path / "m.onnx", opset=opset)
    model = onnx.load(done.path)
    versions = {o.version for f in model.functions for o in f.opset_import if o.domain == ""}
    assert versions == {opset} == {o.version for o in model.opset_import if o.domain == ""}
    assert export.verify(done.path, module, padded_inputs()).ok


def test_padded_form_has_no_sequence_operators(tmp_path: Path) -> None:
    module = Bare().eval()
    export.to_onnx(module, bare_inputs(), tmp_path / "bare.onnx", form="padded")
    kinds = {n.op_type for f in onnx.load(tmp_path / "bare.onnx").functions for n in f.node}
    assert not {k for k in kinds if "Sequence" in k or k == "Loop"}
    assert export.verify(tmp_path / "bare.onnx", module, bare_inputs()).ok


def test_padded_form_on_packed_cases(tmp_path: Path) -> None:
    module = Varlen().eval()
    export.to_onnx(module, (packed(2, 3), packed(4, 5, width=24)), tmp_path / "m.onnx", form="padded")
    report = export.verify(tmp_path / "m.onnx", module, (packed(3, 0, 5), packed(4, 2, 0, width=24)))
    assert report.ok, str(report)


def test_external_data_and_overwriting(tmp_path: Path) -> None:
    module, path = Padded().eval(), tmp_path / "m.onnx"
    done = export.to_onnx(module, padded_inputs(), path, external_data=True)
    assert (tmp_path / "m.onnx.data").exists()
    assert done.bytes > path.stat().st_size
    with pytest.raises(FileExistsError, match="overwrite=True"):
        export.to_onnx(module, padded_inputs(), path)
    export.to_onnx(module, padded_inputs(), path, overwrite=True)
    assert not (tmp_path / "m.onnx.data").exists()
    assert export.verify(path, module, padded_inputs(), library=[True]).ok


def test_refusals(tmp_path: Path) -> None:
    module, path = Padded(), tmp_path / "m.onnx"
    with pytest.raises(ValueError, match="eval"):
        export.to_onnx(module, padded_inputs(), path)
    module.eval()
    with pytest.raises(ValueError, match=r"opset must be in 18\.\.24; got 25"):
        export.to_onnx(module, padded_inputs(), path, opset=25)
    with pytest.raises(ValueError, match="dtype must be"):
        export.to_onnx(module, padded_inputs(), path, dtype=torch.float64)
    with pytest.raises(ValueError, match="form must be one of"):
        functions("other", 18)
    with pytest.raises(ValueError, match="names unknown inputs"):
        export.to_onnx(module, padded_inputs(), path, dynamic={"nothing": {0: "n"}})
    assert not path.exists()


def test_session_checks_what_it_is_given(varlen: tuple[Path, Varlen]) -> None:
    session = export.Session(varlen[0])
    text, image = packed(2), packed(3, width=24)
    with pytest.raises(ValueError, match="inputs missing"):
        session(text.values)
    with pytest.raises(TypeError, match="text_values must be"):
        session(text.values.double(), text.cu_seqlens, image.values, image.cu_seqlens)
    with pytest.raises(ValueError, match="device must be one of"):
        export.Session(varlen[0], device="tpu")


def test_session_outputs_outlive_it(varlen: tuple[Path, Varlen]) -> None:
    text, image = packed(2, 3), packed(3, 1, width=24)
    feeds = (text.values, text.cu_seqlens, image.values, image.cu_seqlens)
    session = export.Session(varlen[0], threads=1)
    first = session(*feeds)
    kept = [x.clone() for x in first]
    session(*(x * 2 if x.is_floating_point() else x for x in feeds))
    del session
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))


def test_repeat_interleave_with_an_open_count(tmp_path: Path) -> None:
    class Repeat(torch.nn.Module):
        def forward(self, x: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, ...]:
            count = like.shape[0]
            return x.repeat_interleave(count, 0), x.repeat_interleave(count, -1), x.repeat_interleave(count)

    module = Repeat().eval()
    export.to_onnx(module, (torch.randn(3, 4, 5), torch.randn(2)), tmp_path / "m.onnx")
    report = export.verify(tmp_path / "m.onnx", module, (torch.randn(2, 3, 6), torch.randn(5)), library=[False])
    assert report.ok, str(report)
