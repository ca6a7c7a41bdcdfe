"""fastxattn: fast, exact cross-modal attention, token pruning and contrastive losses for PyTorch."""

from fastxattn.ops.attention import cross_attention, ranges, varlen_cross_attention
from fastxattn.ops.bidirectional import bidirectional_attention
from fastxattn.ops.importance import key_importance
from fastxattn.packed import PackedTokens
from fastxattn.runtime.backend import explain_call as explain

__version__ = "0.1.0"
__all__ = [
    "PackedTokens",
    "__version__",
    "bidirectional_attention",
    "cross_attention",
    "explain",
    "key_importance",
    "ranges",
    "varlen_cross_attention",
]
