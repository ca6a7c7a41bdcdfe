"""fastxattn: fast, exact cross-modal attention, token pruning and contrastive losses for PyTorch."""

from fastxattn.ops.attention import cross_attention, ranges, varlen_cross_attention
from fastxattn.packed import PackedTokens
from fastxattn.runtime.backend import explain_call as explain

__version__ = "0.1.0"
__all__ = ["PackedTokens", "__version__", "cross_attention", "explain", "ranges", "varlen_cross_attention"]
