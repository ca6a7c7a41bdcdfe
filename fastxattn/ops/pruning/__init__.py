"""Image-token pruning: score, budget, select, reduce, restore, over packed tokens."""

from fastxattn.ops.pruning.api import prune_tokens, select_tokens
from fastxattn.ops.pruning.budget import Budget
from fastxattn.ops.pruning.merge import best_match, bipartite, contextual, leftover, nearest
from fastxattn.ops.pruning.rows import gather_rows, merge_rows
from fastxattn.ops.pruning.scores import frame_change, frame_counts, probe_scores, received_scores, text_relevance
from fastxattn.ops.pruning.selection import Selection
from fastxattn.ops.pruning.strategies import STRATEGIES, Strategy, register_strategy

__all__ = [
    "STRATEGIES",
    "Budget",
    "Selection",
    "Strategy",
    "best_match",
    "bipartite",
    "contextual",
    "frame_change",
    "frame_counts",
    "gather_rows",
    "leftover",
    "merge_rows",
    "nearest",
    "probe_scores",
    "prune_tokens",
    "received_scores",
    "register_strategy",
    "select_tokens",
    "text_relevance",
]
