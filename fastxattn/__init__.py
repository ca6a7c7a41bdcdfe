"""fastxattn: fast, exact cross-modal attention, token pruning and contrastive losses for PyTorch.

Everything here is loaded at first use, except what attention itself needs: importing costs little beyond torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import fastxattn.ranges as ranges
from fastxattn.ops.attention import cross_attention, varlen_cross_attention
from fastxattn.packed import PackedTokens
from fastxattn.runtime.backend import explain_call as explain

if TYPE_CHECKING:
    from fastxattn.integrations import accelerate, accelerated, register_adapter, restore, status
    from fastxattn.integrations.pruning import prune_model
    from fastxattn.ops.absorbed_attention import absorbed_attention
    from fastxattn.ops.co_attention import co_attention
    from fastxattn.ops.contrastive import (
        distillation_loss,
        infonce_loss,
        multi_positive_infonce_loss,
        sigmoid_loss,
    )
    from fastxattn.ops.importance import key_importance
    from fastxattn.ops.late_interaction import late_interaction_loss, maxsim
    from fastxattn.ops.pruning import Budget, Selection, prune_tokens, register_strategy, select_tokens
    from fastxattn.ops.retrieval import recall_at_k, topk_similarity

__version__ = "0.1.0"

_LAZY = {
    "fastxattn.integrations": ("accelerate", "accelerated", "register_adapter", "restore", "status"),
    "fastxattn.integrations.pruning": ("prune_model",),
    "fastxattn.ops.co_attention": ("co_attention",),
    "fastxattn.ops.absorbed_attention": ("absorbed_attention",),
    "fastxattn.ops.contrastive": (
        "distillation_loss",
        "infonce_loss",
        "multi_positive_infonce_loss",
        "sigmoid_loss",
    ),
    "fastxattn.ops.importance": ("key_importance",),
    "fastxattn.ops.late_interaction": ("late_interaction_loss", "maxsim"),
    "fastxattn.ops.retrieval": ("recall_at_k", "topk_similarity"),
    "fastxattn.ops.pruning": ("Budget", "Selection", "prune_tokens", "register_strategy", "select_tokens"),
}
_HOME = {name: module for module, names in _LAZY.items() for name in names}

__all__ = [
    "Budget",
    "PackedTokens",
    "Selection",
    "__version__",
    "absorbed_attention",
    "accelerate",
    "accelerated",
    "co_attention",
    "cross_attention",
    "distillation_loss",
    "explain",
    "infonce_loss",
    "key_importance",
    "late_interaction_loss",
    "maxsim",
    "multi_positive_infonce_loss",
    "prune_model",
    "prune_tokens",
    "ranges",
    "recall_at_k",
    "register_adapter",
    "register_strategy",
    "restore",
    "select_tokens",
    "sigmoid_loss",
    "status",
    "topk_similarity",
    "varlen_cross_attention",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in ("distributed", "export", "nn", "ops", "testing", "visualize"):
        return importlib.import_module(f"fastxattn.{name}")
    raise AttributeError(f"module 'fastxattn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "distributed", "export", "nn", "ops", "testing", "visualize"]
