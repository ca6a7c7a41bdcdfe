"""Whole models to export: classes of transformers, plain or accelerated, at real sizes or small ones for tests.

Every builder takes ``small`` and gives a module with random weights and a function that makes inputs for a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from transformers.models.whisper.modeling_whisper import WhisperDecoder

import fastxattn
from fastxattn.packed import PackedTokens

Inputs = Callable[[int], tuple[Any, ...]]


class QFormer(nn.Module):
    """BLIP-2's Q-Former: learned queries read padded image features."""

    def __init__(self, small: bool) -> None:
        super().__init__()
        sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "encoder_hidden_size": 96}
        self.config = hf.Blip2QFormerConfig(**({**sizes, "num_hidden_layers": 1} if small else {}))
        self.model = hf.Blip2QFormerModel(self.config)
        self.queries = nn.Parameter(torch.randn(1, 8 if small else 32, self.config.hidden_size))

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        queries = self.queries.expand(image.shape[0], -1, -1)
        features = {"encoder_hidden_states": image, "encoder_attention_mask": mask[:, None, None, :]}
        return self.model(query_embeds=queries, **features).last_hidden_state  # type: ignore[no-any-return]


def ragged_mask(batch: int, low: int, high: int) -> Tensor:
    """(batch, high) with lengths spread evenly from high down to low."""
    lengths = torch.linspace(high, low, max(batch, 2))[:batch].long()
    return torch.arange(high) < lengths[:, None]


def qformer(small: bool) -> tuple[nn.Module, Inputs]:
    module = QFormer(small)
    low, high = (4, 11) if small else (64, 1024)

    def inputs(batch: int) -> tuple[Tensor, Tensor]:
        return torch.randn(batch, high, module.config.encoder_hidden_size), ragged_mask(batch, low, high)

    return module, inputs


class Pair(nn.Module):
    """Text and image embeddings of a CLIP-like model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> dict[str, Tensor]:
        out = self.model(input_ids=input_ids, pixel_values=pixel_values)
        return {"text": out.text_embeds, "image": out.image_embeds}


def _tower(small: bool) -> dict[str, int]:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1}
    return sizes if small else {}


def _pair(small: bool, config: type, model: type, length: int, words: int) -> tuple[nn.Module, Inputs]:
    end, length = (98, 12) if small else (words - 1, length)
    text = {**_tower(small), "eos_token_id": end, "bos_token_id": 0, "pad_token_id": 1}
    if small:
        text |= {"vocab_size": 99, "max_position_embeddings": length}
    vision = {**_tower(small), **({"image_size": 16, "patch_size": 8} if small else {})}
    module = Pair(model(config(text_config=text, vision_config=vision)))

    def inputs(batch: int) -> tuple[Tensor, Tensor]:
        ids = torch.randint(3, end, (batch, length))
        ends = torch.randint(length // 3, length, (batch,))
        ids = torch.where(torch.arange(length) < ends[:, None], ids, end)
        side = 16 if small else 224
        return ids, torch.randn(batch, 3, side, side)

    return module, inputs


def clip(small: bool) -> tuple[nn.Module, Inputs]:
    """ViT-B/32, 151 M parameters."""
    return _pair(small, hf.CLIPConfig, hf.CLIPModel, 77, 49408)


def siglip(small: bool) -> tuple[nn.Module, Inputs]:
    """Base, 16-pixel patches, 203 M parameters."""
    return _pair(small, hf.SiglipConfig, hf.SiglipModel, 64, 32000)


class ProjectAndPrune(nn.Module):
    """LLaVA's projector, and a pruner that keeps half of each image's tokens for the language model."""

    def __init__(self, small: bool) -> None:
        super().__init__()
        widths = (32, 64) if small else (1024, 4096)
        kinds = {"vision_config": "clip_vision_model", "text_config": "llama"}
        towers = {
            part: {"hidden_size": width, "num_attention_heads": 4, "model_type": kind}
            for width, (part, kind) in zip(widths, kinds.items(), strict=True)
        }
        config = hf.LlavaConfig(**towers)
        self.projector = LlavaMultiModalProjector(config)
        self.pruner = fastxattn.nn.TokenPruner(0.5, strategy="norm", protected=1)

    def forward(self, image: PackedTokens) -> dict[str, Tensor]:
        fewer, kept = self.pruner(PackedTokens(self.projector(image.values), image.cu_seqlens, image.max_seqlen))
        # Rows past the last offset are nobody's: their sum is 0.
        return {"sum": fewer.values.sum(0) / 8, "offsets": kept.cu_seqlens}


def llava(small: bool) -> tuple[nn.Module, Inputs]:
    module = ProjectAndPrune(small)

    def inputs(batch: int) -> tuple[PackedTokens]:
        lengths = [7 - i % 3 for i in range(batch)] if small else [576] * batch
        return (PackedTokens.from_list([torch.randn(n, 32 if small else 1024) for n in lengths]),)

    return module, inputs


class FlamingoBlock(nn.Module):
    """A gated cross-attention block of IDEFICS-1, Flamingo's: text reads the images before it."""

    def __init__(self, small: bool) -> None:
        super().__init__()
        width, vision = (64, 48) if small else (4096, 1280)
        config = hf.IdeficsConfig(
            hidden_size=width,
            intermediate_size=128 if small else 11008,
            vocab_size=32,
            num_hidden_layers=1,
            num_attention_heads=4 if small else 32,
            alpha_initializer="ones",
            cross_layer_interval=1,
            vision_config={"embed_dim": vision, "num_hidden_layers": 1, "num_attention_heads": 4},
            qk_layer_norms=True,
            additional_vocab_size=0,
        )
        # The attention implementation is a matter of the whole model, of which one layer is exported.
        self.model = hf.IdeficsModel(config)

    def forward(self, text: Tensor, image: Tensor, sees: Tensor) -> Tensor:
        """text (batch, Lt, width), image (batch, Li, vision width), sees (batch, Lt, Li) boolean."""
        mask = (~sees[:, None]).to(text.dtype) * torch.finfo(text.dtype).min
        gate = sees.any(-1).to(text.dtype)
        layer = self.model.gated_cross_attn_layers[0]
        out: Tensor = layer(text, None, image, image_attention_mask=mask, cross_attention_gate=gate)
        return out


def flamingo(small: bool) -> tuple[nn.Module, Inputs]:
    module = FlamingoBlock(small)
    words, latents, width, vision = (5, 6, 64, 48) if small else (64, 64, 4096, 1280)

    def inputs(batch: int) -> tuple[Tensor, Tensor, Tensor]:
        images, each = 3, latents // 3 if small else latents
        # Word i sees the image before it; the first words see none.
        last = torch.arange(words)[:, None] * (images + 1) // words - 1
        sees = (torch.arange(images * each)[None, :] // each == last).expand(batch, -1, -1).contiguous()
        return torch.randn(batch, words, width), torch.randn(batch, images * each, vision), sees

    return module, inputs


def perceiver(small: bool) -> tuple[nn.Module, Inputs]:
    """IDEFICS-1's resampler: 64 latents read 257 image features, 6 layers."""
    width, layers, heads, dim, latents = (32, 1, 4, 8, 5) if small else (1280, 6, 16, 96, 64)
    config = hf.IdeficsConfig(vision_config={"embed_dim": width})
    module = IdeficsPerceiverResampler(config, width, layers, heads, dim, latents)

    def inputs(batch: int) -> tuple[Tensor]:
        return (torch.randn(batch, 7 if small else 257, width),)

    return module, inputs


class WhisperStep(nn.Module):
    """One generated token of Whisper's decoder; what it caches comes in and goes out as tensors."""

    def __init__(self, small: bool) -> None:
        super().__init__()
        tiny = {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 64}
        tiny |= {"vocab_size": 99, "max_target_positions": 32, "pad_token_id": 0, "bos_token_id": 1}
        tiny |= {"eos_token_id": 2, "decoder_start_token_id": 1}
        base = {"d_model": 512, "decoder_layers": 6, "decoder_attention_heads": 8, "decoder_ffn_dim": 2048}
        self.config = hf.WhisperConfig(**(tiny if small else base))
        self.decoder = WhisperDecoder(self.config)

    def forward(self, token: Tensor, past: Tensor, audio: Tensor) -> dict[str, Tensor]:
        """token (batch, 1); past and audio (layers, 2, batch, heads, length, dim): keys and values.

        Returns the last hidden state and the new token's keys and values, (layers, 2, batch, heads, 1, dim).
        """
        own, cross = hf.DynamicCache(), hf.DynamicCache()
        for i in range(self.config.decoder_layers):
            own.update(past[i, 0], past[i, 1], i)
            cross.update(audio[i, 0], audio[i, 1], i)
        cache = hf.EncoderDecoderCache(own, cross)
        cache.is_updated = dict.fromkeys(range(self.config.decoder_layers), True)
        out = self.decoder(
            input_ids=token,
            encoder_hidden_states=audio[0, 0].transpose(1, 2).flatten(2),
            past_key_values=cache,
            use_cache=True,
            position_ids=torch.full_like(token, past.shape[-2]),
        )
        new = [torch.stack([x.keys[..., -1:, :], x.values[..., -1:, :]]) for x in own.layers]
        return {"hidden": out.last_hidden_state, "new": torch.stack(new)}


def whisper(small: bool) -> tuple[nn.Module, Inputs]:
    module = WhisperStep(small)
    layers, heads, dim = (1, 4, 8) if small else (6, 8, 64)

    def inputs(batch: int) -> tuple[Tensor, Tensor, Tensor]:
        past, frames = (2 + batch, 9) if small else (64, 1500)
        caches = (torch.randn(layers, 2, batch, heads, n, dim) for n in (past, frames))
        return torch.randint(3, 99, (batch, 1)), *caches

    return module, inputs


@dataclass(frozen=True)
class Model:
    """One model of the table."""

    name: str
    build: Callable[[bool], tuple[nn.Module, Inputs]]
    batch: int
    """Of the timed run."""
    dynamic: bool | dict[str, dict[int, Any]] = True
    """Open axes, where not all are."""
    plain: bool = True
    """Whether the module without ``accelerate`` computes the same, and can be compared with."""


AUTO = torch.export.Dim.AUTO
MODELS = (
    Model("BLIP-2 Q-Former", qformer, 4),
    Model("CLIP ViT-B/32", clip, 8),
    Model("SigLIP base", siglip, 4),
    Model("LLaVA projector and pruner", llava, 4, plain=False),
    Model("Flamingo block (IDEFICS 9B)", flamingo, 4),
    Model("Perceiver resampler (IDEFICS 9B)", perceiver, 4),
    Model(
        "Whisper base decoder step",
        whisper,
        8,
        dynamic={"token": {0: AUTO}, "past": {2: AUTO, 4: AUTO}, "audio": {2: AUTO, 4: AUTO}},
    ),
)


def build(model: Model, small: bool, accelerated: bool) -> tuple[nn.Module, Inputs]:
    """The module in eval mode, weights drawn from seed 0, and its inputs."""
    torch.manual_seed(0)
    module, inputs = model.build(small)
    module.eval()
    if accelerated:
        fastxattn.accelerate(module)
    return module, inputs
