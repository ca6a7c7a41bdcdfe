"""Small random models of the real classes with ragged inputs, for every system that accelerate() knows.

An entry builds (model, inputs, garbage): ``garbage`` are the inputs with other content wherever a mask says that
nothing is there. ``keep`` picks what must agree from a model's output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn


@dataclass(frozen=True)
class Entry:
    name: str
    build: Callable[[], tuple[nn.Module, dict[str, Any], dict[str, Any]]]
    keep: Callable[[Any], list[Tensor]]
    swaps: tuple[str, ...]  # adapters that must be among the swapped
    masked: bool = True  # whether a kernel that ignores masks must be noticed
    exact: bool = True  # False: one output of the model that ``keep`` leaves out changes


def lengths_mask(lengths: list[int], total: int) -> Tensor:
    return (torch.arange(total) < torch.tensor(lengths)[:, None]).long()


def spoil(tokens: Tensor, mask: Tensor, value: float = 1e4) -> Tensor:
    return torch.where(mask.bool().reshape(*mask.shape, *[1] * (tokens.ndim - mask.ndim)), tokens, value)


def _last(out: Any) -> list[Tensor]:
    return [out.last_hidden_state]


TEXT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 99}
VISION = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
}


def qformer() -> Any:
    model = hf.Blip2QFormerModel(hf.Blip2QFormerConfig(**TEXT, encoder_hidden_size=80))
    features, mask = torch.randn(3, 40, 80), lengths_mask([40, 7, 23], 40)
    inputs = {"query_embeds": torch.randn(3, 8, 64), "encoder_hidden_states": features, "encoder_attention_mask": mask}
    return model, inputs, {**inputs, "encoder_hidden_states": spoil(features, mask, float("nan"))}


def instructblip() -> Any:
    model = hf.InstructBlipQFormerModel(hf.InstructBlipQFormerConfig(**TEXT, encoder_hidden_size=80))
    features, mask = torch.randn(3, 40, 80), lengths_mask([40, 7, 23], 40)
    text = lengths_mask([6, 3, 5], 6)
    inputs = {
        "input_ids": torch.randint(3, 99, (3, 6)),
        "attention_mask": torch.cat([torch.ones(3, 8, dtype=torch.long), text], 1),
        "query_embeds": torch.randn(3, 8, 64),
        "encoder_hidden_states": features,
        "encoder_attention_mask": mask,
    }
    ids = torch.where(text.bool(), inputs["input_ids"], 1)
    return model, inputs, {**inputs, "encoder_hidden_states": spoil(features, mask, float("nan")), "input_ids": ids}


def instructblipvideo() -> Any:
    _, inputs, other = instructblip()
    module = hf.models.instructblipvideo.modeling_instructblipvideo
    config = module.InstructBlipVideoQFormerConfig(**TEXT, encoder_hidden_size=80)
    return module.InstructBlipVideoQFormerModel(config), inputs, other


def _captions(ends: list[int], total: int, eos: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, eos, (len(ends), total))
    for row, end in enumerate(ends):
        ids[row, end:] = eos
    other = ids.clone()
    for row, end in enumerate(ends):
        other[row, end + 1 :] = torch.randint(3, eos, (total - end - 1,))
    return ids, other


def clip() -> Any:
    text = {**TEXT, "eos_token_id": 98, "bos_token_id": 97, "pad_token_id": 98, "max_position_embeddings": 20}
    model = hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=32))
    ids, other = _captions([19, 4, 9], 20, 98)
    inputs = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 32, 32)}
    return model, inputs, {**inputs, "input_ids": other}


def clip_text_masked() -> Any:
    text = {**TEXT, "eos_token_id": 98, "bos_token_id": 97, "pad_token_id": 1, "max_position_embeddings": 20}
    model = hf.CLIPTextModel(hf.CLIPTextConfig(**text))
    ids, other = _captions([19, 4, 9], 20, 98)
    mask = lengths_mask([20, 5, 10], 20)
    inputs = {"input_ids": ids, "attention_mask": mask}
    return model, inputs, {**inputs, "input_ids": other}


def siglip() -> Any:
    text = {**TEXT, "max_position_embeddings": 20, "pad_token_id": 1}
    model = hf.SiglipModel(hf.SiglipConfig(text_config=text, vision_config=VISION))
    mask = lengths_mask([20, 5, 9], 20).flip(1)  # the last token is pooled: padding on the left
    ids = torch.randint(3, 90, (3, 20))
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(2, 3, 32, 32)}
    return model, inputs, {**inputs, "input_ids": torch.where(mask.bool(), ids, 2)}


def blip_itm() -> Any:
    text = {**TEXT, "encoder_hidden_size": 64, "max_position_embeddings": 32, "is_decoder": True}
    model = hf.models.blip.modeling_blip_text.BlipTextModel(hf.BlipTextConfig(**text), add_pooling_layer=False)
    mask, seen = lengths_mask([9, 4, 6, 2], 9), lengths_mask([17, 17, 17, 17], 17)
    ids = torch.randint(3, 90, (4, 9))
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "encoder_hidden_states": torch.randn(1, 17, 64).repeat(4, 1, 1),
        "encoder_attention_mask": seen,
    }
    return model, inputs, {**inputs, "input_ids": torch.where(mask.bool(), ids, 2)}


def blip_two_images() -> Any:
    model, inputs, _ = blip_itm()
    features = torch.randn(4, 17, 64)
    features[2] = features[1]
    inputs = {**inputs, "encoder_hidden_states": features, "encoder_attention_mask": lengths_mask([17] * 4, 17)}
    return model, inputs, {**inputs, "input_ids": torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], 2)}


def blip_masked_features() -> Any:
    """transformers ignores the mask of a BLIP text model's features; so must the adapters."""
    model, inputs, other = blip_two_images()
    mask = {"encoder_attention_mask": lengths_mask([17, 5, 5, 11], 17)}
    return model, {**inputs, **mask}, {**other, **mask}


def _tiles(model: nn.Module, seen: Tensor, tokens: int) -> dict[str, Tensor]:
    prepare = hf.models.mllama.modeling_mllama._prepare_cross_attention_mask
    mask, rows = prepare(seen, num_vision_tokens=tokens, dtype=torch.float32)
    return {"cross_attention_mask": mask, "full_text_row_masked_out_mask": rows}


class MllamaLayer(nn.Module):
    """One cross-attention layer of Mllama, called as its decoder calls it."""

    def __init__(self) -> None:
        super().__init__()
        config = hf.models.mllama.configuration_mllama.MllamaTextConfig(
            hidden_size=64,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_hidden_layers=2,
            intermediate_size=96,
            vocab_size=99,
            cross_attention_layers=[1],
            pad_token_id=0,
        )
        self.model = hf.models.mllama.modeling_mllama.MllamaTextModel(config)
        with torch.no_grad():
            layer = self.model.layers[1]
            layer.cross_attn_attn_gate.fill_(0.5)
            layer.cross_attn_mlp_gate.fill_(0.5)

    def forward(self, hidden: Tensor, states: Tensor, cross_attention_mask: Tensor, **rows: Tensor) -> Tensor:
        return self.model.layers[1](
            hidden,
            cross_attention_states=states,
            cross_attention_mask=cross_attention_mask,
            attention_mask=None,
            **rows,
        )


def mllama() -> Any:
    model = MllamaLayer()
    seen = torch.zeros(2, 6, 1, 4)
    seen[0, :, :, :2] = 1
    seen[1, :, :, :1] = 1
    inputs = {"hidden": torch.randn(2, 6, 64), "states": torch.randn(2, 36, 64), **_tiles(model, seen, 9)}
    visible = seen[:, 0, 0].repeat_interleave(9, 1)
    return model, inputs, {**inputs, "states": spoil(inputs["states"], visible, float("nan"))}


def mllama_imageless_rows() -> Any:
    model = MllamaLayer()
    seen = torch.zeros(2, 6, 2, 4)
    seen[0, 2:, 0, :2] = 1  # rows 0 and 1 see no image: transformers shows them everything
    seen[1, :, 0, :1] = 1
    seen[1, 3:, 1, :3] = 1
    inputs = {"hidden": torch.randn(2, 6, 64), "states": torch.randn(2, 72, 64), **_tiles(model, seen, 9)}
    visible = torch.cat([torch.ones(1, 72), seen[1:].any(1).flatten(1).float().repeat_interleave(9, 1)])
    return model, inputs, {**inputs, "states": spoil(inputs["states"], visible, float("nan"))}


def idefics(resampler: bool = True) -> Any:
    config = hf.IdeficsConfig(
        **TEXT,
        cross_layer_interval=1,
        use_resampler=resampler,
        alpha_initializer="ones",
        additional_vocab_size=0,
        pad_token_id=0,
        tie_word_embeddings=False,
        qk_layer_norms=True,
        vision_config={
            "embed_dim": 48,
            "image_size": 32,
            "patch_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "intermediate_size": 64,
        },
        perceiver_config={
            "resampler_n_latents": 5,
            "resampler_depth": 1,
            "resampler_n_heads": 4,
            "resampler_head_dim": 12,
            "use_resampler": resampler,
        },
    )
    model = hf.IdeficsForVisionText2Text(config)
    images = torch.randn(2, 3, 3, 32, 32)
    seen = torch.zeros(2, 7, 3, dtype=torch.long)
    seen[0, 2:5, 0] = 1
    seen[0, 5:, 1] = 1  # rows 0 and 1 of the first text see no image, no row sees its third
    seen[1, :, 0] = 1
    inputs = {
        "input_ids": torch.randint(3, 90, (2, 7)),
        "attention_mask": torch.ones(2, 7, dtype=torch.long),
        "pixel_values": images,
        "image_attention_mask": seen,
    }
    other = images.clone()
    other[0, 2] = 30.0
    other[1, 1:] = 30.0
    return model, inputs, {**inputs, "pixel_values": other}


def idefics2_resampler() -> Any:
    config = hf.models.idefics2.configuration_idefics2.Idefics2PerceiverConfig(
        hidden_size=64,
        resampler_n_latents=6,
        resampler_depth=2,
        resampler_n_heads=4,
        resampler_head_dim=16,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
    )
    model = hf.models.idefics2.modeling_idefics2.Idefics2PerceiverResampler(config)
    context, mask = torch.randn(3, 30, 64), lengths_mask([30, 4, 19], 30)
    inputs = {"context": context, "attention_mask": mask}
    return model, inputs, {**inputs, "context": spoil(context, mask)}


def whisper() -> Any:
    config = hf.WhisperConfig(
        vocab_size=99,
        d_model=64,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        num_mel_bins=8,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        max_source_positions=40,
        max_target_positions=30,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
    )
    model = hf.WhisperForConditionalGeneration(config)
    inputs = {"input_features": torch.randn(3, 8, 80), "decoder_input_ids": torch.randint(3, 90, (3, 7))}
    return model, inputs, inputs


def t5() -> Any:
    config = hf.T5Config(
        vocab_size=99, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, pad_token_id=0, decoder_start_token_id=0
    )
    model = hf.T5ForConditionalGeneration(config)
    mask, ids = lengths_mask([12, 5, 8], 12), torch.randint(3, 90, (3, 12))
    inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": torch.randint(3, 90, (3, 7))}
    return model, inputs, {**inputs, "input_ids": torch.where(mask.bool(), ids, 2)}


def perceiver() -> Any:
    config = hf.PerceiverConfig(
        num_latents=6,
        d_latents=32,
        d_model=24,
        num_blocks=1,
        num_self_attends_per_block=1,
        num_self_attention_heads=2,
        num_cross_attention_heads=2,
    )
    model = hf.PerceiverModel(config)
    mask, tokens = lengths_mask([25, 4, 14], 25), torch.randn(3, 25, 24)
    inputs = {"inputs": tokens, "attention_mask": mask}
    return model, inputs, {**inputs, "inputs": spoil(tokens, mask, 30.0)}


def vilt() -> Any:
    model = hf.ViltModel(hf.ViltConfig(**TEXT, image_size=32, patch_size=8, max_position_embeddings=20))
    mask, ids = lengths_mask([9, 4, 6], 9), torch.randint(3, 90, (3, 9))
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.randn(3, 3, 32, 32),
        "token_type_ids": torch.zeros_like(ids),
    }
    return model, inputs, {**inputs, "input_ids": torch.where(mask.bool(), ids, 2)}


def flava() -> Any:
    text = hf.FlavaTextConfig(**TEXT, max_position_embeddings=20)
    model = hf.FlavaTextModel(text)
    mask, ids = lengths_mask([9, 4, 6], 9), torch.randint(3, 90, (3, 9))
    inputs = {"input_ids": ids, "attention_mask": mask}
    return model, inputs, {**inputs, "input_ids": torch.where(mask.bool(), ids, 2)}


def bert() -> Any:
    """ALBEF's fusion encoder is a BERT whose upper layers read image features."""
    config = hf.BertConfig(**TEXT, is_decoder=True, add_cross_attention=True, max_position_embeddings=20)
    model = hf.BertModel(config)
    mask, seen = lengths_mask([9, 4, 6], 9), lengths_mask([11, 3, 7], 11)
    ids, features = torch.randint(3, 90, (3, 9)), torch.randn(3, 11, 64)
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "encoder_hidden_states": features,
        "encoder_attention_mask": seen,
        "use_cache": False,
    }
    other = {
        **inputs,
        "input_ids": torch.where(mask.bool(), ids, 2),
        "encoder_hidden_states": spoil(features, seen, 30.0),
    }
    return model, inputs, other


def llava() -> Any:
    text = {**TEXT, "num_key_value_heads": 2, "model_type": "llama"}
    config = hf.LlavaConfig(
        text_config=text,
        vision_config={**VISION, "model_type": "clip_vision_model"},
        image_token_index=98,
        vision_feature_layer=-1,
    )
    model = hf.LlavaForConditionalGeneration(config)
    ids = torch.randint(3, 90, (2, 24))
    ids[:, 2:18] = 98
    mask = lengths_mask([24, 20], 24)
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(2, 3, 32, 32)}
    other = torch.where(mask.bool(), ids, 2)
    return model, inputs, {**inputs, "input_ids": other}


class TorchDecoder(nn.Module):
    """torch.nn's decoder layer and encoder, with a boolean or an additive padding mask."""

    def __init__(self, additive: bool) -> None:
        super().__init__()
        self.additive = additive
        self.encoder = nn.TransformerEncoderLayer(64, 4, 96, dropout=0.0, batch_first=True)
        self.decoder = nn.TransformerDecoderLayer(64, 4, 96, dropout=0.0, batch_first=True)

    def forward(self, target: Tensor, memory: Tensor, hidden: Tensor) -> Tensor:
        length = target.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).triu(1)
        if self.additive:
            hidden = torch.where(hidden, -torch.inf, 0.0).to(memory.dtype)
            causal = torch.where(causal, -torch.inf, 0.0).to(memory.dtype)
        memory = self.encoder(memory, src_key_padding_mask=hidden)
        return self.decoder(target, memory, tgt_mask=causal, memory_key_padding_mask=hidden)


def torch_decoder(additive: bool = False) -> Any:
    mask, memory = lengths_mask([11, 3, 7], 11), torch.randn(3, 11, 64)
    inputs = {"target": torch.randn(3, 6, 64), "memory": memory, "hidden": mask == 0}
    return TorchDecoder(additive), inputs, {**inputs, "memory": spoil(memory, mask, 30.0)}


def _real(mask_of: Callable[[], Any], axis: str = "last_hidden_state") -> Callable[[Any], list[Tensor]]:
    return lambda out: [getattr(out, axis)]


def _queries(out: Any) -> list[Tensor]:
    return [out.last_hidden_state[:, :8]]


def _texts(lengths: list[int]) -> Callable[[Any], list[Tensor]]:
    return lambda out: [torch.cat([row[:n] for row, n in zip(out.last_hidden_state, lengths, strict=True)])]


ENTRIES = [
    Entry("blip2-qformer", qformer, _last, ("QFormerEncoder", "QFormerAttention", "AttentionHook")),
    Entry("instructblip-qformer", instructblip, _queries, ("QFormerEncoder", "QFormerAttention", "AttentionHook")),
    Entry("instructblipvideo-qformer", instructblipvideo, _queries, ("QFormerEncoder", "QFormerAttention")),
    Entry("clip", clip, lambda o: [o.logits_per_image, o.text_embeds, o.image_embeds], ("ClipText", "ClipEncoder")),
    Entry(
        "clip-cut",
        clip,
        lambda o: [o.logits_per_image, o.text_embeds, o.image_embeds],
        ("ClipModel", "ClipText", "ClipEncoder"),
        exact=False,
    ),
    Entry("clip-text-masked", clip_text_masked, _texts([20, 5, 10]), ("ClipText",)),
    Entry(
        "siglip",
        siglip,
        lambda o: [o.logits_per_image, o.text_embeds, o.image_embeds],
        ("AttentionHook", "SiglipPoolingHead", "MultiheadAttention"),
    ),
    Entry("blip-itm", blip_itm, _texts([9, 4, 6, 2]), ("BlipTextEncoder", "BlipTextAttention")),
    Entry("blip-masked-features", blip_masked_features, _texts([9, 4, 6, 2]), ("BlipTextAttention",)),
    Entry("blip-two-images", blip_two_images, _texts([9, 4, 6, 2]), ("BlipTextEncoder", "BlipTextAttention")),
    Entry("mllama", mllama, lambda o: [o], ("MllamaCrossAttention",)),
    Entry("mllama-imageless-rows", mllama_imageless_rows, lambda o: [o], ("MllamaCrossAttention",)),
    Entry("idefics", idefics, lambda o: [o.logits], ("IdeficsCrossLayer", "IdeficsCrossAttention", "IdeficsResampler")),
    Entry("idefics2-resampler", idefics2_resampler, lambda o: [o], ("Idefics2Resampler",)),
    Entry("whisper", whisper, lambda o: [o.logits], ("AttentionHook",)),
    Entry("t5", t5, lambda o: [o.logits], ("AttentionHook",)),
    Entry("perceiver", perceiver, _last, ("PerceiverAttention",)),
    Entry("vilt", vilt, lambda o: [o.pooler_output], ("SelfAttention",)),
    Entry("flava-text", flava, lambda o: [o.pooler_output], ("SelfAttention",)),
    Entry("albef-style-bert", bert, _texts([9, 4, 6]), ("AttentionHook",)),
    Entry("llava", llava, lambda o: [torch.cat([o.logits[0, :24], o.logits[1, :20]])], ("AttentionHook",)),
    Entry("torch-decoder", torch_decoder, lambda o: [o], ("MultiheadAttention", "TransformerEncoderLayer")),
    Entry("torch-decoder-additive", lambda: torch_decoder(True), lambda o: [o], ("MultiheadAttention",)),
]
