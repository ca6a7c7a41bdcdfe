"""Two-stage training with large batches: loss and embedding gradients first, encoders chunk by chunk afterwards.

After Gao et al. 2021 (GradCache): the encoders never hold more than a chunk's activations, and the loss sees the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastxattn.distributed import trees
from fastxattn.distributed.sync import computed_from, outputs_of, reducers_called, unsynchronised

Encoder = Callable[[Any], Any]


def loss_and_gradients(loss: Callable[..., Tensor], *tensors: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """``loss(*tensors)`` and its gradients for every tensor, without a graph reaching back into the encoders.

    Args:
        loss: takes the tensors and gives a scalar, for example a :func:`fastxattn.distributed.infonce_loss`.
        tensors: embeddings, scales, biases; detached here.

    Returns:
        The loss (detached), and one gradient per tensor (0 for those that the loss does not depend on).

    Raises:
        TypeError: the loss is no tensor of one element.
    """
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
    value = loss(*leaves)
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"loss must give a tensor of one element; got {got}")
    asked = [t for t in leaves if t.requires_grad]
    found = iter(torch.autograd.grad(value, asked, allow_unused=True))
    gradients = [next(found) if t.requires_grad else None for t in leaves]
    return value.detach(), tuple(
        torch.zeros_like(t) if g is None else g for t, g in zip(leaves, gradients, strict=True)
    )


def cached_backward(
    encoders: Sequence[Encoder],
    inputs: Sequence[Any],
    loss: Callable[..., Tensor],
    *,
    chunk: int,
    parameters: Sequence[Tensor] = (),
) -> Tensor:
    """Backward of ``loss(encoders[0](inputs[0]), ..., *parameters)`` in chunks of ``chunk`` rows.

    Gradients are added to ``.grad`` as ``backward`` would. Encoders run twice on every chunk, the second time from the
    state of torch's random generators that the first run started from: dropout drops the same units. (Noise from
    ``random`` or NumPy is not replayed, and running averages such as BatchNorm's are updated twice.) An encoder whose
    output requires no gradient is not run again after its first chunk.

    Under DistributedDataParallel gradients are reduced once, in the backward pass of the last chunk, so ranks may have
    different numbers of chunks. Under FSDP, whose forward pass is a collective too, they may not.

    Args:
        encoders: one per input. DistributedDataParallel is found in a module, in the object of a method, and in what a
            function refers to directly; hidden deeper, it reduces gradients after every chunk.
        inputs: batches: a tensor, or mappings, tuples and lists of tensors, all with the same number of rows (first
            axis). Tensors without an axis, numbers, strings and None go to every chunk.
        loss: takes what the encoders return for the whole batches, then ``parameters``.
        chunk: rows an encoder sees at once, at least 1.
        parameters: further tensors the loss depends on, such as ``logit_scale``. Their gradients are this rank's;
            averaging those that no DistributedDataParallel module holds is up to the caller.

    Returns:
        The loss, detached.

    Raises:
        TypeError: an input or output is no tensor, mapping, tuple or list of them; the loss is no scalar.
        ValueError: ``chunk`` is below 1; encoders and inputs differ in number; an encoder returns another number of
            rows than it got.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1; got {chunk}")
    if len(encoders) != len(inputs):
        raise ValueError(f"inputs must be as many as encoders ({len(encoders)}); got {len(inputs)}")
    runs = [_Chunks(i, *pair, chunk) for i, pair in enumerate(zip(encoders, inputs, strict=True))]
    with torch.no_grad():
        outputs = [run.embed() for run in runs]
    # Until torch 2.11 autocast reuses weights that it cast without a graph, and these would get no gradients.
    torch.clear_autocast_cache()

    places = [trees.leaves("", tree) for tree in outputs]
    sizes = [len(found) for found in places]

    def of_leaves(*tensors: Tensor) -> Tensor:
        remaining = list(tensors)
        taken = [[remaining.pop(0) for _ in range(size)] for size in sizes]
        return loss(*map(trees.replaced, outputs, taken), *remaining)

    value, every = loss_and_gradients(of_leaves, *(x for found in places for x in found), *parameters)
    gradients = list(every)
    taken = [[gradients.pop(0) for _ in range(size)] for size in sizes]
    _backward(runs, taken, [pair for pair in zip(parameters, gradients, strict=True) if pair[0].requires_grad])
    return value


def _backward(runs: list[_Chunks], gradients: list[list[Tensor]], parameters: list[tuple[Tensor, Tensor]]) -> None:
    """Add all gradients; a module that reduces them does so in the last chunk of the last encoder that trains it."""
    modules = [run.reducers for run in runs]
    with unsynchronised([m for found in modules for m in found]):
        if parameters:  # in one pass, as they may be computed from one another
            torch.autograd.backward([p for p, _ in parameters], [g for _, g in parameters])
    training, trained = [True] * len(runs), list(modules)
    for i, (run, found) in enumerate(zip(runs, modules, strict=True)):
        if any(m in other for m in found for j, other in enumerate(modules) if j != i):
            # Only a module that serves several encoders makes it matter, before the pass, which of them train it.
            with unsynchronised(found):
                training[i], trained[i] = run.trains()
    last = {m: i for i, found in enumerate(trained) for m in found}
    for i, run in enumerate(runs):
        for at in range(len(run.bounds) if training[i] else 0):
            final = at == len(run.bounds) - 1
            with unsynchronised([m for m in modules[i] if not (final and last.get(m) == i)]):
                if not run.backward(at, gradients[i]):
                    break


class _Chunks:
    """An encoder, its input, and the random state that each chunk started from."""

    def __init__(self, index: int, encoder: Encoder, batch: Any, chunk: int) -> None:
        self.name, self.encoder, self.batch = f"inputs[{index}]", encoder, batch
        rows = trees.row_count(self.name, batch)
        # A batch without rows is one chunk: the encoder's collectives must run on this rank too.
        self.bounds = [(start, min(start + chunk, rows)) for start in range(0, max(rows, 1), chunk)]
        self.devices = _random_devices(trees.leaves(self.name, batch))
        self.states: list[list[Tensor]] = []
        self.reducers: list[nn.Module] = []

    def run(self, at: int) -> tuple[Any, list[Tensor]]:
        """Output of a chunk and its tensors, checked."""
        start, stop = self.bounds[at]
        output = self.encoder(trees.rows_between(self.name, self.batch, start, stop))
        name = self.name.replace("inputs", "encoders") + "'s output"
        found = trees.leaves(name, output)
        for x in found:
            if x.dim() == 0 or x.shape[0] != stop - start:
                raise ValueError(
                    f"{name} must have a row per row of its input, {stop - start}; got shape {tuple(x.shape)}"
                )
        return output, found

    def embed(self) -> Any:
        """The whole batch's output."""
        parts: list[list[Tensor]] = []
        with reducers_called(self.encoder) as called:
            for at in range(len(self.bounds)):
                self.states.append([_module(d).get_rng_state(*_index(d)) for d in self.devices])
                output, found = self.run(at)
                parts.append(found)
        self.reducers = list(called)
        if len({len(found) for found in parts}) > 1:
            raise ValueError(f"the encoder of {self.name} must return as many tensors for every chunk")
        return trees.replaced(output, [torch.cat(column) for column in zip(*parts, strict=True)])

    def again(self, at: int) -> list[Tensor]:
        """A chunk's tensors once more, from the same random state, which then goes on from where it was."""
        before = [_module(d).get_rng_state(*_index(d)) for d in self.devices]
        try:
            for d, state in zip(self.devices, self.states[at], strict=True):
                _module(d).set_rng_state(state, *_index(d))
            return self.run(at)[1]
        finally:
            for d, state in zip(self.devices, before, strict=True):
                _module(d).set_rng_state(state, *_index(d))

    def trains(self) -> tuple[bool, list[nn.Module]]:
        """From the first chunk: whether the output requires grad, and the reducers that get gradients from it."""
        with outputs_of(self.reducers) as outputs:
            found = self.again(0)
        return any(x.requires_grad for x in found), [m for m, made in outputs.items() if computed_from(found, made)]

    def backward(self, at: int, gradients: list[Tensor]) -> bool:
        """Add the gradients of a chunk; False when it has none."""
        start, stop = self.bounds[at]
        pairs = [(x, g[start:stop]) for x, g in zip(self.again(at), gradients, strict=True) if x.requires_grad]
        if pairs:
            torch.autograd.backward([x for x, _ in pairs], [g for _, g in pairs])
        return bool(pairs)


def _random_devices(tensors: list[Tensor]) -> list[torch.device]:
    """The CPU, the current accelerator when it is in use, and the tensors' devices: where an encoder may draw from."""
    devices = {x.device: None for x in tensors if x.device.type not in ("cpu", "meta")}
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None and getattr(_module(accelerator), "is_initialized", lambda: True)():
        devices[torch.device(accelerator.type, torch.accelerator.current_device_index())] = None
    return [torch.device("cpu"), *devices]


def _module(device: torch.device) -> Any:
    return torch.random if device.type == "cpu" else torch.get_device_module(device)


def _index(device: torch.device) -> list[torch.device]:
    """The argument of ``get_rng_state``; the CPU and MPS have one generator and take none."""
    return [] if device.type in ("cpu", "mps") else [device]
