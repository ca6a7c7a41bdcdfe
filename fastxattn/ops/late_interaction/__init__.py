"""Late interaction: token-wise similarity between packed token sets (MaxSim, FILIP, Q-Former's max over queries)."""

from fastxattn.ops.late_interaction.api import late_interaction_loss, maxsim

__all__ = ["late_interaction_loss", "maxsim"]
