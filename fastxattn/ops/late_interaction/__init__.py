"""Late interaction: token-wise similarity between packed token sets (MaxSim, FILIP, Q-Former's max over queries)."""

from fastxattn.ops.late_interaction.api import explain, late_interaction_loss, maxsim

__all__ = ["explain", "late_interaction_loss", "maxsim"]
