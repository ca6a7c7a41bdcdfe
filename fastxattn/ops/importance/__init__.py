"""Key importance: how much attention every key receives, without the attention map."""

from fastxattn.ops.importance.api import key_importance

__all__ = ["key_importance"]
