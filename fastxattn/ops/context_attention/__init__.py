"""Few queries over raw features, with the key and value projections absorbed."""

from fastxattn.ops.context_attention import schema as schema
from fastxattn.ops.context_attention.api import context_attention, explain_context_attention

__all__ = ["context_attention", "explain_context_attention"]
