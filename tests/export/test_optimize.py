"""inspect and optimize on files that torch's own exporter wrote."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from torch import Tensor

import fastxattn.export as export
from fastxattn.export.patterns import Index, Match
from fastxattn.export.rewrite import write


def split(x: Tensor) -> Tensor:
    return x.unflatten(-1, (4, 8)).transpose(1, 2)


def sdpa(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, k, attn_mask=mask[:, None, None, :])


def additive(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    hidden = (1 - mask.float())[:, None, None, :] * torch.finfo(torch.float32).min
    return (q @ k.mT / 8**0.5 + hidden).softmax(-1) @ k


def filled(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    scores = (q @ k.mT) * 8**-0.5
    return scores.masked_fill(~mask[:, None, None, :], float("-inf")).softmax(-1) @ k


def by_query(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    # A mask that differs between queries, and a bias by head, stay additive.
    place = torch.arange(q.shape[2])[:, None] + 1 >= torch.arange(k.shape[2])[None, :] - 2
    bias = torch.linspace(-1, 1, 4).view(1, 4, 1, 1)
    hidden = torch.where(place, 0.0, -1e9)
    return ((q @ k.mT) * 0.3 + hidden + bias + mask[:, None, None, :].float()).softmax(-1) @ k


class Block(torch.nn.Module):
    def __init__(self, core: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.core = torch.nn.Linear(32, 32), torch.nn.Linear(24, 32), core

    def forward(self, text: Tensor, image: Tensor, mask: Tensor) -> Tensor:
        return self.q(self.core(split(self.q(text)), split(self.k(image)), mask).transpose(1, 2).flatten(2))


def plain_export(core: Callable[[Tensor, Tensor, Tensor], Tensor], path: Path, opset: int) -> None:
    args = torch.randn(2, 3, 32), torch.randn(2, 5, 24), torch.ones(2, 5, dtype=torch.bool)
    shapes = [{0: "b", 1: "lq"}, {0: "b", 1: "lk"}, {0: "b", 1: "lk"}]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Block(core).eval(),
            args,
            str(path),
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=shapes,
            input_names=["text", "image", "mask"],
            verbose=False,
        )


@pytest.mark.parametrize(
    ("core", "opset"),
    [(sdpa, 18), (sdpa, 23), (additive, 18), (filled, 18), (by_query, 18)],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_optimize(core: Callable[[Tensor, Tensor, Tensor], Tensor], opset: int, tmp_path: Path) -> None:
    path, out = tmp_path / "m.onnx", tmp_path / "fast.onnx"
    plain_export(core, path, opset)
    assert len(export.inspect(path).could_be) == 1
    done = export.optimize(path, out)
    assert len(done.rewritten) == 1
    assert done.difference <= 1e-5
    assert "Softmax" not in {n.op_type for n in onnx.load(out).graph.node}
    assert export.inspect(out).accelerated == 1
    # Sizes that were not tried, a row without tokens, and no batch at all: the old file gives NaN or fails.
    module = Block(core).eval()
    for sizes in ((3, 7, 11), (1, 1, 1), (0, 2, 3)):
        text, image = torch.randn(sizes[0], sizes[1], 32), torch.randn(sizes[0], sizes[2], 24)
        mask = torch.rand(sizes[0], sizes[2]) < 0.6
        mask[:, :1] = True
        expected = module(text, image, mask)
        for library in (False, True):
            (got,) = export.Session(out, library=library)(text, image, mask)
            torch.testing.assert_close(got, expected.detach(), rtol=1e-5, atol=1e-5)
    if core is not by_query:
        mask = torch.ones(2, 4, dtype=torch.bool)
        mask[0] = False
        (got,) = export.Session(out)(torch.randn(2, 3, 32), torch.randn(2, 4, 24), mask)
        assert got.isfinite().all()
        torch.testing.assert_close(got[0], module.q.bias.detach().expand(3, -1))


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    plain_export(sdpa, path, 18)
    (tmp_path / "m.fastxattn.onnx").write_text("mine")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        export.optimize(path)
    assert (tmp_path / "m.fastxattn.onnx").read_text() == "mine"
    before = path.read_bytes()
    export.optimize(path, overwrite=True)
    assert path.read_bytes() == before


def test_large_weights_go_to_a_file_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.onnx"
    plain_export(sdpa, path, 23)
    # As if the weights were above the limit, and the file optimized in place.
    monkeypatch.setattr(sys.modules["fastxattn.export.optimize"], "EXTERNAL_ABOVE", 100)
    export.optimize(path, path, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    with pytest.raises(FileExistsError, match="overwrite=True"):
        export.optimize(path, path)
    module, mask = Block(sdpa).eval(), torch.ones(2, 5, dtype=torch.bool)
    text, image = torch.randn(2, 3, 32), torch.randn(2, 5, 24)
    (got,) = export.Session(path)(text, image, mask)
    torch.testing.assert_close(got, module(text, image, mask).detach(), rtol=1e-5, atol=1e-5)


def test_a_wrong_rewrite_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.onnx"
    plain_export(additive, path, 18)
    module = sys.modules["fastxattn.export.optimize"]  # the package's attribute of that name is the function

    def wrong(index: Index, match: Match, prefix: str) -> list[onnx.NodeProto]:
        match.scale = (match.scale or 1.0) * 1.1
        return write(index, match, prefix)

    monkeypatch.setattr(module, "write", wrong)
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(ValueError, match="nothing was written"):
        export.optimize(path, tmp_path / "out.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def contrib(tmp_path: Path, mask: str) -> tuple[Path, dict[str, np.ndarray]]:
    shapes = {"q": (2, 3, 32), "k": (2, 5, 32), "v": (2, 5, 16)}
    random = np.random.default_rng(0)
    feeds: dict[str, np.ndarray] = {n: random.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    feeds["mask"] = (
        np.array([4, 2], np.int32) if mask == "lengths" else np.array([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]], np.int32)
    )
    node = helper.make_node(
        "MultiHeadAttention", ["q", "k", "v", "", "mask"], ["out"], "mha", domain="com.microsoft", num_heads=4
    )
    inputs = [
        helper.make_tensor_value_info(
            n,
            TensorProto.INT32 if n == "mask" else TensorProto.FLOAT,
            [*(f"{n}{i}" for i in range(min(x.ndim, 2))), *x.shape[2:]],
        )
        for n, x in feeds.items()
    ]
    output = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["b", "l", 16])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(
        helper.make_model(helper.make_graph([node], "g", inputs, [output]), opset_imports=opsets, ir_version=10),
        tmp_path / "m.onnx",
    )
    return tmp_path / "m.onnx", feeds


@pytest.mark.parametrize("mask", ["lengths", "mask"])
def test_optimize_contrib(mask: str, tmp_path: Path) -> None:
    path, feeds = contrib(tmp_path, mask)
    done = export.optimize(path, tmp_path / "fast.onnx", inputs=[feeds])
    assert done.rewritten == ("MultiHeadAttention at mha",)
    assert done.difference <= 1e-5


def test_inspect_names_what_breaks(tmp_path: Path) -> None:
    plain_export(sdpa, tmp_path / "native.onnx", 23)
    native = export.inspect(tmp_path / "native.onnx")
    assert not native.ok
    assert "broadcasts over queries" in str(native)
    session = onnxruntime.InferenceSession(str(tmp_path / "native.onnx"), export.session_options(library=False))
    with pytest.raises(Exception, match="inconsistent q_sequence_length"):
        session.run(
            None,
            {
                "text": np.zeros((2, 3, 32), np.float32),
                "image": np.zeros((2, 5, 24), np.float32),
                "mask": np.ones((2, 5), bool),
            },
        )
    plain_export(filled, tmp_path / "filled.onnx", 18)
    assert "a row without keys gives NaN" in str(export.inspect(tmp_path / "filled.onnx"))
    model = onnx.load(tmp_path / "filled.onnx")
    model.opset_import[0].version = 25
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, tmp_path / "late.onnx")
    late = str(export.inspect(tmp_path / "late.onnx"))
    assert "opset 25" in late
    assert "the example's batch was baked in" in late
