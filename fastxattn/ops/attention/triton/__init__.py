"""Triton kernels of the attention op: ``forward``/``backward`` (device), ``launch`` (host), ``config`` (tile sizes)."""
