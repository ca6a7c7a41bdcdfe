"""Two-stage training with large batches: loss and embedding gradients first, encoders chunk by chunk afterwards.

After Gao et al. 2021 (GradCache): the encoders never hold more than a chunk's activations, and the loss sees the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def loss_and_gradients(
    loss: Callable[..., torch.Tensor], *tensors: torch.Tensor
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """``loss(*tensors)`` and its gradients for every tensor, without a graph reaching back into the encoders.

    Args:
        loss: takes the tensors and gives a scalar, for example a :func:`fastxattn.distributed.infonce_loss`.
        tensors: embeddings, scales, biases; detached here.

    Returns:
        The loss (detached), and one gradient per tensor.
    """
    leaves = [t.detach().requires_grad_() for t in tensors]
    value = loss(*leaves)
    gradients = torch.autograd.grad(value, leaves, allow_unused=True)
    return value.detach(), tuple(
        torch.zeros_like(t) if g is None else g for t, g in zip(leaves, gradients, strict=True)
    )


def cached_backward(
    encoders: Sequence[Callable[[torch.Tensor], torch.Tensor]],
    inputs: Sequence[torch.Tensor],
    loss: Callable[..., torch.Tensor],
    *,
    chunk: int,
    parameters: Sequence[torch.Tensor] = (),
) -> torch.Tensor:
    """Backward of ``loss(encoders[0](inputs[0]), ..., *parameters)`` in chunks of ``chunk`` rows.

    Gradients are added to ``.grad`` as ``backward`` would. Encoders run twice and must be deterministic in between
    (dropout would differ between the two runs).

    Args:
        encoders: one per input.
        inputs: batches, rows first.
        loss: takes the embeddings and then ``parameters``.
        chunk: rows an encoder sees at once, at least 1.
        parameters: further tensors the loss depends on, such as ``logit_scale``.

    Returns:
        The loss, detached.

    Raises:
        ValueError: ``chunk`` is below 1, or encoders and inputs differ in number.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1; got {chunk}")
    if len(encoders) != len(inputs):
        raise ValueError(f"inputs must be as many as encoders ({len(encoders)}); got {len(inputs)}")
    with torch.no_grad():
        embeddings = [
            torch.cat([encoder(part) for part in batch.split(chunk)])
            for encoder, batch in zip(encoders, inputs, strict=True)
        ]
    value, gradients = loss_and_gradients(loss, *embeddings, *parameters)
    for encoder, batch, gradient in zip(encoders, inputs, gradients, strict=False):
        for part, part_gradient in zip(batch.split(chunk), gradient.split(chunk), strict=True):
            torch.autograd.backward(encoder(part), part_gradient)
    for parameter, gradient in zip(parameters, gradients[len(encoders) :], strict=True):
        if parameter.requires_grad:
            torch.autograd.backward(parameter, gradient)
    return value
