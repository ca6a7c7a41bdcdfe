"""Fast path of eager CPU calls: straight to the CPU operator, which checks everything it relies on.

Python looks at the arguments only when the operator has refused them, to name what is wrong. A refusal of sound
arguments that needed no conversion is the machine's own error (out of memory, say): it is raised as it is, never
repeated. What is no ``RuntimeError`` of the operator (``KeyboardInterrupt``, ``MemoryError``) passes through.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastxattn.runtime import backend, env, native
from fastxattn.runtime.backend import Backend
from fastxattn.runtime.operators import transforming

_CPU = ("auto", "cpu")
_loaded = False
_Problem = TypeVar("_Problem")
_Result = TypeVar("_Result")


def dispatch(
    op: str,
    table: Sequence[Backend] | Callable[[_Problem], Sequence[Backend]],
    problem: _Problem,
    requested: str,
    *,
    fast: Callable[[_Problem], _Result | None],
    prepare: Callable[[_Problem], _Problem],
) -> _Result:
    """The results of a problem: by ``fast`` where the call allows it, else prepared and on the backend that is chosen.

    Args:
        op: name of the operation.
        table: the backends, fastest first, or what orders them for a prepared problem.
        problem: the caller's arguments, unchecked; the first field gives the device.
        requested: the backend's name or ``"auto"``.
        fast: runs the CPU operator on the arguments as they are; None or an error where they are not fit for it.
        prepare: the problem as backends take it, checked; raises TypeError or ValueError that names the argument.

    Raises:
        ValueError, RuntimeError: as :func:`fastxattn.runtime.backend.resolve`, and what the backend raises.
    """
    refused: RuntimeError | None = None
    if allowed(problem, requested):
        try:
            if (found := fast(problem)) is not None:
                return found
        except (TypeError, ValueError, AttributeError, ZeroDivisionError):
            pass  # for prepare to name or convert
        except RuntimeError as error:
            refused = error
    prepared = prepare(problem)
    backends = table(prepared) if callable(table) else table
    name = backend.resolve(op, backends, prepared, requested)
    if refused is not None and name == "cpu" and _unconverted(problem, prepared):
        raise refused
    result: _Result = backend.run_on(name, backends, prepared)
    return result


def allowed(problem: Any, requested: str) -> bool:
    """Whether a call may go to the CPU operator at once."""
    return (
        not is_compiling()  # first: a trace must not depend on the state below
        and requested in _CPU
        and env.default_backend in _CPU
        and backend.explaining_in is None
        and getattr(getattr(problem, problem.names[0]), "is_cpu", False)
        and not torch.is_autocast_enabled("cpu")
        and not transforming()
        and (_loaded or _look())
    )


def _look() -> bool:
    """Whether the CPU library has been loaded; a fast path never loads it."""
    global _loaded
    _loaded = native.cpu_library.cache_info().currsize > 0 and native.cpu_library().reason is None
    return _loaded


def _unconverted(given: Any, prepared: Any) -> bool:
    """Whether ``prepare`` left every tensor as it was: a second run would meet the same error."""
    pairs = ((getattr(given, name), getattr(prepared, name)) for name in given.tensors)
    return all(a is b for a, b in pairs if isinstance(a, Tensor))
