"""inspect and optimize on files that are broken, hostile or unusual."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

import fastxattn.export as export
from fastxattn.cli import app

NODE = helper.make_node


def save(path: Path, nodes: list[onnx.NodeProto], dims: list[int], constants: dict[str, list[int]]) -> None:
    kind = TensorProto.INT64 if constants else TensorProto.FLOAT
    values = [numpy_helper.from_array(np.array(x, np.int64), name) for name, x in constants.items()]
    inputs = [helper.make_tensor_value_info(name, kind, dims) for name in "qkv"]
    graph = helper.make_graph(nodes, "g", inputs, [helper.make_tensor_value_info("o", kind, None)], values)
    path.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]).SerializeToString())


BROKEN = {
    "text": None,
    "constant": [NODE("Constant", [], [])],
    "softmax": [NODE("Softmax", [], ["o"])],
    "add": [NODE("Add", ["q"], ["o"])],
    "loop": [NODE("Softmax", ["q"], ["o"]), NODE("Identity", ["o"], ["o"])],
    "cycle": [NODE("Identity", ["b"], ["a"]), NODE("Identity", ["a"], ["b"]), NODE("Softmax", ["a"], ["o"])],
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("command", ["inspect", "optimize"])
def test_broken_files_get_one_line_and_exit_code_2(name: str, command: str, tmp_path: Path) -> None:
    path, nodes = tmp_path / "m.onnx", BROKEN[name]
    if nodes is None:
        path.write_text("hello, this is no model")
    else:
        save(path, nodes, [2, 2, 3, 4], {})
    result = CliRunner().invoke(app, [command, str(path)])
    assert result.exit_code == 2, result.output
    assert "is not a valid ONNX model" in result.output
    assert len(result.output.strip().splitlines()) == 1


@pytest.mark.parametrize("run", [export.inspect, export.optimize])
def test_an_axis_declared_minus_1_is_open(run: Callable[[Path], object], tmp_path: Path) -> None:
    save(tmp_path / "m.onnx", [NODE("Slice", ["q", "a", "b"], ["o"])], [-1], {"a": [0], "b": [-1]})
    run(tmp_path / "m.onnx")


def test_external_constants_lie_beside_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [
        NODE("MatMul", ["q", "k"], ["s"]),
        NODE("Mul", ["s", "c"], ["t"]),
        NODE("Softmax", ["t"], ["w"]),
        NODE("MatMul", ["w", "v"], ["o"]),
    ]
    shapes = {"q": ["b", 2, "l", 4], "k": ["b", 2, 4, "m"], "v": ["b", 2, "m", 4]}
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()]
    output = helper.make_tensor_value_info("o", TensorProto.FLOAT, ["b", 2, "l", 4])
    scale = numpy_helper.from_array(np.array([0.5], np.float32), "c")
    model = helper.make_model(helper.make_graph(nodes, "g", inputs, [output], [scale]), ir_version=9)
    model.opset_import[0].version = 18
    path, elsewhere = tmp_path / "m.onnx", tmp_path / "elsewhere"
    onnx.save(model, str(path), save_as_external_data=True, size_threshold=0, location="m.data")
    elsewhere.mkdir()
    np.array([7.0], np.float32).tofile(elsewhere / "m.data")
    monkeypatch.chdir(elsewhere)
    assert len(export.inspect(path).could_be) == 1
    assert export.optimize(path, tmp_path / "fast.onnx").difference < 1e-5
    hostile = onnx.load(str(path), load_external_data=False)
    hostile.graph.initializer[0].external_data[0].value = "elsewhere/../../m.data"
    onnx.save(hostile, tmp_path / "hostile.onnx")
    with pytest.raises(ValueError, match="is not a valid ONNX model"):
        export.inspect(tmp_path / "hostile.onnx")
