"""Few queries over raw features, with the key and value projections absorbed."""

from fastxattn.ops.absorbed_attention import schema as schema
from fastxattn.ops.absorbed_attention.api import absorbed_attention, explain_absorbed_attention

__all__ = ["absorbed_attention", "explain_absorbed_attention"]
