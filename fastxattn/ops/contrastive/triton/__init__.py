"""Triton kernels of the contrastive losses: ``kernels`` (device), ``launch`` (host) and ``tiles``."""
