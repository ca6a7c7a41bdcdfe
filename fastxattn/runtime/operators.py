"""How the operators meet PyTorch: schema, fake, first derivatives, and the refusal of every other derivative.

Kernels have first derivatives in reverse mode. Whatever else PyTorch can ask of them (a second derivative, a tangent in
forward mode, a gradient of an operator that has none) raises when it is asked for, and never gives 0 instead:

* :func:`define` registers an Autograd kernel with every operator: the derivative that :func:`differentiable` gives it
  later, or the refusal. :func:`refuse_rest` does so for operators that a library defines.
* :class:`KernelFunction` is the base of every ``autograd.Function`` here: it works under ``torch.func.grad`` and
  ``vmap``, and refuses forward mode.
* :func:`first_order` wraps its backward: under ``create_graph=True`` the results refuse to be differentiated again.
* :func:`needs_function` tells callers when a call has to go through its Function.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastxattn.runtime import native
from fastxattn.runtime.autocast import no_autocast

_derivatives: dict[str, Callable[..., Any]] = {}
_first_calls = torch.library.Library("fastxattn", "IMPL")
native.before_cpu.append(_first_calls._destroy)


def define(name: str, signature: str, fake: Callable[..., Any]) -> None:
    """Define operator ``fastxattn::<name>`` with its fake and an Autograd kernel.

    Args:
        name: of the operator; one that ends in ``_cpu`` is implemented by the CPU library, which its fake loads.
        signature: the schema after the name.
        fake: computes shapes and dtypes of the results.
    """
    qualified = f"fastxattn::{name}"
    torch.library.define(qualified, signature, tags=torch.Tag.pt2_compliant_tag)
    torch.library.register_fake(qualified, _loading(name, fake) if name.endswith("_cpu") else fake)
    torch.library.impl(qualified, "Autograd", functools.partial(_autograd, name))
    if name.endswith("_cpu") and not native.cpu_library.cache_info().currsize:
        _first_calls.impl(name, functools.partial(_first_call, name), "CPU")


def refuse_rest() -> None:
    """Give every operator of the namespace that has no Autograd kernel the refusing one."""
    for qualified in torch._C._dispatch_get_all_op_names():
        name, _, overload = qualified.removeprefix("fastxattn::").partition(".")
        if not qualified.startswith("fastxattn::") or any(
            torch._C._dispatch_has_kernel_for_dispatch_key(qualified, key)
            for key in ("CompositeImplicitAutograd", "Autograd")
        ):
            continue
        torch.library.impl(qualified, "Autograd", functools.partial(_autograd, name, overload=overload or "default"))


def differentiable(name: str, apply: Callable[..., Any]) -> None:
    """Give operator ``fastxattn::<name>`` its derivative: ``apply`` takes the operator's arguments."""
    _derivatives[name] = apply


def composite(name: str, signature: str, apply: Callable[..., Any]) -> None:
    """Define ``fastxattn::<name>`` as ``apply``, an ``autograd.Function`` over other operators.

    Dynamo keeps a call of it whole, whatever the Function does and however often one tensor is passed to it.
    """
    qualified = f"fastxattn::{name}"
    torch.library.define(qualified, signature, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(qualified, "CompositeImplicitAutograd", functools.partial(_composite, name, apply))


class KernelFunction(torch.autograd.Function):
    """Base of the Functions around kernels, which have ``setup_context`` and save tensors there alone.

    ``vmap`` runs forward and backward once per example.
    """

    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """Refuse."""
        raise RuntimeError(
            "fastxattn: compiled kernels do not support forward-mode differentiation (torch.func.jvp, jacfwd, hessian, "
            "torch.autograd.forward_ad); pass backend='reference'"
        )


def derivative_wanted(*tensors: Tensor | None) -> bool:
    """Whether a derivative may be taken through these: of any mode, or under any ``torch.func`` transform."""
    return (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)) or (
        not torch.compiler.is_compiling() and transforming()
    )


def needs_function(*tensors: Tensor | None) -> bool:
    """Whether a call on these goes through its Function; a traced program calls the operator, which does it itself."""
    return not torch.compiler.is_compiling() and derivative_wanted(*tensors)


def transforming() -> bool:
    """Whether a ``torch.func`` transform or a level of forward-mode differentiation is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def run(operator: Any, *arguments: Any) -> Any:
    """Run an operator below autograd: from the forward of a Function, or where no derivative is needed."""
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


def plain(operator: Any, *arguments: Any) -> Any:
    """:func:`run`, for callers that Dynamo may trace: it keeps the operator, which has its own derivative, whole."""
    return operator(*arguments) if torch.compiler.is_compiling() else run(operator, *arguments)


def apply(function: Any, forward: Any, backend: str, problem: Any) -> Any:
    """Run a problem on a compiled backend: by its Function where a derivative may be taken, else by its operator."""
    if needs_function(*problem.differentiated()):
        return function.apply(backend, *problem.values())
    return plain(forward[backend], *problem.values())


def first_order(what: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate ``backward(ctx, saved, *grads)`` of a Function whose gradient cannot be differentiated again.

    ``saved`` are ``ctx.saved_tensors``, unpacked once: non-reentrant checkpointing allows no second time. Autocast is
    off: a ``backward()`` inside its block would round the gradient's products.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def wrapper(ctx: Any, *grads: Tensor | None) -> Any:
            saved = ctx.saved_tensors
            device = next(t for t in (*grads, *saved) if t is not None).device
            with torch.no_grad(), no_autocast(device):
                results = backward(ctx, saved, *grads)
            return refuse(_second_derivative(what), results, (*grads, *saved)) if torch.is_grad_enabled() else results

        return wrapper

    return decorate


def refuse(message: str, results: Any, sources: tuple[Any, ...]) -> Any:
    """``results`` (a tensor, or a tuple that may hold None) that raise when differentiated for any of ``sources``."""
    tracked = [t for t in sources if isinstance(t, Tensor) and _tracked(t)]
    if not tracked:
        return results
    several = results if isinstance(results, tuple) else (results,)
    places = [i for i, t in enumerate(several) if isinstance(t, Tensor) and t.is_floating_point()]
    tied = Refused.apply(message, len(places), *(several[i] for i in places), *tracked)
    refused = dict(zip(places, tied, strict=True))
    together = tuple(refused.get(i, t) for i, t in enumerate(several))
    return together if isinstance(results, tuple) else together[0]


class Refused(KernelFunction):
    """The first ``count`` tensors as they are, tied to the others; their derivative raises ``message``."""

    @staticmethod
    def forward(message: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Give back the first ``count``."""
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep the message."""
        ctx.set_materialize_grads(False)
        ctx.message = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """Refuse, unless no gradient came."""
        if all(g is None for g in grads):
            return (None,) * len(ctx.needs_input_grad)
        raise RuntimeError(ctx.message)


def _second_derivative(what: str) -> str:
    return (
        f"{what}: its gradient cannot be differentiated again (create_graph=True, torch.func.hessian); compiled "
        "kernels have first derivatives only. Pass backend='reference' for a result with derivatives of any order"
    )


def _tracked(t: Tensor) -> bool:
    if torch.is_grad_enabled() and t.requires_grad:
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(t).tangent is not None


def _loading(name: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """A fake that loads the CPU library: tracing is the one time a compiled program passes through Python."""

    @functools.wraps(fake)
    def wrapper(*arguments: Any) -> Any:
        if (reason := native.cpu_library().reason) is not None:
            raise RuntimeError(f"fastxattn::{name}: the cpu backend cannot be traced: {reason}")
        return fake(*arguments)

    return wrapper


def _refuse_transforms(name: str) -> None:
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"fastxattn::{name}: torch.func transforms go through fastxattn's functions in eager mode; neither the "
            "bare operator nor a compiled program has them. Pass backend='reference' there"
        )


def _composite(name: str, apply: Callable[..., Any], *arguments: Any) -> Any:
    """The kernel of composite operator ``name``, for every dispatch key."""
    if any(isinstance(t, Tensor) and _tracked(t) for t in arguments):
        _refuse_transforms(name)
    return apply(*arguments)


def _first_call(name: str, *arguments: Any) -> Any:
    """Load the CPU library, which replaces this kernel, and call the operator again: a saved program's first use."""
    if (reason := native.cpu_library().reason) is not None:
        raise RuntimeError(f"fastxattn::{name}: the cpu backend cannot run: {reason}")
    return getattr(torch.ops.fastxattn, name)(*arguments)


def _autograd(name: str, *arguments: Any, overload: str = "default") -> Any:
    """The Autograd kernel of operator ``name``."""
    operator = getattr(getattr(torch.ops.fastxattn, name), overload)
    if not any(isinstance(t, Tensor) and _tracked(t) for t in arguments):
        return run(operator, *arguments)
    _refuse_transforms(name)
    if operator._schema.is_mutable:
        raise RuntimeError(f"fastxattn::{name} has no derivative; call it under torch.no_grad()")
    if name in _derivatives:
        return _derivatives[name](*arguments)
    return refuse(f"fastxattn::{name} has no derivative", run(operator, *arguments), arguments)


native.after_cuda.append(refuse_rest)
