"""Real classes at real sizes (random weights) on ragged batches; what is smaller than real says so in its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from benchmarks.models_zoo_decoders import idefics, mllama, whisper, whisper_cross


@dataclass(frozen=True)
class System:
    """One row of the table."""

    name: str
    build: Callable[[], tuple[nn.Module, dict[str, Any]]]
    note: str = ""
    """What bounds it."""
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    train: bool = False
    """Measure forward + backward too."""
    keep: Callable[[Any], list[Tensor]] | None = None
    lean: bool = False
    """Too large for a copy in float64: its reference is computed a layer at a time."""
    checked: int | None = None
    """Compare with float64 on the first so many entries of the batch: it is ten times slower than what is measured."""


BOTH = (torch.float32, torch.bfloat16)


def ragged(batch: int, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Lengths from low to high (one of them high), and their mask (batch, high)."""
    lengths = torch.randint(low, high + 1, (batch,), generator=torch.Generator().manual_seed(1))
    lengths[0] = high
    return lengths, (torch.arange(high) < lengths[:, None]).long()


def _qformer(batch: int = 12) -> Any:
    model = hf.Blip2QFormerModel(hf.Blip2QFormerConfig(encoder_hidden_size=1408))
    mask = ragged(batch, 64, 1024)[1]
    queries = torch.randn(1, 32, 768).expand(batch, -1, -1)
    return model, {
        "query_embeds": queries,
        "encoder_hidden_states": torch.randn(batch, 1024, 1408),
        "encoder_attention_mask": mask,
    }


def _instructblip(batch: int = 6) -> Any:
    model = hf.InstructBlipQFormerModel(hf.InstructBlipQFormerConfig(encoder_hidden_size=1408))
    mask, text = ragged(batch, 64, 1024)[1], ragged(batch, 5, 77)[1]
    return model, {
        "input_ids": torch.randint(3, 999, text.shape),
        "attention_mask": torch.cat([torch.ones(batch, 32, dtype=torch.long), text], 1),
        "query_embeds": torch.randn(batch, 32, 768),
        "encoder_hidden_states": torch.randn(batch, 1024, 1408),
        "encoder_attention_mask": mask,
    }


class CrossAttention(nn.Module):
    """nn.MultiheadAttention as cross-attention code calls it."""

    def __init__(self, width: int = 768, heads: int = 12) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, text: Tensor, image: Tensor, hidden: Tensor) -> Tensor:
        return self.attention(text, image, image, key_padding_mask=hidden, need_weights=False)[0]  # type: ignore[no-any-return]


def _mha(batch: int = 8) -> Any:
    mask = ragged(batch, 64, 1024)[1]
    inputs = {"text": torch.randn(batch, 32, 768), "image": torch.randn(batch, 1024, 768), "hidden": mask == 0}
    return CrossAttention(), inputs


def _decoder_layer(batch: int = 8) -> Any:
    mask = ragged(batch, 64, 1024)[1]
    layer = nn.TransformerDecoderLayer(768, 12, 3072, dropout=0.0, batch_first=True)
    return layer, {
        "tgt": torch.randn(batch, 32, 768),
        "memory": torch.randn(batch, 1024, 768),
        "memory_key_padding_mask": mask == 0,
    }


class FusionBlock(nn.Module):
    """A TorchMultimodal-style fusion layer: pre-norm self-attention, cross-attention, feed-forward, on nn modules."""

    def __init__(self, width: int = 768, heads: int = 12) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.cross = nn.MultiheadAttention(width, heads, batch_first=True)
        self.feedforward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, text: Tensor, image: Tensor, text_hidden: Tensor, image_hidden: Tensor) -> Tensor:
        x = self.norms[0](text)
        text = text + self.attention(x, x, x, key_padding_mask=text_hidden, need_weights=False)[0]
        x = self.norms[1](text)
        text = text + self.cross(x, image, image, key_padding_mask=image_hidden, need_weights=False)[0]
        return text + self.feedforward(self.norms[2](text))  # type: ignore[no-any-return]


def _fusion_block(batch: int = 8) -> Any:
    text, image = ragged(batch, 5, 77)[1], ragged(batch, 64, 1024)[1]
    return FusionBlock(), {
        "text": torch.randn(batch, 77, 768),
        "image": torch.randn(batch, 1024, 768),
        "text_hidden": text == 0,
        "image_hidden": image == 0,
    }


def caption_ids(batch: int, vocabulary: int, end: int, captions: bool = True, padding: int | None = None) -> Tensor:
    """Ids with the lengths of captions (mostly 8 to 30 tokens, a few up to 77), or uniform from 5 to 77."""
    lengths, mask = ragged(batch, 5, 77)
    if captions:
        lengths = (5 + torch.distributions.Exponential(1 / 14).sample((batch,)).long()).clamp(max=77)
        mask = torch.arange(77) < lengths[:, None]
    ids = torch.where(mask.bool(), torch.randint(3, vocabulary - 3, mask.shape), end if padding is None else padding)
    return ids.scatter(1, lengths[:, None] - 1, end)


def _clip(batch: int = 4) -> Any:
    model = hf.CLIPModel(hf.CLIPConfig(text_config={"eos_token_id": 49407}))  # ViT-B/32
    return model, {"input_ids": caption_ids(batch, 49407, 49407), "pixel_values": torch.randn(batch, 3, 224, 224)}


class ClipTexts(nn.Module):
    """CLIPModel.get_text_features as a module."""

    def __init__(self) -> None:
        super().__init__()
        config = hf.CLIPConfig(text_config={"eos_token_id": 49407}, vision_config={"num_hidden_layers": 1})
        self.clip = hf.CLIPModel(config)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.clip.get_text_features(input_ids).pooler_output  # type: ignore[no-any-return]


def _clip_text(captions: bool, batch: int = 16) -> Any:
    return ClipTexts(), {"input_ids": caption_ids(batch, 49407, 49407, captions)}


def _siglip(batch: int = 2) -> Any:
    model = hf.SiglipModel(hf.SiglipConfig())  # base, patch 16, 224 x 224
    return model, {"input_ids": torch.randint(3, 900, (batch, 64)), "pixel_values": torch.randn(batch, 3, 224, 224)}


def _blip_itm(texts: int = 32) -> Any:
    module = hf.models.blip.modeling_blip_text
    config = hf.BlipTextConfig(encoder_hidden_size=768, is_decoder=True, num_hidden_layers=4)
    model = module.BlipTextModel(config, add_pooling_layer=False)
    mask = ragged(texts, 5, 35)[1]
    return model, {
        "input_ids": torch.randint(3, 900, mask.shape),
        "attention_mask": mask,
        "encoder_hidden_states": torch.randn(1, 577, 768).repeat(texts, 1, 1),
        "encoder_attention_mask": torch.ones(texts, 577, dtype=torch.long),
    }


def _t5(batch: int = 8) -> Any:
    config = hf.T5Config(d_model=768, d_ff=3072, num_layers=4, num_heads=12, decoder_start_token_id=0)
    mask = ragged(batch, 5, 77)[1]
    return hf.T5Model(config), {
        "input_ids": torch.randint(3, 900, mask.shape),
        "attention_mask": mask,
        "decoder_input_ids": torch.randint(3, 900, (batch, 32)),
    }


def _lxmert(batch: int = 8) -> Any:
    mask = ragged(batch, 5, 20)[1]
    return hf.LxmertModel(hf.LxmertConfig()), {
        "input_ids": torch.randint(3, 900, mask.shape),
        "attention_mask": mask,
        "visual_feats": torch.randn(batch, 36, 2048),
        "visual_pos": torch.rand(batch, 36, 4),
    }


def _grounding_dino(batch: int = 2, tokens: int = 13294) -> Any:
    config = hf.GroundingDinoConfig(
        backbone_config=hf.SwinConfig(embed_dim=12, depths=[1], num_heads=[2], out_features=["stage1"])
    )
    layer = hf.models.grounding_dino.modeling_grounding_dino.GroundingDinoFusionLayer(config)
    text, vision = ragged(batch, 5, 32)[1], ragged(batch, 9000, tokens)[1]
    return layer, {
        "vision_features": torch.randn(batch, tokens, 256),
        "text_features": torch.randn(batch, 32, 256),
        "attention_mask_vision": vision == 0,
        "attention_mask_text": text == 0,
    }


def _detr(batch: int = 4) -> Any:
    model = hf.models.detr.modeling_detr.DetrDecoder(hf.DetrConfig(backbone_config=hf.ResNetConfig()))
    mask = ragged(batch, 400, 850)[1]
    return model, {
        "inputs_embeds": torch.zeros(batch, 100, 256),
        "encoder_hidden_states": torch.randn(batch, 850, 256),
        "encoder_attention_mask": mask,
        "spatial_position_embeddings": torch.randn(batch, 850, 256),
        "object_queries_position_embeddings": torch.randn(batch, 100, 256),
    }


def _table_transformer(batch: int = 4) -> Any:
    config = hf.TableTransformerConfig(
        use_timm_backbone=False, backbone_config=hf.ResNetConfig(), use_pretrained_backbone=False
    )
    model = hf.models.table_transformer.modeling_table_transformer.TableTransformerDecoder(config)
    mask = ragged(batch, 400, 850)[1]
    return model, {
        "inputs_embeds": torch.zeros(batch, 100, 256),
        "encoder_hidden_states": torch.randn(batch, 850, 256),
        "encoder_attention_mask": mask,
        "object_queries": torch.randn(batch, 850, 256),
        "query_position_embeddings": torch.randn(batch, 100, 256),
    }


class Mask2FormerLayer(nn.Module):
    """One decoder layer with the mask that its predictor makes: per query and pixel, repeated for every head."""

    def __init__(self) -> None:
        super().__init__()
        config = hf.Mask2FormerConfig()
        self.layer = hf.models.mask2former.modeling_mask2former.Mask2FormerMaskedAttentionDecoderLayer(config)

    def forward(self, queries: Tensor, pixels: Tensor, places: Tensor, positions: Tensor, hidden: Tensor) -> Tensor:
        return self.layer(queries, 0, None, [positions], places, [pixels], encoder_attention_mask=hidden)[0]  # type: ignore[no-any-return]


def _mask2former(batch: int = 2, pixels: int = 4096) -> Any:
    hidden = (torch.rand(batch, 1, 100, pixels) > 0.3).repeat(1, 8, 1, 1).flatten(0, 1)
    return Mask2FormerLayer(), {
        "queries": torch.randn(100, batch, 256),
        "places": torch.randn(100, batch, 256),
        "hidden": hidden,
        "pixels": torch.randn(pixels, batch, 256),
        "positions": torch.randn(pixels, batch, 256),
    }


def _perceiver(batch: int = 2) -> Any:
    model = hf.PerceiverModel(hf.PerceiverConfig(num_self_attends_per_block=4))
    mask = ragged(batch, 512, 2048)[1]
    return model, {"inputs": torch.randn(batch, 2048, 768), "attention_mask": mask}


def _idefics2(batch: int = 2) -> Any:
    module = hf.models.idefics2
    config = module.configuration_idefics2.Idefics2PerceiverConfig(resampler_depth=1)
    mask = ragged(batch, 64, 1024)[1]
    return module.modeling_idefics2.Idefics2PerceiverResampler(config), {
        "context": torch.randn(batch, 1024, config.hidden_size),
        "attention_mask": mask,
    }


def _flava(batch: int = 8) -> Any:
    mask = ragged(batch, 5, 77)[1]
    return hf.FlavaTextModel(hf.FlavaTextConfig(num_hidden_layers=4)), {
        "input_ids": torch.randint(3, 900, mask.shape),
        "attention_mask": mask,
    }


def _albef(batch: int = 8) -> Any:
    config = hf.BertConfig(num_hidden_layers=3, is_decoder=True, add_cross_attention=True)
    text, image = ragged(batch, 5, 35)[1], ragged(batch, 64, 577)[1]
    return hf.BertModel(config), {
        "inputs_embeds": torch.randn(*text.shape, 768),
        "attention_mask": text,
        "encoder_hidden_states": torch.randn(batch, 577, 768),
        "encoder_attention_mask": image,
        "use_cache": False,
    }


def _llava() -> Any:
    config = hf.LlavaConfig(
        text_config={"model_type": "llama", "num_hidden_layers": 1, "vocab_size": 1000},
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 1,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
        },
        image_token_index=999,
    )
    ids = torch.randint(3, 900, (1, 640))
    ids[:, 4:580] = 999
    return hf.LlavaForConditionalGeneration(config), {
        "input_ids": ids,
        "pixel_values": torch.randn(1, 3, 336, 336),
        "attention_mask": torch.ones_like(ids),
    }


# The systems with a speed to reach come first.
SYSTEMS = [
    System("BLIP-2 Q-Former, batch 12, image 64..1024", _qformer, dtypes=BOTH, train=True, checked=3),
    System("InstructBLIP Q-Former, batch 6, image 64..1024, text 5..77", _instructblip, checked=2),
    System("Mllama cross layer, 2 of 4 tiles", lambda: mllama(2), dtypes=BOTH),
    System("Mllama cross layer, 1 of 4 tiles", lambda: mllama(1), dtypes=BOTH),
    System(
        "BLIP ITM text encoder, 1 image x 32 texts (4 of 12 layers)",
        _blip_itm,
        "texts share one projection of the image",
        checked=4,
        keep=lambda o: [o.last_hidden_state[:, 0]],
    ),
    System(
        "CLIP text tower (ViT-B/32), batch 16, captions padded to 77",
        lambda: _clip_text(True),
        "all layers run on tokens that count",
        BOTH,
        checked=4,
    ),
    System(
        "Whisper large-v3 decoder, cached token (4 of 32 layers)",
        lambda: whisper(True),
        "bound by reading weights and cache",
    ),
    System("Whisper large-v3 cross-attention module, cached token, batch 4", whisper_cross, keep=lambda o: [o]),
    System(
        "IDEFICS-1 9B per token, 5 images (4 of 32 layers)",
        idefics,
        "image keys and values kept over steps",
        keep=lambda o: [o],
        lean=True,
    ),
    System("nn.MultiheadAttention, 32 queries on 64..1024", _mha, dtypes=BOTH, train=True),
    System("nn.TransformerDecoderLayer, 32 on 64..1024", _decoder_layer),
    System("TorchMultimodal-style fusion block", _fusion_block),
    System(
        "CLIP text tower (ViT-B/32), batch 16, text 5..77 uniformly",
        lambda: _clip_text(False),
        "all layers run on tokens that count",
        checked=4,
    ),
    System(
        "CLIP ViT-B/32 whole, batch 4",
        _clip,
        "the image tower has no padding to drop",
        keep=lambda o: [o.logits_per_image],
    ),
    System(
        "SigLIP base whole, batch 2",
        _siglip,
        "no padding: texts are padded on purpose, images are whole",
        keep=lambda o: [o.logits_per_image],
    ),
    System(
        "Whisper large-v3 decoder, uncached token (4 of 32 layers)",
        lambda: whisper(False),
        "bound by projecting the audio; nothing to drop",
    ),
    System("T5 base, text 5..77 (4 of 12 layers)", _t5, "bound by its backbone"),
    System("LXMERT base, text 5..20 and 36 regions", _lxmert, "bound by its backbone"),
    System("DETR decoder, 100 queries on 400..850", _detr, "a whole DETR is bound by its backbone"),
    System("TableTransformer decoder, 100 queries on 400..850", _table_transformer),
    System(
        "Mask2Former decoder layer, 100 queries on 64 x 64",
        _mask2former,
        "a whole Mask2Former is bound by its backbone",
    ),
    System("Perceiver, 256 latents on 512..2048 (4 of 26 self-attentions)", _perceiver, "bound by its backbone"),
    System("Idefics2 resampler, image 64..1024 (1 of 3 layers)", _idefics2),
    System("FLAVA text encoder, text 5..77 (4 of 12 layers)", _flava, "bound by its backbone"),
    System(
        "ALBEF-style fusion BERT, text 5..35, image 64..577 (3 of 6 layers)",
        _albef,
        "features are projected before the hook",
    ),
    System(
        "GroundingDINO fusion layer, 9000..13294 pixels, text 5..32", _grounding_dino, keep=lambda o: [o[0][0], o[1][0]]
    ),
    System(
        "LLaVA 1.5 prefill (1 of 24 + 1 of 32 layers)",
        _llava,
        "bound by its backbone",
        keep=lambda o: [o.logits[:, -1]],
    ),
]
