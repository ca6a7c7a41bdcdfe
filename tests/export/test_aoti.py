"""AOTInductor packages: they call the compiled kernels, on sizes that the example did not have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastxattn.export as export
from fastxattn.ops.attention.api import varlen_cross_attention
from fastxattn.packed import PackedTokens
from tests.export.models import DIM, HEADS, packed


class Attend(torch.nn.Module):
    def forward(self, text: PackedTokens, image: PackedTokens) -> dict[str, Tensor]:
        q, kv = text.values.unflatten(-1, (HEADS, DIM)), image.values.unflatten(-1, (2, DIM))
        out, lse = varlen_cross_attention(q, kv, kv, text.cu_seqlens, image.cu_seqlens, return_lse=True)
        return {"out": out.flatten(1) * 2, "lse": lse}


def test_package(tmp_path: Path) -> None:
    module, path = Attend().eval(), tmp_path / "m.pt2"
    done = export.to_aoti(module, (packed(2, 3), packed(4, 5, width=16)), path)
    assert done.inputs == ("text_values", "text_cu_seqlens", "image_values", "image_cu_seqlens")
    assert done.outputs == ("out", "lse")
    # What a program without Python has to define.
    (schema,) = done.schemas.read_text().splitlines()
    assert schema.startswith("attention_cpu(Tensor query, ")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        export.to_aoti(module, (packed(2, 3), packed(4, 5, width=16)), path)

    loaded = torch._inductor.aoti_load_package(str(path))
    for lengths_q, lengths_k in (((3, 0, 5), (4, 2, 0)), ((7, 9), (70, 1)), ((2, 2), (0, 0))):
        text, image = packed(*lengths_q), packed(*lengths_k, width=16)
        out, lse = loaded(text.values, text.cu_seqlens, image.values, image.cu_seqlens)
        truth = module(
            PackedTokens(text.values.double(), text.cu_seqlens, text.max_seqlen),
            PackedTokens(image.values.double(), image.cu_seqlens, image.max_seqlen),
        )
        torch.testing.assert_close(out.double(), truth["out"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse.double(), truth["lse"].double(), rtol=1e-5, atol=1e-5)


def test_missing_kernels_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from fastxattn.runtime import native

    monkeypatch.setattr(native, "cpu_library", lambda: native.Loaded(None, "not built"))
    with pytest.raises(RuntimeError, match="AOTInductor packages need the CPU kernels: not built"):
        export.to_aoti(Attend().eval(), (packed(2), packed(4, width=16)), tmp_path / "m.pt2")
