"""The losses and cross-attention over many processes, on torch.distributed (gloo or NCCL, launched by torchrun).

One gradient convention everywhere: the loss returned is the global mean, the same number on every rank, and the mean
over ranks of a parameter's gradients (what DistributedDataParallel takes) is the gradient of that global mean, with
factor 1 for features and for ``logit_scale`` alike.
"""

from fastxattn.distributed.attention import context_parallel_attention
from fastxattn.distributed.cached import cached_backward, loss_and_gradients
from fastxattn.distributed.losses import infonce_loss, multi_positive_infonce_loss, sigmoid_loss

__all__ = [
    "cached_backward",
    "context_parallel_attention",
    "infonce_loss",
    "loss_and_gradients",
    "multi_positive_infonce_loss",
    "sigmoid_loss",
]
