"""Decoders of the models table, one token or one layer at a time: Mllama, IDEFICS and Whisper at real sizes."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn


class MllamaLayer(nn.Module):
    """One cross-attention decoder layer of Llama 3.2 11B Vision (width 4096), called as the decoder calls it."""

    def __init__(self) -> None:
        super().__init__()
        config = hf.models.mllama.configuration_mllama.MllamaTextConfig(
            num_hidden_layers=1,
            cross_attention_layers=[0],
            vocab_size=8,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        self.text = hf.models.mllama.modeling_mllama.MllamaTextModel(config)
        with torch.no_grad():  # closed at first, and then nothing that attention does would be seen
            self.text.layers[0].cross_attn_attn_gate.fill_(0.5)
            self.text.layers[0].cross_attn_mlp_gate.fill_(0.5)

    def forward(self, hidden: Tensor, states: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
        return self.text.layers[0](  # type: ignore[no-any-return]
            hidden,
            cross_attention_states=states,
            cross_attention_mask=mask,
            attention_mask=None,
            full_text_row_masked_out_mask=rows,
        )


def mllama(tiles: int, text: int = 32) -> Any:
    seen = torch.zeros(1, text, 1, 4)
    seen[..., :tiles] = 1
    prepare = hf.models.mllama.modeling_mllama._prepare_cross_attention_mask
    mask, rows = prepare(seen, num_vision_tokens=1601, dtype=torch.float32)
    return MllamaLayer(), {
        "hidden": torch.randn(1, text, 4096),
        "states": torch.randn(1, 6404, 4096),
        "mask": mask,
        "rows": rows,
    }


class IdeficsStep(nn.Module):
    """One generated token of IDEFICS 9B with 5 images: 4 of its 32 layers, one of them with cross-attention."""

    def __init__(self) -> None:
        super().__init__()
        config = hf.IdeficsConfig(
            num_hidden_layers=4,
            vocab_size=4000,
            cross_layer_interval=4,
            use_resampler=True,
            vision_config={"num_hidden_layers": 1, "embed_dim": 1280},
            alpha_initializer="ones",
            qk_layer_norms=True,
        )
        self.model = hf.IdeficsForVisionText2Text(config)
        self.past: Any = None

    def forward(self, ids: Tensor, embeddings: Tensor, seen: Tensor) -> Tensor:
        if self.past is None or self.past[0] != str(embeddings.dtype):
            with torch.no_grad():
                first = self.model(
                    input_ids=ids.expand(-1, 64),
                    perceiver_embeddings=embeddings,
                    use_cache=True,
                    image_attention_mask=seen.expand(-1, 64, -1),
                    attention_mask=torch.ones(1, 64, dtype=torch.long),
                )
            self.past = (str(embeddings.dtype), first.past_key_values)
        cache = self.past[1]
        out = self.model(
            input_ids=ids,
            perceiver_embeddings=embeddings,
            image_attention_mask=seen,
            use_cache=True,
            past_key_values=cache,
            attention_mask=torch.ones(1, 65, dtype=torch.long),
        )
        cache.crop(-1)
        return out.logits  # type: ignore[no-any-return]


def idefics() -> Any:
    return IdeficsStep(), {
        "ids": torch.full((1, 1), 5),
        "embeddings": torch.randn(1, 5, 64, 1280),
        "seen": torch.ones(1, 1, 5, dtype=torch.long),
    }


class WhisperStep(nn.Module):
    """One token of Whisper large-v3's decoder (4 of its 32 layers), batch 4, over 1500 cached audio positions."""

    def __init__(self, cached: bool = True) -> None:
        super().__init__()
        config = hf.WhisperConfig(
            d_model=1280,
            decoder_layers=4,
            encoder_layers=1,
            decoder_attention_heads=20,
            encoder_attention_heads=20,
            decoder_ffn_dim=5120,
            encoder_ffn_dim=5120,
        )
        self.decoder = hf.models.whisper.modeling_whisper.WhisperDecoder(config)
        self.cached, self.past = cached, {}  # type: ignore[var-annotated]

    def forward(self, ids: Tensor, audio: Tensor) -> Tensor:
        if not self.cached:
            return self.decoder(ids[:, -1:], encoder_hidden_states=audio, use_cache=False).last_hidden_state  # type: ignore
        name = str(audio.dtype)
        if name not in self.past:
            cache = hf.EncoderDecoderCache(hf.DynamicCache(), hf.DynamicCache())
            self.decoder(ids[:, :-1], encoder_hidden_states=audio, past_key_values=cache, use_cache=True)
            self.past[name] = cache
        cache = self.past[name]
        out = self.decoder(ids[:, -1:], encoder_hidden_states=audio, past_key_values=cache, use_cache=True)
        cache.self_attention_cache.crop(-1)
        return out.last_hidden_state  # type: ignore[no-any-return]


class WhisperCross(nn.Module):
    """The cross-attention module of one decoder layer over its cached audio, one token."""

    def __init__(self) -> None:
        super().__init__()
        self.step = WhisperStep()

    def forward(self, ids: Tensor, audio: Tensor, states: Tensor) -> Tensor:
        if str(audio.dtype) not in self.step.past:
            self.step(ids, audio)
        cache = self.step.past[str(audio.dtype)]
        return self.step.decoder.layers[0].encoder_attn(states, key_value_states=audio, past_key_values=cache)[0]  # type: ignore


def whisper_cross() -> Any:
    return WhisperCross(), {
        "ids": torch.randint(3, 900, (4, 33)),
        "audio": torch.randn(4, 1500, 1280),
        "states": torch.randn(4, 1, 1280),
    }


def whisper(cached: bool) -> Any:
    return WhisperStep(cached), {"ids": torch.randint(3, 900, (4, 33)), "audio": torch.randn(4, 1500, 1280)}
