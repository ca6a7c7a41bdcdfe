"""Tiny random-weight models of Transformers classes: which attention calls does ``accelerate`` serve in each?

An entry builds ``(model, inputs)`` of the real class, with padding where the class takes a mask. Sizes are the smallest
that run every kind of layer; nothing here says anything about speed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
IDS = {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TEXT = {**SIZES, **IDS, "max_position_embeddings": 64}
CAUSAL = {**TEXT, "num_key_value_heads": 2}
VISION = {**SIZES, "image_size": 32, "patch_size": 8}
GRID = torch.tensor([[1, 4, 6], [1, 2, 4]])  # two images of 24 and 8 patches
Built = tuple[nn.Module, dict[str, Any]]
BUILDERS: dict[str, Callable[[], Built]] = {}


def model(name: str) -> Callable[[Callable[[], Built]], Callable[[], Built]]:
    """Register a builder under the name that the table shows."""

    def register(build: Callable[[], Built]) -> Callable[[], Built]:
        BUILDERS[name] = build
        return build

    return register


def ids(batch: int = 2, length: int = 24, short: int = 9) -> dict[str, Tensor]:
    """Token ids and a mask under which the last sequence has ``short`` tokens, padded on the right."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, short:] = 0
    return {"input_ids": torch.randint(3, 90, (batch, length)), "attention_mask": mask}


def prompt(image: int, tokens: int, batch: int = 1, text: int = 12) -> dict[str, Tensor]:
    """Ids with ``tokens`` placeholders of one image after the first, and text behind them."""
    row = torch.randint(3, 90, (batch, 1 + tokens + text))
    row[:, 1 : 1 + tokens] = image
    return {"input_ids": row, "attention_mask": torch.ones_like(row)}


def pixels(batch: int = 2, size: int = 32) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, size, size)}


@model("SigLIP 2 NaFlex")
def siglip2() -> Built:
    vision = {**SIZES, "num_patches": 64, "patch_size": 4}
    shapes = torch.tensor([[8, 8], [4, 6], [2, 10]])
    seen = (torch.arange(64) < shapes.prod(1)[:, None]).long()
    inputs = {"pixel_values": torch.randn(3, 64, 48), "pixel_attention_mask": seen, "spatial_shapes": shapes}
    return hf.Siglip2Model(hf.Siglip2Config(text_config=TEXT, vision_config=vision)), {**ids(3), **inputs}


def _qwen(family: str, vision: dict[str, Any], **text: Any) -> Built:
    config = getattr(hf, f"{family}Config")(
        text_config={**CAUSAL, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}, **text},
        vision_config=vision,
        image_token_id=95,
        video_token_id=96,
        vision_start_token_id=97,
        vision_end_token_id=98,
    )
    row = torch.randint(3, 90, (1, 24))
    row[0, 1], row[0, 2:8], row[0, 10], row[0, 11:13] = 97, 95, 97, 95
    kinds = {"mm_token_type_ids": (row == 95).int()}
    inputs = {"input_ids": row, "pixel_values": torch.randn(32, 3 * 2 * 8 * 8), "image_grid_thw": GRID, **kinds}
    return getattr(hf, f"{family}ForConditionalGeneration")(config), inputs


@model("Qwen2-VL")
def qwen2_vl() -> Built:
    return _qwen("Qwen2VL", {"depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 4, "patch_size": 8})


@model("Qwen2.5-VL")
def qwen2_5_vl() -> Built:
    vision = {"depth": 2, "hidden_size": 64, "num_heads": 4, "intermediate_size": 96, "patch_size": 8}
    return _qwen("Qwen2_5_VL", {**vision, "out_hidden_size": 64, "window_size": 32, "fullatt_block_indexes": [1]})


QWEN3_VISION = {
    "depth": 2,
    "hidden_size": 64,
    "num_heads": 4,
    "intermediate_size": 96,
    "patch_size": 8,
    "out_hidden_size": 64,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0],
}


@model("Qwen3-VL")
def qwen3_vl() -> Built:
    return _qwen("Qwen3VL", QWEN3_VISION, head_dim=16)


@model("Qwen3-VL MoE")
def qwen3_vl_moe() -> Built:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return _qwen("Qwen3VLMoe", QWEN3_VISION, head_dim=16, **experts)


@model("LLaVA-NeXT")
def llava_next() -> Built:
    config = hf.LlavaNextConfig(
        vision_config={**VISION, "model_type": "clip_vision_model"},
        text_config={**CAUSAL, "model_type": "llama"},
        image_token_index=95,
        image_grid_pinpoints=[[32, 64], [64, 32]],
    )
    # A base image of 16 patches and two tiles of 16, with a newline token at each of their 4 rows.
    inputs = {
        **prompt(95, 16 + 36),
        "pixel_values": torch.randn(1, 3, 3, 32, 32),
        "image_sizes": torch.tensor([[32, 64]]),
    }
    return hf.LlavaNextForConditionalGeneration(config), inputs


@model("LLaVA-OneVision")
def llava_onevision() -> Built:
    config = hf.LlavaOnevisionConfig(
        vision_config={**VISION, "model_type": "siglip_vision_model", "vision_use_head": False},
        text_config={**CAUSAL, "model_type": "qwen2"},
        image_token_index=95,
        video_token_index=96,
        image_grid_pinpoints=[[32, 64], [64, 32]],
    )
    inputs = {
        **prompt(95, 16 + 36),
        "pixel_values": torch.randn(1, 3, 3, 32, 32),
        "image_sizes": torch.tensor([[32, 64]]),
    }
    return hf.LlavaOnevisionForConditionalGeneration(config), inputs


def _internvl(text: str) -> Built:
    config = hf.InternVLConfig(
        vision_config={**SIZES, "image_size": [32, 32], "patch_size": [8, 8]},
        text_config={**CAUSAL, "model_type": text},
        image_token_id=95,
        image_seq_length=4,
    )
    return hf.InternVLForConditionalGeneration(config), {**prompt(95, 4, 2), **pixels()}


@model("InternVL 3")
def internvl3() -> Built:
    return _internvl("qwen2")


@model("InternVL 3.5")
def internvl35() -> Built:
    return _internvl("qwen3")


@model("Gemma 3")
def gemma3() -> Built:
    config = hf.Gemma3Config(
        text_config={
            **CAUSAL,
            "head_dim": 16,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        vision_config={**VISION, "vision_use_head": False},
        mm_tokens_per_image=4,
        image_token_index=95,
        boi_token_index=97,
        eoi_token_index=98,
    )
    inputs = {**prompt(95, 4, 2), **pixels()}
    return hf.Gemma3ForConditionalGeneration(config), {**inputs, "token_type_ids": (inputs["input_ids"] == 95).long()}


def _paligemma(text: str, **more: Any) -> Built:
    config = hf.PaliGemmaConfig(
        text_config={**CAUSAL, "head_dim": 16, "model_type": text, **more},
        vision_config={**VISION, "vision_use_head": False, "projection_dim": 64, "num_image_tokens": 16},
        projection_dim=64,
        hidden_size=64,
        image_token_index=95,
    )
    inputs = {**prompt(95, 16, 2), **pixels()}
    return hf.PaliGemmaForConditionalGeneration(config), {
        **inputs,
        "token_type_ids": torch.zeros_like(inputs["input_ids"]),
    }


@model("PaliGemma")
def paligemma() -> Built:
    return _paligemma("gemma")


@model("PaliGemma 2")
def paligemma2() -> Built:
    return _paligemma("gemma2", sliding_window=8, attn_logit_softcapping=5.0)


@model("SmolVLM")
def smolvlm() -> Built:
    config = hf.SmolVLMConfig(
        vision_config=VISION, text_config={**CAUSAL, "model_type": "llama"}, image_token_id=95, scale_factor=2
    )
    seen = torch.ones(2, 1, 32, 32, dtype=torch.bool)
    seen[1, :, :, 16:] = False
    inputs = {"pixel_values": torch.randn(2, 1, 3, 32, 32), "pixel_attention_mask": seen}
    return hf.SmolVLMForConditionalGeneration(config), {**prompt(95, 4, 2), **inputs}


@model("Aria")
def aria() -> Built:
    config = hf.AriaConfig(
        vision_config={**VISION, "model_type": "idefics3_vision"},
        text_config={**CAUSAL, "moe_num_experts": 4},
        projector_patch_to_query_dict={16: 8},
        image_token_index=95,
    )
    return hf.AriaForConditionalGeneration(config), {**prompt(95, 8, 2), **pixels()}


@model("Kosmos-2")
def kosmos2() -> Built:
    text = {"embed_dim": 64, "layers": 2, "ffn_dim": 96, "attention_heads": 4, **IDS}
    config = hf.Kosmos2Config(text_config=text, vision_config=VISION, latent_query_num=8)
    where = torch.zeros(2, 24, dtype=torch.long)
    where[:, 1:9] = 1
    return hf.Kosmos2ForConditionalGeneration(config), {**ids(), **pixels(), "image_embeds_position_mask": where}


@model("Voxtral")
def voxtral() -> Built:
    config = hf.VoxtralConfig(
        audio_config={**SIZES, "num_mel_bins": 16, "max_source_positions": 32, "intermediate_size": 256},
        text_config={**CAUSAL, "model_type": "llama"},
        audio_token_id=95,
    )
    return hf.VoxtralForConditionalGeneration(config), {**prompt(95, 8), "input_features": torch.randn(1, 16, 64)}


@model("ColPali")
def colpali() -> Built:
    model, inputs = paligemma()
    return hf.ColPaliForRetrieval(hf.ColPaliConfig(vlm_config=model.config, embedding_dim=16)), {
        k: v for k, v in inputs.items() if k != "token_type_ids"
    }


@model("ColQwen2")
def colqwen2() -> Built:
    model, _ = qwen2_vl()
    row = prompt(95, 6, 2)
    row["input_ids"][1, 3:7], row["attention_mask"][1, 12:] = 5, 0  # the second image has 2 tokens
    inputs = {**row, "pixel_values": torch.randn(2, 24, 384), "image_grid_thw": GRID}
    kinds = {"mm_token_type_ids": (row["input_ids"] == 95).int()}
    return hf.ColQwen2ForRetrieval(hf.ColQwen2Config(vlm_config=model.config, embedding_dim=16)), {**inputs, **kinds}
