"""Cross-attention over variable-length token sets."""

from fastxattn.ops.attention.api import cross_attention, varlen_cross_attention

__all__ = ["cross_attention", "varlen_cross_attention"]
