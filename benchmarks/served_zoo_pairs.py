"""More of ``served_zoo``: encoders of pairs, encoder-decoders and detectors."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

from benchmarks.served_zoo import IDS, SIZES, TEXT, VISION, Built, ids, model, pixels, prompt

BART = {
    **IDS,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 64,
}


@model("Florence-2")
def florence2() -> Built:
    vision = {"depths": [1, 1], "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1], "window_size": 4}
    stages = {"patch_prenorm": [False, True], "embed_dim": [32, 64], "num_heads": [2, 4], "num_groups": [2, 4]}
    config = hf.Florence2Config(
        text_config={**BART, "model_type": "bart"},
        vision_config={**vision, **stages, "projection_dim": 64},
        image_token_id=95,
    )
    row = prompt(95, 17, 2)
    return hf.Florence2ForConditionalGeneration(config), {
        **row,
        **pixels(),
        "decoder_input_ids": row["input_ids"][:, -9:],
    }


@model("SAM 2")
def sam2() -> Built:
    config = hf.Sam2Config(
        vision_config={
            "backbone_config": {
                "hidden_size": 16,
                "image_size": [64, 64],
                "blocks_per_stage": [1, 1, 2, 1],
                "embed_dim_per_stage": [16, 32, 64, 128],
                "num_attention_heads_per_stage": [1, 2, 4, 8],
                "window_size_per_stage": [4, 2, 2, 2],
                "global_attention_blocks": [3],
                "window_positional_embedding_background_size": [4, 4],
                "model_type": "sam2_hiera_det_model",
            },
            "backbone_channel_list": [128, 64, 32, 16],
            "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
            "fpn_hidden_size": 32,
        },
        prompt_encoder_config={"hidden_size": 32, "image_size": 64, "patch_size": 16},
        mask_decoder_config={"hidden_size": 32, "mlp_dim": 48, "num_attention_heads": 4, "iou_head_hidden_dim": 32},
    )
    points = {"input_points": torch.rand(2, 1, 2, 2) * 64, "input_labels": torch.ones(2, 1, 2, dtype=torch.int)}
    return hf.Sam2Model(config), {**pixels(2, 64), **points}


@model("Pix2Struct")
def pix2struct() -> Built:
    text = {"hidden_size": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, **IDS}
    vision = {**{k: v for k, v in SIZES.items() if k != "intermediate_size"}, "d_ff": 96, "d_kv": 16}
    config = hf.Pix2StructConfig(
        text_config=text,
        vision_config={**vision, "patch_embed_hidden_size": 48, "seq_len": 24, "initializer_range": 0.02},
    )
    patches, row = torch.randn(2, 24, 50), ids()
    patches[..., :2] = torch.randint(1, 9, (2, 24, 2))
    inputs = {"flattened_patches": patches, "attention_mask": row["attention_mask"]}
    return hf.Pix2StructForConditionalGeneration(config), {**inputs, "decoder_input_ids": row["input_ids"][:, :9]}


def _clip(family: str, text: dict[str, Any], vision: dict[str, Any], **inputs: Any) -> Built:
    config = getattr(hf, f"{family}Config")(text_config=text, vision_config=vision, projection_dim=32)
    return getattr(hf, f"{family}Model")(config), {**ids(), **pixels(), **inputs}


@model("CLIP")
def clip() -> Built:
    return _clip("CLIP", {**TEXT, "eos_token_id": 98}, VISION)


@model("SigLIP")
def siglip() -> Built:
    return hf.SiglipModel(hf.SiglipConfig(text_config=TEXT, vision_config=VISION)), {**ids(), **pixels()}


@model("MetaCLIP 2")
def metaclip2() -> Built:
    return _clip("MetaClip2", {**TEXT, "eos_token_id": 98}, VISION)


@model("AltCLIP")
def altclip() -> Built:
    return _clip("AltCLIP", {**TEXT, "project_dim": 32}, VISION)


@model("Chinese-CLIP")
def chinese_clip() -> Built:
    return _clip("ChineseCLIP", TEXT, VISION)


@model("X-CLIP")
def x_clip() -> Built:
    mit = {"mit_hidden_size": 32, "mit_intermediate_size": 48, "mit_num_attention_heads": 4, "num_frames": 2}
    config = hf.XCLIPConfig(
        text_config={**TEXT, "hidden_size": 32},
        vision_config={**VISION, **mit},
        projection_dim=32,
        prompt_num_attention_heads=4,
    )
    return hf.XCLIPModel(config), {**ids(), "pixel_values": torch.randn(2, 2, 3, 32, 32)}


@model("CLAP")
def clap() -> Built:
    audio = {
        "window_size": 4,
        "num_mel_bins": 16,
        "spec_size": 64,
        "depths": [1, 1],
        "num_attention_heads": [2, 4],
        "hidden_size": 32,
        "patch_embeds_hidden_size": 16,
        "num_hidden_layers": 2,
    }
    config = hf.ClapConfig(text_config=TEXT, audio_config=audio, projection_dim=32)
    sound = {"input_features": torch.randn(2, 1, 64, 16), "is_longer": torch.zeros(2, 1, dtype=torch.bool)}
    return hf.ClapModel(config), {**ids(), **sound}


@model("Moonshine")
def moonshine() -> Built:
    config = hf.MoonshineConfig(
        **{**IDS, "pad_token_id": 0},
        hidden_size=64,
        intermediate_size=96,
        encoder_num_hidden_layers=2,
        decoder_num_hidden_layers=2,
        encoder_num_attention_heads=4,
        decoder_num_attention_heads=4,
    )
    sound = torch.ones(2, 12000, dtype=torch.long)
    sound[1, 5000:] = 0
    inputs = {"input_values": torch.randn(2, 12000), "attention_mask": sound}
    return hf.MoonshineForConditionalGeneration(config), {**inputs, "decoder_input_ids": torch.randint(3, 90, (2, 9))}


@model("BART")
def bart() -> Built:
    return hf.BartForConditionalGeneration(hf.BartConfig(**BART)), {
        **ids(),
        "decoder_input_ids": torch.randint(3, 90, (2, 9)),
    }


T5 = {**IDS, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}


@model("T5")
def t5() -> Built:
    return hf.T5ForConditionalGeneration(hf.T5Config(**T5)), {
        **ids(),
        "decoder_input_ids": torch.randint(3, 90, (2, 9)),
    }


@model("mT5")
def mt5() -> Built:
    return hf.MT5ForConditionalGeneration(hf.MT5Config(**T5)), {
        **ids(),
        "decoder_input_ids": torch.randint(3, 90, (2, 9)),
    }


@model("OWL-ViT")
def owlvit() -> Built:
    text = {**TEXT, "max_position_embeddings": 24}
    config = hf.OwlViTConfig(text_config=text, vision_config=VISION, projection_dim=64)
    return hf.OwlViTForObjectDetection(config), {**ids(), **pixels()}


@model("CLIPSeg")
def clipseg() -> Built:
    config = hf.CLIPSegConfig(
        text_config=TEXT,
        vision_config=VISION,
        projection_dim=32,
        extract_layers=[0, 1],
        reduce_dim=32,
        decoder_intermediate_size=48,
    )
    return hf.CLIPSegForImageSegmentation(config), {**ids(), **pixels()}


@model("GroupViT")
def groupvit() -> Built:
    stages = {
        "depths": [1, 1, 1],
        "num_group_tokens": [8, 4, 0],
        "num_output_groups": [8, 4, 4],
        "num_hidden_layers": 3,
    }
    config = hf.GroupViTConfig(
        text_config=TEXT, vision_config={**VISION, **stages}, projection_dim=32, projection_intermediate_dim=48
    )
    return hf.GroupViTModel(config), {**ids(), **pixels()}


DETR = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_queries": 6,
}


@model("Conditional DETR")
def conditional_detr() -> Built:
    resnet = {"embedding_size": 8, "hidden_sizes": [8, 8, 8, 16], "depths": [1] * 4, "layer_type": "basic"}
    config = hf.ConditionalDetrConfig(
        **DETR, backbone_config=hf.ResNetConfig(**resnet, out_features=["stage4"]), use_timm_backbone=False
    )
    seen = torch.ones(2, 64, 64, dtype=torch.long)
    seen[1, :, 32:] = 0
    return hf.ConditionalDetrModel(config), {**pixels(2, 64), "pixel_mask": seen}


def _grounding(family: str) -> Built:
    swin = {
        "image_size": 32,
        "patch_size": 4,
        "embed_dim": 8,
        "depths": [1] * 4,
        "num_heads": [1, 1, 2, 2],
        "window_size": 4,
    }
    config = getattr(hf, f"{family}Config")(
        **{**DETR, "encoder_ffn_dim": 256},
        backbone_config=hf.SwinConfig(**swin, out_features=["stage2", "stage3", "stage4"]),
        text_config={**TEXT, "model_type": "bert"},
        num_feature_levels=3,
        max_text_len=24,
    )
    return getattr(hf, f"{family}Model")(config), {**ids(), **pixels(2, 64)}


@model("GroundingDINO")
def grounding_dino() -> Built:
    return _grounding("GroundingDino")


@model("MM-GroundingDINO")
def mm_grounding_dino() -> Built:
    return _grounding("MMGroundingDino")


@model("BridgeTower")
def bridgetower() -> Built:
    config = hf.BridgeTowerConfig(
        hidden_size=64,
        num_attention_heads=4,
        num_hidden_layers=1,
        text_config={**TEXT, "type_vocab_size": 1},
        vision_config={"hidden_size": 64, "num_hidden_layers": 2, "patch_size": 8, "image_size": 32},
    )
    return hf.BridgeTowerModel(config), {**ids(), **pixels(), "pixel_mask": torch.ones(2, 32, 32, dtype=torch.long)}


@model("GIT")
def git() -> Built:
    return hf.GitForCausalLM(hf.GitConfig(**TEXT, vision_config=VISION)), {**ids(), **pixels()}


@model("Whisper")
def whisper() -> Built:
    config = hf.WhisperConfig(
        **BART, num_mel_bins=16, max_source_positions=16, max_target_positions=64, decoder_start_token_id=1
    )
    inputs = {"input_features": torch.randn(2, 16, 32), "decoder_input_ids": torch.randint(3, 90, (2, 9))}
    return hf.WhisperForConditionalGeneration(config), inputs
