"""Attention of few queries over raw features, with the key and value projections absorbed."""

from fastxattn.ops.absorbed_attention.api import absorbed_attention

__all__ = ["absorbed_attention"]
