"""Retrieval: fused similarity and top-k, without the score matrix."""

from fastxattn.ops.retrieval.api import quantize_int8, recall_at_k, topk_similarity

__all__ = ["quantize_int8", "recall_at_k", "topk_similarity"]
