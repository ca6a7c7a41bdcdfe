"""open_clip's loss classes, and its way of calling torch.nn's attention.

The package imports torchvision, which has no build for every machine: its files are loaded without the package. Where
it is not installed, stand-ins take its place.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import doubles
import pytest
import torch
from torch import Tensor, nn

from fastxattn.integrations import accelerate, core, register_adapter, restore


@pytest.fixture(scope="module")
def open_clip() -> Any:
    """The module open_clip.loss."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None or spec.origin is None:
        for name in ("ClipLoss", "CoCaLoss", "SigLipLoss"):
            register_adapter(getattr(doubles, name), f"fastxattn.integrations.open_clip:{name}")
        yield types.SimpleNamespace(loss=doubles)
        return
    before = dict(sys.modules)
    package = types.ModuleType("open_clip")
    package.__path__ = [str(Path(spec.origin).parent)]  # type: ignore[attr-defined]
    sys.modules["open_clip"] = package
    sys.modules.setdefault("torchvision", types.ModuleType("torchvision"))
    loaded = types.SimpleNamespace(loss=importlib.import_module("open_clip.loss"))
    yield loaded
    for name in set(sys.modules) - set(before):
        if name.startswith(("open_clip", "torchvision")):
            del sys.modules[name]


def compare(loss: nn.Module, inputs: list[Tensor]) -> None:
    def both(inputs: list[Tensor], module: nn.Module) -> tuple[Any, list[Tensor]]:
        inputs = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
        out = module(*inputs, output_dict=True)
        sum(out.values()).backward()
        return out, [x.grad for x in inputs if x.grad is not None]

    exact = [x.double() if x.is_floating_point() else x for x in inputs]
    expected, gradients = both(exact, loss)
    assert not accelerate(loss)  # losses only on request
    report = accelerate(loss, loss=True)
    assert len(report.swapped) == 1
    ours, mine = both(inputs, loss)
    for name, value in expected.items():
        torch.testing.assert_close(ours[name].double(), value.double(), atol=2e-6, rtol=2e-6)
    for a, b in zip(mine, gradients, strict=True):
        torch.testing.assert_close(a.double(), b, atol=2e-6, rtol=1e-4)
    assert restore(loss) == 1


def features(n: int = 37, width: int = 24) -> list[Tensor]:
    torch.manual_seed(0)
    return [nn.functional.normalize(torch.randn(n, width), dim=-1) for _ in range(2)]


def test_clip_loss(open_clip: Any) -> None:
    compare(open_clip.loss.ClipLoss(), [*features(), torch.tensor(20.0)])
    compare(open_clip.loss.ClipLoss(), [*features(), torch.tensor(20.0), torch.tensor(-1.0)])


def test_siglip_loss(open_clip: Any) -> None:
    compare(open_clip.loss.SigLipLoss(), [*features(), torch.tensor(20.0), torch.tensor(-3.0)])


def test_coca_loss(open_clip: Any) -> None:
    logits, labels = torch.randn(37, 6, 50), torch.randint(0, 50, (37, 6))
    compare(open_clip.loss.CoCaLoss(2.0, 1.0), [*features(), logits, labels, torch.tensor(20.0)])


def test_distributed_losses_are_left_alone(open_clip: Any) -> None:
    report = accelerate(open_clip.loss.ClipLoss(world_size=2), loss=True)
    assert "world_size" in report.left[0].reason


class Pooler(nn.Module):
    """CoCa's attentional pooler as open_clip writes it: learned queries over an image's tokens."""

    def __init__(self, width: int = 64, context: int = 48, heads: int = 4, queries: int = 9) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(queries, width))
        self.attn = nn.MultiheadAttention(width, heads, kdim=context, vdim=context, batch_first=True)
        self.ln_q, self.ln_k = nn.LayerNorm(width), nn.LayerNorm(context)

    def forward(self, x: Tensor) -> Tensor:
        x = self.ln_k(x)
        q = self.ln_q(self.query)
        return self.attn(q.unsqueeze(0).expand(x.shape[0], -1, -1), x, x, need_weights=False)[0]  # type: ignore[no-any-return]


def test_attentional_pooler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "SMALL", 0)
    torch.manual_seed(0)
    pooler, x = Pooler(), torch.randn(3, 20, 48)
    expected = pooler.double()(x.double())
    pooler.float()
    assert accelerate(pooler)
    torch.testing.assert_close(pooler(x).double(), expected, atol=2e-6, rtol=1e-5)
