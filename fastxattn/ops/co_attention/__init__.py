"""Co-attention: two token sets read each other from the same scores."""

from fastxattn.ops.co_attention.api import co_attention

__all__ = ["co_attention"]
