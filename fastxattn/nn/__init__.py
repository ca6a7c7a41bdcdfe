"""Modules: parameters and one call to the ops; weights and outputs are those of the modules they replace."""

from fastxattn.nn.co_attention import CoAttention, SharedCrossAttention
from fastxattn.nn.gate import ModalityGate
from fastxattn.nn.gated import GatedCrossAttentionBlock
from fastxattn.nn.losses import BLIP2ITCLoss, FILIPLoss, InfoNCELoss, MultiTaskLoss, SigmoidLoss
from fastxattn.nn.multihead import MultiheadCrossAttention
from fastxattn.nn.perceiver import PerceiverResampler
from fastxattn.nn.pooler import AttentionalPooler, SiglipPooler
from fastxattn.nn.projected import ContextKV
from fastxattn.nn.projector import VisualProjector, pixel_shuffle
from fastxattn.nn.pruner import TokenPruner
from fastxattn.nn.qformer import QFormer, QFormerLayer
from fastxattn.nn.temporal import TemporalCrossAttention

__all__ = [
    "AttentionalPooler",
    "BLIP2ITCLoss",
    "CoAttention",
    "ContextKV",
    "FILIPLoss",
    "GatedCrossAttentionBlock",
    "InfoNCELoss",
    "ModalityGate",
    "MultiTaskLoss",
    "MultiheadCrossAttention",
    "PerceiverResampler",
    "QFormer",
    "QFormerLayer",
    "SharedCrossAttention",
    "SiglipPooler",
    "SigmoidLoss",
    "TemporalCrossAttention",
    "TokenPruner",
    "VisualProjector",
    "pixel_shuffle",
]
