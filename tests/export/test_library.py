"""The operator library: found, named in errors, and never brought down by what a model feeds it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

import fastxattn.export as export
from fastxattn.runtime import native
from tests.export.models import Varlen, packed

FUZZ = Path(__file__).with_name("fuzz_library.py")


def fuzz(*arguments: object) -> list[list[str]]:
    root = str(FUZZ.parents[2])
    done = subprocess.run(
        [sys.executable, str(FUZZ), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={"PYTHONPATH": root},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [line.split() for line in done.stdout.splitlines()]


def test_hostile_models_and_inputs_give_errors_not_crashes() -> None:
    lines = fuzz(1, 200)
    assert [line[0] for line in lines] == ["Attention", "KeyImportance", "AbsorbedAttention", "Select"]
    for name, ran, refused in lines:
        # A quarter of the problems is sound and runs; of the broken ones some stay sound, and many are refused.
        assert 50 <= int(ran) <= 120, name
        assert int(refused) >= 80, name


def test_cut_off_and_corrupted_files_give_errors_not_crashes(tmp_path: Path) -> None:
    path, inputs = tmp_path / "m.onnx", tmp_path / "inputs.npz"
    text, image = packed(2), packed(3, width=24)
    export.to_onnx(Varlen().eval(), (text, image), path)
    named = {"text_values": text.values, "text_cu_seqlens": text.cu_seqlens}
    named |= {"image_values": image.values, "image_cu_seqlens": image.cu_seqlens}
    np.savez(inputs, **{name: x.numpy() for name, x in named.items()})
    [(_, ran, refused)] = fuzz(1, 200, path, inputs)
    assert int(ran) >= 20
    assert int(refused) >= 80


def run_select(counts: list[int], cu: list[int], capacity: int) -> list[np.ndarray]:
    names = ["scores", "cu", "counts", "capacity", "protected"]
    kinds = [TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL]
    node = helper.make_node("Select", names, ["index", "offsets", "places"], domain="fastxattn")
    inputs = [helper.make_tensor_value_info(n, k, [f"{n}0"]) for n, k in zip(names, kinds, strict=True)]
    outputs = [helper.make_tensor_value_info(n, TensorProto.INT32, [f"{n}0"]) for n in node.output]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("fastxattn", 1)]
    model = helper.make_model(helper.make_graph([node], "g", inputs, outputs), opset_imports=opsets, ir_version=10)
    options = export.session_options()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {
        "scores": np.arange(6, dtype=np.float32),
        "cu": np.array(cu, np.int32),
        "counts": np.array(counts, np.int32),
        "capacity": np.array([capacity], np.int64),
        "protected": np.zeros(0, bool),
    }
    return list(session.run(None, feeds))


def test_errors_name_the_operator_the_input_and_the_rule() -> None:
    index, offsets, places = run_select([2, 1], [0, 4, 6], 4)
    assert index.tolist() == [2, 3, 5, -1]
    assert offsets.tolist() == [0, 2, 3]
    assert places.tolist() == [-1, -1, 0, 1, -1, 2]
    with pytest.raises(
        Exception, match=r"fastxattn::Select: cu must .* end within the 6 rows|cu_seqlens must start at 0"
    ):
        run_select([2, 1], [0, 4, 7], 4)
    with pytest.raises(Exception, match=r"counts must have shape \(batch,\); got \(1\)"):
        run_select([2], [0, 4, 6], 4)
    with pytest.raises(Exception, match="capacity must be in 0"):
        run_select([2, 1], [0, 4, 6], -1)


def test_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("fastxattn.export.session.LIBRARY_DIR", tmp_path)
    with pytest.raises(FileNotFoundError, match="pip install --no-build-isolation"):
        export.ort_library_path()
    with pytest.raises(FileNotFoundError, match=r"csrc/bindings/cuda/build\.py"):
        export.ort_library_path("cuda")
    with pytest.raises(ValueError, match="device must be one of cpu, cuda; got 'tpu'"):
        export.ort_library_path("tpu")


def test_the_library_needs_neither_torch_nor_the_runtime() -> None:
    path = native.LIBRARY_DIR / "libfastxattn_ort.so"
    needed = subprocess.run(["ldd", str(path)], capture_output=True, text=True, check=True).stdout
    assert "torch" not in needed
    assert "onnxruntime" not in needed


def test_results_do_not_depend_on_the_threads(tmp_path: Path) -> None:
    export.to_onnx(Varlen().eval(), (packed(1), packed(1, width=24)), tmp_path / "m.onnx")
    assert [f.name for f in onnx.load(tmp_path / "m.onnx").functions] == ["Attention"]
    text, image = packed(40, 3, 70), packed(300, 0, 90, width=24)
    feeds = (text.values, text.cu_seqlens, image.values, image.cu_seqlens)
    one, two = (export.Session(tmp_path / "m.onnx", threads=n)(*feeds) for n in (1, 2))
    # The projections are the runtime's own and may differ; attention over the same rows may not.
    assert all(np.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(one, two, strict=True))
