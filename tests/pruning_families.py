"""Tiny vision-language models of real Hugging Face classes with random weights, and prompts for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as t

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
VISION = {**SMALL, "image_size": 32, "patch_size": 8}
TEXT = {**SMALL, "vocab_size": 99, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
HEADS = {**TEXT, "head_dim": 8}
MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
QWEN = {"image_token_id": 98, "video_token_id": 97, "vision_start_token_id": 96, "vision_end_token_id": 95}
Built = tuple[Any, dict[str, torch.Tensor]]


def prompt(*counts: int, before: int = 2, after: int = 3) -> torch.Tensor:
    """(1, length) text, then images of ``counts`` tokens, each followed by text."""
    ids = [1, *range(5, 4 + before)]
    for number, count in enumerate(counts):
        ids += [98] * count + list(range(10 + 7 * number, 10 + 7 * number + after))
    return torch.tensor([ids])


def contrasting(model: Any) -> Any:
    """Weights as large as those of trained models, so that attention is not uniform."""
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(4)
    model.generation_config.suppress_tokens = [95, 96, 97, 98]
    model.generation_config.pad_token_id = 0
    return model.eval()


def llava() -> Built:
    config = t.LlavaConfig(
        vision_config=t.CLIPVisionConfig(**VISION),
        text_config=t.LlamaConfig(**TEXT),
        image_token_id=98,
        vision_feature_layer=-2,
    )
    return t.LlavaForConditionalGeneration(config), {"input_ids": prompt(16), "pixel_values": torch.randn(1, 3, 32, 32)}


def llava_next() -> Built:
    config = t.LlavaNextConfig(
        vision_config=t.CLIPVisionConfig(**VISION),
        text_config=t.LlamaConfig(**TEXT),
        image_token_id=98,
        image_grid_pinpoints=[[32, 64]],
    )
    model, sizes = t.LlavaNextForConditionalGeneration(config).eval(), torch.tensor([[32, 64]])
    pixels = torch.randn(1, 3, 3, 32, 32)
    with torch.no_grad():
        count = sum(len(image) for image in model.get_image_features(pixels, sizes).pooler_output)
    return model, {"input_ids": prompt(count), "pixel_values": pixels, "image_sizes": sizes}


def llava_onevision() -> Built:
    config = t.LlavaOnevisionConfig(
        vision_config=t.SiglipVisionConfig(**VISION),
        text_config=t.Qwen2Config(**TEXT),
        image_token_id=98,
        video_token_id=97,
        image_grid_pinpoints=[[32, 64]],
    )
    model, sizes = t.LlavaOnevisionForConditionalGeneration(config).eval(), torch.tensor([[32, 64]])
    pixels = torch.randn(1, 3, 3, 32, 32)
    with torch.no_grad():
        count = sum(len(image) for image in model.get_image_features(pixels, sizes).pooler_output)
    return model, {"input_ids": prompt(count), "pixel_values": pixels, "image_sizes": sizes}


def qwen2_vl(version: str = "2") -> Built:
    if version == "2":
        vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "mlp_ratio": 2}
        config, kind = t.Qwen2VLConfig, t.Qwen2VLForConditionalGeneration
    else:
        vision = {"depth": 2, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 4, "patch_size": 4}
        vision |= {"intermediate_size": 48, "window_size": 16, "fullatt_block_indexes": [1]}
        config, kind = t.Qwen2_5_VLConfig, t.Qwen2_5_VLForConditionalGeneration
    model = kind(config(text_config={**TEXT, "rope_parameters": MROPE}, vision_config=vision, **QWEN))
    ids = prompt(4, 8)
    return model, {
        "input_ids": ids,
        "pixel_values": torch.randn(48, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4], [1, 8, 4]]),  # 4 and 8 tokens after merging 2 x 2
        "mm_token_type_ids": (ids == 98).int(),
    }


def qwen2_5_vl() -> Built:
    return qwen2_vl("2.5")


def qwen3_vl() -> Built:
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 8}
    vision |= {"spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 32, "num_position_embeddings": 64}
    vision |= {"deepstack_visual_indexes": [0, 1, 2]}
    text = {**HEADS, "rope_parameters": MROPE}
    model = t.Qwen3VLForConditionalGeneration(t.Qwen3VLConfig(text_config=text, vision_config=vision, **QWEN))
    ids = prompt(16)
    return model, {
        "input_ids": ids,
        "pixel_values": torch.randn(64, 384),
        "image_grid_thw": torch.tensor([[1, 8, 8]]),
        "mm_token_type_ids": (ids == 98).int(),
    }


def qwen3_vl_video() -> Built:
    """Two frames, each with its own run of tokens, as the processor writes them."""
    model, inputs = qwen3_vl()
    ids = torch.tensor([[1, 5, 96, *[97] * 4, 95, 6, 96, *[97] * 4, 95, 7, 8]])
    inputs = {"input_ids": ids, "pixel_values_videos": torch.randn(32, 384)}
    return model, inputs | {"video_grid_thw": torch.tensor([[2, 4, 4]]), "mm_token_type_ids": (ids == 97).int() * 2}


def qwen2_vl_video() -> Built:
    model, _ = qwen2_vl()
    ids = torch.tensor([[1, 5, 96, *[98] * 4, 95, 6, 96, *[97] * 8, 95, 7, 8]])
    kinds = (ids == 98).int() + (ids == 97).int() * 2
    return model, {
        "input_ids": ids,
        "mm_token_type_ids": kinds,
        "pixel_values": torch.randn(16, 96),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "pixel_values_videos": torch.randn(32, 96),
        "video_grid_thw": torch.tensor([[2, 4, 4]]),
    }


def internvl() -> Built:
    vision = {**SMALL, "image_size": [32, 32], "patch_size": [4, 4]}  # 64 patches, 16 tokens
    config = t.InternVLConfig(vision_config=vision, text_config=t.Qwen2Config(**TEXT), image_token_id=98)
    inputs = {"input_ids": prompt(16), "pixel_values": torch.randn(1, 3, 32, 32)}
    return t.InternVLForConditionalGeneration(config), inputs


def gemma3() -> Built:
    kinds = ["sliding_attention", "full_attention"] * 2
    config = t.Gemma3Config(
        text_config={**HEADS, "sliding_window": 8, "layer_types": kinds},
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_id=98,
        boi_token_id=96,
        eoi_token_id=95,
    )
    ids = prompt(4, 4, after=4)
    inputs = {"input_ids": ids, "token_type_ids": (ids == 98).long(), "pixel_values": torch.randn(2, 3, 32, 32)}
    return t.Gemma3ForConditionalGeneration(config), inputs


def paligemma() -> Built:
    config = t.PaliGemmaConfig(
        text_config=t.GemmaConfig(**HEADS).to_dict(),
        vision_config=t.SiglipVisionConfig(**VISION, projection_dim=32, num_image_tokens=16).to_dict(),
        image_token_id=98,
        projection_dim=32,
    )
    ids = prompt(16, before=0)
    inputs = {"input_ids": ids, "token_type_ids": torch.zeros_like(ids), "pixel_values": torch.randn(1, 3, 32, 32)}
    return t.PaliGemmaForConditionalGeneration(config), inputs


def smolvlm() -> Built:
    vision = {**SMALL, "image_size": 32, "patch_size": 8}
    config = t.SmolVLMConfig(
        vision_config=vision, text_config=t.LlamaConfig(**TEXT), image_token_id=98, scale_factor=2, pad_token_id=0
    )
    inputs = {"input_ids": prompt(4), "pixel_values": torch.randn(1, 1, 3, 32, 32)}
    return t.SmolVLMForConditionalGeneration(config), inputs


def vipllava() -> Built:
    config = t.VipLlavaConfig(
        vision_config=t.CLIPVisionConfig(**VISION),
        text_config=t.LlamaConfig(**TEXT),
        image_token_index=98,
        vision_feature_layers=[-2, -1],
    )
    inputs = {"input_ids": prompt(16), "pixel_values": torch.randn(1, 3, 32, 32)}
    return t.VipLlavaForConditionalGeneration(config), inputs


def aya_vision() -> Built:
    kinds = ["sliding_attention", "full_attention"] * 2
    config = t.AyaVisionConfig(
        vision_config=t.SiglipVisionConfig(**VISION),
        text_config=t.Cohere2Config(**TEXT, sliding_window=8, layer_types=kinds),
        image_token_id=98,
        downsample_factor=2,
        adapter_layer_norm_eps=1e-6,
    )
    inputs = {"input_ids": prompt(4, after=5), "pixel_values": torch.randn(1, 3, 32, 32)}
    return t.AyaVisionForConditionalGeneration(config), inputs


def mistral3() -> Built:
    config = t.Mistral3Config(
        vision_config=t.PixtralVisionConfig(**VISION),
        text_config=t.MistralConfig(**HEADS),
        image_token_id=98,
        spatial_merge_size=2,
    )
    inputs = {"input_ids": prompt(4), "pixel_values": torch.randn(1, 3, 32, 32)}
    return t.Mistral3ForConditionalGeneration(config), inputs | {"image_sizes": torch.tensor([[32, 32]])}


def pixtral() -> Built:
    config = t.LlavaConfig(
        vision_config=t.PixtralVisionConfig(**VISION),
        text_config=t.MistralConfig(**HEADS),
        image_token_id=98,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    inputs = {"input_ids": prompt(16), "pixel_values": torch.randn(1, 3, 32, 32)}
    return t.LlavaForConditionalGeneration(config), inputs | {"image_sizes": torch.tensor([[32, 32]])}


def aria() -> Built:
    text = {**HEADS, "moe_num_experts": 2, "moe_topk": 1, "moe_num_shared_experts": 1}
    config = t.AriaConfig(
        vision_config={"model_type": "idefics3_vision", **VISION},
        text_config=text,
        image_token_index=98,
        projector_patch_to_query_dict={16: 4},
    )
    inputs = {"input_ids": prompt(4), "pixel_values": torch.randn(1, 3, 32, 32)}
    return t.AriaForConditionalGeneration(config), inputs


def llava_next_video() -> Built:
    config = t.LlavaNextVideoConfig(
        vision_config=t.CLIPVisionConfig(**VISION),
        text_config=t.LlamaConfig(**TEXT),
        image_token_index=98,
        video_token_index=97,
        image_grid_pinpoints=[[32, 64]],
        spatial_pool_stride=2,
    )
    ids = prompt(8)
    inputs = {"input_ids": torch.where(ids == 98, 97, ids), "pixel_values_videos": torch.randn(1, 2, 3, 32, 32)}
    return t.LlavaNextVideoForConditionalGeneration(config), inputs


FAMILIES: dict[str, Callable[[], Built]] = {
    f.__name__: f
    for f in (
        llava,
        llava_next,
        llava_onevision,
        qwen2_vl,
        qwen2_vl_video,
        qwen2_5_vl,
        qwen3_vl,
        qwen3_vl_video,
        internvl,
        gemma3,
        paligemma,
        smolvlm,
        vipllava,
        aya_vision,
        mistral3,
        pixtral,
        aria,
        llava_next_video,
    )
}


def build(name: str) -> Built:
    """Model with contrast and a prompt of one sequence without padding."""
    torch.manual_seed(0)
    model, inputs = FAMILIES[name]()
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return contrasting(model), inputs
