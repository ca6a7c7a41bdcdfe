"""The names that the documents' snippets use without saying where they come from: small, and of the shapes meant."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastxattn
from fastxattn import PackedTokens
from fastxattn.testing import offsets

HEADS, DIM, LENGTHS_Q, LENGTHS_K = 2, 16, (3, 0, 5), (7, 4, 9)


class MyPooler(nn.Module):
    """Somebody's own attention: what an adapter is written for."""

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, query: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.to_q(query), *self.to_kv(tokens).chunk(2, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        bias = None if mask is None else mask[:, None, None]
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2))


class Reader(nn.Module):
    """Text tokens that read image tokens, both packed."""

    def forward(self, text: PackedTokens, image: PackedTokens) -> Tensor:
        sides = [t.values.unflatten(-1, (HEADS, DIM)) for t in (text, image, image)]
        return fastxattn.varlen_cross_attention(*sides, text.cu_seqlens, image.cu_seqlens)


def qformer() -> tuple[nn.Module, dict[str, Tensor]]:
    """BLIP-2's Q-Former, small, and a padded batch."""
    import transformers

    config = transformers.Blip2QFormerConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, encoder_hidden_size=96
    )
    lengths = torch.tensor([300, 40])
    inputs = {
        "query_embeds": torch.randn(2, 8, 64),
        "encoder_hidden_states": torch.randn(2, 300, 96),
        "encoder_attention_mask": (torch.arange(300) < lengths[:, None]).long(),
    }
    return transformers.Blip2QFormerModel(config).eval(), inputs


def vision() -> nn.Module:
    import transformers

    return transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=12,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
        )
    ).eval()


def llava() -> tuple[nn.Module, dict[str, Tensor]]:
    import transformers

    text = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, vocab_size=99
    )
    sight = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8
    )
    config = transformers.LlavaConfig(vision_config=sight, text_config=text, image_token_id=98, vision_feature_layer=-2)
    ids = torch.tensor([[1, 5, *[98] * 16, 7, 8, 9]])
    return transformers.LlavaForConditionalGeneration(config).eval(), {
        "input_ids": ids,
        "pixel_values": torch.randn(1, 3, 32, 32),
    }


def names(page: str) -> dict[str, Any]:
    """What the snippets of ``page`` (its path in the repository) start with."""
    torch.manual_seed(0)
    cu_q, cu_k = offsets(LENGTHS_Q), offsets(LENGTHS_K)
    query, key, value = (torch.randn(sum(n), HEADS, DIM) for n in (LENGTHS_Q, LENGTHS_K, LENGTHS_K))
    mask_q, mask_k = (torch.arange(max(n)) < torch.tensor(n)[:, None] for n in (LENGTHS_Q, LENGTHS_K))
    out, lse = fastxattn.varlen_cross_attention(query, key, value, cu_q, cu_k, return_lse=True)
    found: dict[str, Any] = {
        "torch": torch,
        "fastxattn": fastxattn,
        "query": query,
        "key": key,
        "value": value,
        "q": query,
        "k": key,
        "v": value,
        "out": out,
        "lse": lse,
        "cu_seqlens_q": cu_q,
        "cu_seqlens_k": cu_k,
        "cu_q": cu_q,
        "cu_k": cu_k,
        "mask_q": mask_q,
        "mask_k": mask_k,
        "image_mask": mask_k,
        "queries": torch.randn(3, 5, HEADS, DIM),
        "keys": torch.randn(3, 9, HEADS, DIM),
        "values": torch.randn(3, 9, HEADS, DIM),
        "image_features": torch.randn(8, DIM),
        "text_features": torch.randn(8, DIM),
        "scale": torch.tensor(10.0),
        "logit_scale": torch.tensor(10.0),
        "bias": torch.tensor(-10.0),
        "logit_bias": torch.tensor(-10.0),
        "tokens": torch.randn(3, 9, DIM),
        "mask": mask_k,
    }
    if page in ("README.md", "docs/guide/index.md", "docs/guide/accelerate.md"):
        found["model"], found["inputs"] = qformer()
    if page in ("docs/guide/accelerate.md", "docs/design/extending.md"):
        found["MyPooler"] = type("MyPooler", (MyPooler,), {})  # a class of its own for each page's adapter
        found["pooler"] = found["MyPooler"]().eval()
        found["pooler_inputs"] = (
            torch.randn(4, 8, 64),
            torch.randn(4, 512, 64),
            torch.arange(512) < torch.tensor([512, 9, 3, 40])[:, None],
        )
    if page == "docs/guide/pruning.md":
        found["vision_model"], found["pixels"] = vision(), torch.randn(2, 3, 32, 32)
        found["vlm"], found["vlm_inputs"] = llava()
    if page == "docs/guide/modules.md":
        found["qformer"], inputs = qformer()
        found["query_tokens"], found["image_features"], mask = inputs.values()
        found["mask"] = mask.bool()
    if page == "docs/guide/ops/pruning.md":
        import transformers

        from tests import test_pruning_models as models

        deep = transformers.Dinov2Config(**{**models.VISION, "num_hidden_layers": 12})
        found["cls_query"], found["cu_seqlens"] = torch.randn(3, HEADS, DIM), cu_k
        found["x"], found["layer"] = torch.randn(sum(LENGTHS_K), DIM), nn.Linear(DIM, DIM)
        found["max_q"], found["pixels"] = max(LENGTHS_Q), torch.randn(2, 3, 32, 32)
        found["clip_vision_model"], found["dinov2"] = vision(), transformers.Dinov2Model(deep).eval()
        found["llava"], found["qwen2_vl"] = llava()[0], models.qwen()
    if page in ("README.md", "docs/guide/export.md"):
        found["module" if page == "README.md" else "model"] = Reader()
        found["text"] = PackedTokens(torch.randn(sum(LENGTHS_Q), HEADS * DIM), cu_q, max(LENGTHS_Q))
        found["image"] = PackedTokens(torch.randn(sum(LENGTHS_K), HEADS * DIM), cu_k, max(LENGTHS_K))
    return found
