"""Which backend runs a problem, and why.

Every operation has an ordered table of :class:`Backend` entries, fastest first, ending with ``reference``,
which supports everything. ``"auto"`` takes the first that supports the problem; a backend asked for by name is
used or refused with its reason, never replaced.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastxattn.runtime import env


@dataclass(frozen=True)
class Backend:
    """One way to run an operation."""

    name: str
    supports: Callable[[Any], str | None]
    """Takes the operation's problem; None when it can run it, else the reason why not."""
    run: Callable[[Any], Any]
    """Takes a validated problem; returns the operation's results, differentiably."""


@dataclass(frozen=True)
class Verdict:
    """What one backend says of one problem."""

    backend: str
    reason: str | None  # None: supported


@dataclass(frozen=True)
class Explanation:
    """The backend a call would use, with every backend's verdict; ``print`` it."""

    op: str
    chosen: str
    verdicts: tuple[Verdict, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        width = max(len(v.backend) for v in self.verdicts)
        lines = [f"{self.op}: backend {self.chosen!r}"]
        for v in self.verdicts:
            mark = "->" if v.backend == self.chosen else "  "
            lines.append(f"  {mark} {v.backend:<{width}}  {'supported' if v.reason is None else v.reason}")
        lines += [f"     {note}" for note in self.notes]
        return "\n".join(lines)


explaining_in: int | None = None
"""Explanations being made, in all threads; None when there are none. A fast path around :func:`resolve` tests this."""
_count_lock = threading.RLock()
_default_from = "environment variable FASTXATTN_BACKEND"


@dataclass
class _Question:
    """One call of :func:`explain_call` in progress."""

    notes: list[str] = field(default_factory=list)
    answer: Explanation | None = None


class _Questions(threading.local):
    """Those of this thread, the innermost last: operations in other threads run as usual."""

    def __init__(self) -> None:
        self.open: list[_Question] = []


_questions = _Questions()


def _count(step: int) -> None:
    global explaining_in
    with _count_lock:
        explaining_in = ((explaining_in or 0) + step) or None


def preferring(backends: tuple[Backend, ...], name: str | None) -> tuple[Backend, ...]:
    """The backends with the one of this name first, the others as they are.

    A traced program takes them as they are: whether a library is there is nothing to trace, and what may be missing is
    not first in a table.
    """
    if name is None or torch.compiler.is_compiling():
        return backends
    return tuple(sorted(backends, key=lambda backend: backend.name != name))


class _Explained(BaseException):
    """Leaves a call that is only being explained; no ``except Exception`` of the caller's stops it."""


def resolve(op: str, backends: Sequence[Backend], problem: object, requested: str) -> str:
    """The name of the backend that runs ``problem``.

    Raises:
        ValueError: ``requested`` is not a backend of this operation.
        RuntimeError: ``requested`` cannot run this problem; the message says why.
    """
    if explaining_in is not None and _questions.open:
        question = _questions.open[-1]
        if question.answer is None:
            question.answer = explain(op, backends, problem, requested, question.notes)
        raise _Explained
    named = f"backend={requested!r}"
    if requested == "auto" and env.default_backend != "auto":
        requested = env.default_backend
        named = _default(requested)
    if requested == "auto":
        for backend in backends:
            if backend.supports(problem) is None:
                return backend.name
        raise RuntimeError(f"{op}: no backend supports this problem\n{explain(op, backends, problem)}")
    for backend in backends:
        if backend.name == requested:
            reason = backend.supports(problem)
            if reason is None:
                return requested
            raise RuntimeError(f"{op}: {named} cannot run this problem: {reason}")
    known = ", ".join(b.name for b in backends)
    if named.startswith("backend="):
        raise ValueError(f"{op}: backend must be auto or one of {known}; got {requested!r}")
    raise ValueError(f"{op}: {named} names a backend that this operation lacks; it has {known}")


def dispatch(op: str, backends: Sequence[Backend], problem: object, requested: str) -> Any:
    """The results of ``problem`` on the backend that :func:`resolve` names; raises as it does."""
    return run_on(resolve(op, backends, problem, requested), backends, problem)


def run_on(name: str, backends: Sequence[Backend], problem: object) -> Any:
    """The results of a validated problem on the backend of this name."""
    return next(b for b in backends if b.name == name).run(problem)


def _default(name: str) -> str:
    """What made ``backend="auto"`` mean ``name``."""
    return f"use_backend({name!r})" if _default_from == "use_backend" else f"{_default_from}={name}"


def explain(
    op: str, backends: Sequence[Backend], problem: object, requested: str = "auto", notes: Sequence[str] = ()
) -> Explanation:
    """Every backend's verdict on ``problem``, and the one that would run (``"none"`` when refused)."""
    verdicts = tuple(Verdict(b.name, b.supports(problem)) for b in backends)
    chosen = env.default_backend if requested == "auto" else requested
    able = [v.backend for v in verdicts if v.reason is None and chosen in ("auto", v.backend)]
    if requested == "auto" != chosen:
        notes = (*notes, f"auto means {chosen}: {_default(chosen)}")
    return Explanation(op, able[0] if able else "none", verdicts, tuple(notes))


def explain_call(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Which backend ``fn(*args, **kwargs)`` would use and why; its arguments are checked, nothing is computed.

    Args:
        fn: a fastxattn function, or anything that calls one. The first operation that it reaches in this thread is
            explained; ``fn`` may itself explain calls. Operations of other threads run as usual meanwhile.
        *args: its arguments.
        **kwargs: its keyword arguments; a ``backend=`` among them is honoured.

    Raises:
        ValueError: ``fn`` reached no fastxattn operation; also whatever bad arguments raise.

    Example:
        >>> print(fastxattn.explain(fastxattn.cross_attention, query, key, value))
        attention: backend 'cpu'
          -> cpu        supported
             reference  supported
    """
    fn = getattr(fn, "_torchdynamo_orig_callable", getattr(fn, "_orig_mod", fn))  # a compiled one, uncompiled
    question = _Question()
    _questions.open.append(question)
    _count(1)
    try:
        fn(*args, **kwargs)
    except BaseException as error:
        if question.answer is None or not isinstance(error, _Explained | Exception):
            raise
    finally:
        _questions.open.pop()
        _count(-1)
    if question.answer is None:
        raise ValueError(f"fn must call a fastxattn operation; {getattr(fn, '__name__', fn)!r} called none")
    return question.answer


def note(text: object) -> None:
    """Add a line to the explanation that is being made, if one is: why the caller came to this operation."""
    if explaining_in is not None and _questions.open:
        _questions.open[-1].notes.append(str(text))


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Make ``backend="auto"`` mean ``name`` inside a ``with`` block (process-wide, for tests and comparisons)."""
    if name not in env.BACKENDS:
        raise ValueError(f"name must be one of {', '.join(env.BACKENDS)}; got {name!r}")
    global _default_from
    before = env.default_backend, _default_from
    env.default_backend, _default_from = name, "use_backend"
    try:
        yield
    finally:
        env.default_backend, _default_from = before
