"""Modules: parameters and one call to the ops; weights and outputs are those of the modules they replace."""

from fastxattn.nn.multihead import MultiheadCrossAttention
from fastxattn.nn.projected import ContextKV

__all__ = ["ContextKV", "MultiheadCrossAttention"]
