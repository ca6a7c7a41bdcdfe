"""fastxattn: fast, exact cross-modal attention, token pruning and contrastive losses for PyTorch."""

__version__ = "0.1.0"
