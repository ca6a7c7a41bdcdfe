"""Triton kernels of attention: ``forward``/``backward`` (device), ``launch`` (host), ``tiles`` (their sizes).

Importing this package imports no Triton: the kernels come with the first call. They run on CUDA and ROCm devices, and
on CPU tensors under Triton's interpreter (``TRITON_INTERPRET=1``), which is slow and meant for tests.
"""
