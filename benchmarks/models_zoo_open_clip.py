"""open_clip's own CLIP and CoCa with their losses, for ``bench_models``; nothing where open_clip is not installed."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models_zoo import System, caption_ids


def _package() -> Path | None:
    """Where open_clip is, made importable file by file.

    The package imports all of torchvision; its models need one class of it, and only to recognise it.
    """
    spec = importlib.util.find_spec("open_clip")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent
    if importlib.util.find_spec("torchvision") is None:
        package = types.ModuleType("open_clip")
        package.__path__ = [str(path)]
        sys.modules.setdefault("open_clip", package)
        for name in ("torchvision", "torchvision.ops", "torchvision.ops.misc"):
            sys.modules.setdefault(name, types.ModuleType(name))
        sys.modules["torchvision.ops.misc"].FrozenBatchNorm2d = type("FrozenBatchNorm2d", (nn.Module,), {})  # type: ignore[attr-defined]
    return path


class WithLoss(nn.Module):
    """A model and its loss, as open_clip's training step calls them."""

    def __init__(self, model: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        out = self.model(image, text)
        if not isinstance(out, dict):  # CLIP's tuple
            return self.loss(*out[:3])  # type: ignore[no-any-return]
        out = {k: v for k, v in out.items() if k != "logit_bias"}
        if "logits" in out:
            out.setdefault("labels", text[:, 1:])
            out["logits"] = out["logits"][:, : out["labels"].shape[1]]
        return sum(self.loss(**out, output_dict=True).values())  # type: ignore[return-value]


def _inputs(batch: int, length: int) -> dict[str, Tensor]:
    return {"image": torch.randn(batch, 3, 224, 224), "text": caption_ids(batch, 49407, 49407, padding=0)[:, :length]}


def _config(name: str) -> Any:
    config = json.loads((_PATH / "model_configs" / f"{name}.json").read_text())  # type: ignore[operator]
    config.pop("custom_text", None)
    return config


def _clip(batch: int = 4) -> Any:
    from open_clip.loss import ClipLoss
    from open_clip.model import CLIP

    return WithLoss(CLIP(**_config("ViT-B-32")), ClipLoss()), _inputs(batch, 77)


def _coca(batch: int = 2) -> Any:
    from open_clip.coca_model import CoCa
    from open_clip.loss import CoCaLoss

    return WithLoss(CoCa(**_config("coca_ViT-B-32")), CoCaLoss(2.0, 1.0)), _inputs(batch, 76)


class Loss(nn.Module):
    """The loss alone."""

    def __init__(self) -> None:
        super().__init__()
        from open_clip.loss import ClipLoss

        self.loss, self.scale = ClipLoss(), nn.Parameter(torch.tensor(50.0))

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        return self.loss(image, text, self.scale)  # type: ignore[no-any-return]


def _loss(batch: int = 4096, width: int = 512) -> Any:
    image, text = (nn.functional.normalize(torch.randn(batch, width), dim=-1).requires_grad_() for _ in range(2))
    return Loss(), {"image": image, "text": text}


_PATH = _package()
SYSTEMS = (
    []
    if _PATH is None
    else [
        System(
            "open_clip CLIP ViT-B/32 with its loss, batch 4",
            _clip,
            "no mask: texts are whole there",
            train=True,
            keep=lambda o: [o],
        ),
        System(
            "open_clip CoCa ViT-B/32 with its losses, batch 2",
            _coca,
            "bound by its backbone and vocabulary",
            train=True,
            keep=lambda o: [o],
        ),
        System(
            "open_clip ClipLoss alone, 4096 x 512",
            _loss,
            "memory: the N x N logits are never made",
            train=True,
            keep=lambda o: [o],
        ),
    ]
)
