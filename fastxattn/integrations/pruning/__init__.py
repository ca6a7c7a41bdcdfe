"""Token pruning of whole models: :func:`prune_model` and its handle."""

from fastxattn.integrations.pruning.handle import Pruning, restore_pruning
from fastxattn.integrations.pruning.prune import prune_model

__all__ = ["Pruning", "prune_model", "restore_pruning"]
