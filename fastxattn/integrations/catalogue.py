"""The classes that ``accelerate`` knows, by name: nothing is imported before a model of that class is met."""

from __future__ import annotations

from fastxattn.integrations.swap import register_adapter

# Families whose attention goes through transformers' interface, each with a test.
HOOKED = """
    altclip aria bart bert blip_2 bridgetower chinese_clip clap clip clipseg conditional_detr detr florence2 gemma
    gemma2 gemma3 git idefics idefics2 idefics3 instructblip instructblipvideo internvl kosmos2 llama llava metaclip_2
    mistral mllama moonshine mt5 opt owlvit paligemma pix2struct qwen2 qwen2_5_vl qwen2_vl qwen3 qwen3_vl qwen3_vl_moe
    sam2 siglip siglip2 smolvlm t5 voxtral whisper x_clip
""".split()  # noqa: SIM905

EAGER = frozenset({"bridgetower", "clap", "gemma2"})
"""Families for which transformers has no sdpa, whose attention nevertheless goes through its interface alone: rows
without keys average there, as eager's do."""

_MM = "mm_grounding_dino.modeling_mm_grounding_dino.MMGroundingDino"
_VIDEO = "instructblipvideo.modeling_instructblipvideo.InstructBlipVideo"

# Class of transformers.models -> adapter in fastxattn.integrations.transformers.
CLASSES = {
    "blip_2.modeling_blip_2.Blip2QFormerEncoder": "qformer:QFormerEncoder",
    "blip_2.modeling_blip_2.Blip2QFormerMultiHeadAttention": "qformer:QFormerAttention",
    "instructblip.modeling_instructblip.InstructBlipQFormerEncoder": "qformer:QFormerEncoder",
    "instructblip.modeling_instructblip.InstructBlipQFormerMultiHeadAttention": "qformer:QFormerAttention",
    f"{_VIDEO}QFormerEncoder": "qformer:QFormerEncoder",
    f"{_VIDEO}QFormerMultiHeadAttention": "qformer:QFormerAttention",
    "clip.modeling_clip.CLIPModel": "clip:ClipModel",
    "clip.modeling_clip.CLIPTextModel": "clip:ClipText",
    "clip.modeling_clip.CLIPEncoder": "clip:ClipEncoder",
    "blip.modeling_blip_text.BlipTextEncoder": "blip:BlipTextEncoder",
    "blip.modeling_blip_text.BlipTextSelfAttention": "blip:BlipTextAttention",
    "blip.modeling_blip.BlipAttention": "blip:BlipVisionAttention",
    "mllama.modeling_mllama.MllamaTextCrossAttention": "mllama:MllamaCrossAttention",
    "idefics.modeling_idefics.IdeficsGatedCrossAttentionLayer": "idefics:IdeficsCrossLayer",
    "idefics.modeling_idefics.IdeficsAttention": "idefics:IdeficsCrossAttention",
    "idefics.perceiver.IdeficsPerceiverAttention": "perceiver:IdeficsResampler",
    "idefics2.modeling_idefics2.Idefics2PerceiverAttention": "perceiver:Idefics2Resampler",
    "perceiver.modeling_perceiver.PerceiverSelfAttention": "perceiver:PerceiverAttention",
    "lxmert.modeling_lxmert.LxmertAttention": "bert_like:LxmertAttention",
    "flava.modeling_flava.FlavaSelfAttention": "bert_like:SelfAttention",
    "vilt.modeling_vilt.ViltSelfAttention": "bert_like:SelfAttention",
    "table_transformer.modeling_table_transformer.TableTransformerAttention": "detr_like:TableTransformerAttention",
    "mask2former.modeling_mask2former.Mask2FormerMaskedAttentionDecoderLayer": "detr_like:Mask2FormerLayer",
    "mask2former.modeling_mask2former.Mask2FormerAttention": "detr_like:Mask2FormerAttention",
    "siglip2.modeling_siglip2.Siglip2MultiheadAttentionPoolingHead": "siglip2:Siglip2PoolingHead",
    "qwen2_vl.modeling_qwen2_vl.VisionAttention": "vision_varlen:VisionAttention",
    "qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLVisionAttention": "vision_varlen:VisionAttention",
    "qwen3_vl.modeling_qwen3_vl.Qwen3VLVisionAttention": "vision_varlen:VisionAttention",
    "qwen3_vl_moe.modeling_qwen3_vl_moe.Qwen3VLMoeVisionAttention": "vision_varlen:VisionAttention",
    "grounding_dino.modeling_grounding_dino.GroundingDinoEncoder": "capturing:MapsArgument",
    "grounding_dino.modeling_grounding_dino.GroundingDinoBiMultiHeadAttention": "grounding_dino:Fusion",
    "grounding_dino.modeling_grounding_dino.GroundingDinoDecoder": "capturing:MapsArgument",
    "grounding_dino.modeling_grounding_dino.GroundingDinoMultiheadAttention": "grounding_dino:MultiheadAttention",
    f"{_MM}Encoder": "capturing:MapsArgument",
    f"{_MM}Decoder": "capturing:MapsArgument",
    f"{_MM}BiMultiHeadAttention": "grounding_dino:Fusion",
    f"{_MM}MultiheadAttention": "grounding_dino:MultiheadAttention",
    "pix2struct.modeling_pix2struct.Pix2StructVisionEncoder": "capturing:MapsArgument",
    "bridgetower.modeling_bridgetower.BridgeTowerBertCrossLayer": "bridgetower:CrossLayer",
    "bridgetower.modeling_bridgetower.BridgeTowerCrossAttention": "bridgetower:CrossAttention",
    "groupvit.modeling_groupvit.GroupViTAttention": "bert_like:GroupViTAttention",
}

_HERE = "fastxattn.integrations"
for _family in HOOKED:
    register_adapter(f"transformers.models.{_family}.modeling_{_family}", f"{_HERE}.transformers.hook:AttentionHook")
for _name, _adapter in CLASSES.items():
    register_adapter(f"transformers.models.{_name}", f"{_HERE}.transformers.{_adapter}")
register_adapter("torch.nn.modules.activation.MultiheadAttention", f"{_HERE}.torch_nn:MultiheadAttention")
register_adapter("torch.nn.modules.transformer.TransformerEncoderLayer", f"{_HERE}.torch_nn:TransformerEncoderLayer")
register_adapter(
    "transformers.models.siglip.modeling_siglip.SiglipMultiheadAttentionPoolingHead",
    f"{_HERE}.torch_nn:SiglipPoolingHead",
)
for _name in ("ClipLoss", "CoCaLoss", "SigLipLoss"):
    register_adapter(f"open_clip.loss.{_name}", f"{_HERE}.open_clip:{_name}")
for _name in ("open_flamingo.src.helpers", "flamingo_pytorch.flamingo_pytorch"):
    register_adapter(f"{_name}.MaskedCrossAttention", f"{_HERE}.flamingo:MaskedCrossAttention")
for _name in ("MultiHeadAttentionWithCache", "MultiHeadSelfAttention"):
    register_adapter(f"torchmultimodal.modules.layers.multi_head_attention.{_name}", f"{_HERE}.torchmultimodal:{_name}")
