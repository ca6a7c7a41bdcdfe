"""More entries for zoo.py: detection and segmentation decoders, and stand-ins for third-party code."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from doubles import (
    GatedCrossAttentionBlock,
    MaskedCrossAttention,
    MultiHeadAttentionWithCache,
    MultiHeadSelfAttention,
    MultimodalLayer,
)
from torch import Tensor, nn
from zoo import Entry, lengths_mask, spoil

from fastxattn.integrations import register_adapter

for _double in (MultiHeadAttentionWithCache, MultiHeadSelfAttention):
    register_adapter(_double, f"fastxattn.integrations.torchmultimodal:{_double.__name__}")
register_adapter(MaskedCrossAttention, "fastxattn.integrations.flamingo:MaskedCrossAttention")


def lxmert() -> Any:
    config = hf.LxmertConfig(
        vocab_size=99,
        hidden_size=64,
        num_attention_heads=4,
        intermediate_size=96,
        l_layers=1,
        x_layers=2,
        r_layers=1,
        visual_feat_dim=32,
    )
    model = hf.LxmertModel(config)
    mask, seen = lengths_mask([9, 4, 6], 9), lengths_mask([11, 3, 7], 11)
    ids, features = torch.randint(3, 90, (3, 9)), torch.randn(3, 11, 32)
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "visual_feats": features,
        "visual_pos": torch.rand(3, 11, 4),
        "visual_attention_mask": seen,
    }
    other = {**inputs, "input_ids": torch.where(mask.bool(), ids, 2), "visual_feats": spoil(features, seen, 30.0)}
    return model, inputs, other


class Fusion(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        config = hf.GroundingDinoConfig(
            backbone_config=hf.SwinConfig(embed_dim=12, depths=[1], num_heads=[2], out_features=["stage1"]),
            d_model=32,
            encoder_attention_heads=8,
            encoder_ffn_dim=256,
        )
        self.layer = hf.models.grounding_dino.modeling_grounding_dino.GroundingDinoFusionLayer(config)
        with torch.no_grad():
            for p in self.layer.parameters():
                p.copy_(torch.randn_like(p) * 0.3)

    def forward(self, **inputs: Any) -> list[Tensor]:
        (vision, _), (text, _) = self.layer(**inputs)
        seen, there = ~inputs["attention_mask_vision"], ~inputs["attention_mask_text"]
        return [vision * seen[..., None], text * there[..., None]]


def grounding_dino() -> Any:
    seen, there = lengths_mask([50, 20, 33], 50), lengths_mask([7, 3, 5], 7)
    vision, text = torch.randn(3, 50, 32), torch.randn(3, 7, 32)
    inputs = {
        "vision_features": vision,
        "text_features": text,
        "attention_mask_vision": ~seen.bool(),
        "attention_mask_text": ~there.bool(),
    }
    other = {**inputs, "vision_features": spoil(vision, seen, 30.0), "text_features": spoil(text, there, 30.0)}
    return Fusion(), inputs, other


def table_transformer() -> Any:
    config = hf.TableTransformerConfig(
        use_timm_backbone=False,
        backbone_config=hf.ResNetConfig(),
        use_pretrained_backbone=False,
        d_model=32,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=48,
        dropout=0.0,
    )
    model = hf.models.table_transformer.modeling_table_transformer.TableTransformerDecoder(config)
    mask, pixels = lengths_mask([30, 9, 17], 30), torch.randn(3, 30, 32)
    inputs = {
        "inputs_embeds": torch.randn(3, 6, 32),
        "encoder_hidden_states": pixels,
        "encoder_attention_mask": mask,
        "object_queries": torch.randn(3, 30, 32),
        "query_position_embeddings": torch.randn(3, 6, 32),
    }
    return model, inputs, {**inputs, "encoder_hidden_states": spoil(pixels, mask, 30.0)}


class Mask2FormerLayer(nn.Module):
    """One decoder layer, with the mask that its predictor makes: per query, the same for every head."""

    def __init__(self, pre_norm: bool) -> None:
        super().__init__()
        config = hf.Mask2FormerConfig(
            hidden_dim=32, num_attention_heads=4, dim_feedforward=48, dropout=0.0, pre_norm=pre_norm
        )
        self.layer = hf.models.mask2former.modeling_mask2former.Mask2FormerMaskedAttentionDecoderLayer(config)

    def forward(self, queries: Any, pixels: Any, places: Any, positions: Any, hidden: Any) -> Any:
        hidden = hidden[:, None].expand(-1, 4, -1, -1).flatten(0, 1)
        return self.layer(queries, 0, None, [positions], places, [pixels], encoder_attention_mask=hidden)[0]


def mask2former(pre_norm: bool = False) -> Any:
    hidden = torch.rand(3, 6, 40) > 0.4
    hidden[:, :, 33:] = True
    hidden[..., 0] = False  # its decoder never hides everything
    pixels = torch.randn(40, 3, 32)
    inputs = {
        "queries": torch.randn(6, 3, 32),
        "pixels": pixels,
        "places": torch.randn(6, 3, 32),
        "positions": torch.randn(40, 3, 32),
        "hidden": hidden,
    }
    other = pixels.clone()
    other[33:] = 30.0
    return Mask2FormerLayer(pre_norm), inputs, {**inputs, "pixels": other}


def flamingo(immediate: bool = True) -> Any:
    model = GatedCrossAttentionBlock(64, 48, immediate)
    places = torch.zeros(3, 8, dtype=torch.bool)
    places[0, [1, 4]] = places[1, 0] = places[2, 3] = True
    media = torch.randn(3, 3, 7, 48)  # of which the texts see 2, 1 and 1
    other = media.clone()
    if immediate:
        other[0, 2] = other[1, 1:] = other[2, 1:] = 30.0
    else:  # text before the first medium averages all media there are
        other[1, 1:] = 30.0
    inputs = {"x": torch.randn(3, 8, 64), "media": media, "media_locations": places}
    return model, inputs, {**inputs, "media": other}


def torchmultimodal() -> Any:
    there, seen = lengths_mask([7, 3, 5], 7).bool(), lengths_mask([30, 9, 17], 30).bool()
    text, image = torch.randn(3, 7, 64), torch.randn(3, 30, 48)
    inputs = {"text": text, "image": image, "text_mask": there, "image_mask": seen}
    return MultimodalLayer(), inputs, {**inputs, "text": spoil(text, there, 30.0), "image": spoil(image, seen, 30.0)}


def _real_text(out: Any) -> list[Any]:
    return [torch.cat([row[:n] for row, n in zip(out, [7, 3, 5], strict=True)])]


ENTRIES = [
    Entry("lxmert", lxmert, lambda o: [o.pooled_output], ("LxmertAttention",)),
    Entry("grounding-dino-fusion", grounding_dino, lambda o: o, ("Fusion",)),
    Entry("table-transformer", table_transformer, lambda o: [o.last_hidden_state], ("TableTransformerAttention",)),
    Entry(
        "mask2former", mask2former, lambda o: [o], ("Mask2FormerLayer", "Mask2FormerAttention", "MultiheadAttention")
    ),
    Entry("mask2former-pre-norm", lambda: mask2former(True), lambda o: [o], ("Mask2FormerLayer",)),
    Entry("flamingo", flamingo, lambda o: [o], ("MaskedCrossAttention",)),
    Entry("flamingo-all-media", lambda: flamingo(False), lambda o: [o], ("MaskedCrossAttention",)),
    Entry("torchmultimodal", torchmultimodal, _real_text, ("MultiHeadSelfAttention", "MultiHeadAttentionWithCache")),
]
