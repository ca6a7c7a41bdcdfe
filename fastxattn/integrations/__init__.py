"""The one-line swap into existing models, and its restore."""

from fastxattn.integrations.accelerate import accelerate, accelerated, restore, status
from fastxattn.integrations.report import Left, Report, Swap, Verification
from fastxattn.integrations.swap import Adapter, register_adapter

__all__ = [
    "Adapter",
    "Left",
    "Report",
    "Swap",
    "Verification",
    "accelerate",
    "accelerated",
    "register_adapter",
    "restore",
    "status",
]
