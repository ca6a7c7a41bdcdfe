"""BridgeTower returns the self-attention maps of its cross-modal layers always, whether they are asked for or not."""

from __future__ import annotations

from typing import Any, ClassVar

from fastxattn.integrations.swap import Adapter


class CrossLayer(Adapter):
    """For ``BridgeTowerBertCrossLayer``."""

    does: ClassVar[str] = "its self-attention computes the map that the model returns"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original's."""
        return super().forward(*args, **{**kwargs, "output_attentions": True})  # type: ignore[misc]


class CrossAttention(Adapter):
    """For ``BridgeTowerCrossAttention``, whose map no caller but an output hook reads."""

    does: ClassVar[str] = "attention map only for output_attentions=True"

    def forward(self, *args: Any, output_attentions: bool | None = None, **kwargs: Any) -> Any:
        """As the original's."""
        return super().forward(*args, **kwargs)  # type: ignore[misc]
