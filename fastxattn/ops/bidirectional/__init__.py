"""Bidirectional co-attention: two token sets read each other from the same scores."""

from fastxattn.ops.bidirectional.api import bidirectional_attention

__all__ = ["bidirectional_attention"]
