"""ModalityGate: a learned weighting of modalities, some of which may be missing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class ModalityGate(nn.Module):
    """Mix one vector per modality, with weights that depend on all of them.

    ::

        g = softmax over present modalities of (concat(x_1 .. x_M) W + b),   out = sum_m g_m x_m

    Absent modalities enter the concatenation as zeros and get weight 0; if all are absent the result is 0. In
    training each present modality is dropped with probability ``dropout``, but never the last one of a sample, so
    that the model learns to do without.

    Args:
        modalities: how many.
        width: of each modality's vector.
        dropout: probability of dropping a modality of a sample, in training.

    Sources and differences from them: gated multimodal units (Arevalo et al., 2017) mix hidden vectors
    ``tanh(x_m W_m)``, for more than two modalities with independent sigmoid gates; here the vectors are mixed as they
    come, by a softmax. "ModDrop" (Neverova et al., 2015) may drop every modality of a sample.
    """

    def __init__(self, modalities: int, width: int, dropout: float = 0.0) -> None:
        if modalities < 1 or not 0.0 <= dropout < 1.0:
            raise ValueError(f"modalities must be at least 1 and dropout in [0, 1); got {modalities} and {dropout}")
        super().__init__()
        self.modalities, self.width, self.dropout = modalities, width, dropout
        self.score = nn.Linear(modalities * width, modalities)

    def forward(
        self, inputs: Sequence[torch.Tensor], present: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix.

        Args:
            inputs: one tensor (batch, width) per modality; rows of absent modalities may hold anything.
            present: (batch, modalities) boolean; None: all are.

        Returns:
            The mixture (batch, width) and the weights (batch, modalities).
        """
        if len(inputs) != self.modalities:
            raise ValueError(f"inputs must hold {self.modalities} tensors; got {len(inputs)}")
        stacked = torch.stack(list(inputs), dim=1)
        if stacked.shape[2:] != (self.width,):
            raise ValueError(f"inputs must have shape (batch, {self.width}); got {tuple(inputs[0].shape)}")
        batch = stacked.shape[0]
        if present is None:
            present = torch.ones(batch, self.modalities, dtype=torch.bool, device=stacked.device)
        elif present.shape != (batch, self.modalities) or present.dtype != torch.bool:
            shape = (batch, self.modalities)
            raise ValueError(f"present must be boolean of shape {shape}; got {present.dtype} {tuple(present.shape)}")
        if self.training and self.dropout:
            luck = torch.rand(batch, self.modalities, dtype=torch.float32, device=stacked.device)
            luck = luck.masked_fill(~present, -1.0)
            # The luckiest present modality of a sample stays whatever happens.
            best = luck == luck.amax(1, keepdim=True)
            present = present & ((luck >= self.dropout) | best)
        seen = torch.where(present.unsqueeze(-1), stacked, 0.0)
        scores = self.score(seen.flatten(1)).masked_fill(~present, -torch.inf)
        scores = torch.where(present.any(1, keepdim=True), scores, 0.0)
        weights = torch.where(present, scores.softmax(-1), 0.0)
        return (weights.unsqueeze(-1) * seen).sum(1), weights
