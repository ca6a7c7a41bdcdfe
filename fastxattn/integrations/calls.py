"""Per module, how many calls ran a fastxattn kernel, how many fell back to the original, and why.

Every call of a swapped module opens a frame. Functions that run a kernel mark the innermost frame (:func:`served`),
functions that decline leave a reason in it (:func:`note`). A call that marked nothing and ran the original ``forward``
is a fallback. Calls under ``torch.compile`` and ``torch.export`` are not counted: their Python code runs once.
"""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

NEVER_ASKED = "it never called transformers' attention interface: its attention is written out in its classes"
PASSED = "its adapter does not support this call"


@dataclass
class Calls:
    """Calls of one module, or of several added up."""

    served: int = 0
    """Calls that ran a fastxattn kernel."""
    fallbacks: Counter[str] = field(default_factory=Counter)
    """Reason -> number of calls that ran the original computation."""

    @property
    def total(self) -> int:
        """All counted calls."""
        return self.served + self.fallbacks.total()

    def add(self, other: Calls) -> None:
        """Add the counts of ``other``."""
        self.served += other.served
        self.fallbacks.update(other.fallbacks)

    @property
    def why(self) -> str:
        """The reasons of the fallbacks, the most frequent first."""
        return "; ".join(reason for reason, _ in self.fallbacks.most_common(3))

    def __str__(self) -> str:
        if not self.total:
            return "no call counted yet"
        fell = self.fallbacks.total()
        return f"served {self.served}" + (f", fell back {fell}: {self.why}" if fell else "")


class _Frame:
    __slots__ = ("inner", "original", "reason", "served")

    def __init__(self) -> None:
        self.served = self.inner = self.original = False
        self.reason = ""


class _Frames(threading.local):
    def __init__(self) -> None:
        self.open: list[_Frame] = []


_frames = _Frames()
_calls: WeakKeyDictionary[nn.Module, Calls] = WeakKeyDictionary()
_lock = threading.Lock()


def served() -> None:
    """Mark the current call as one that runs a fastxattn kernel."""
    if not torch.compiler.is_compiling() and _frames.open:
        _frames.open[-1].served = True


def note(reason: str) -> None:
    """Leave the reason why the current call is about to fall back."""
    if not torch.compiler.is_compiling() and _frames.open:
        _frames.open[-1].reason = reason


def counted(forward: Callable[..., Any], otherwise: str | Callable[[Any], str] = "") -> Callable[..., Any]:
    """``forward``, a method of a module or a function whose first argument is one, with its calls counted.

    Args:
        forward: what runs.
        otherwise: the reason of a call that marked nothing, or a function of its result that gives the reason; "":
            such a call of an adapter is served.
    """

    @functools.wraps(forward)
    def with_frame(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return forward(module, *args, **kwargs)
        frame, opened = _Frame(), _frames.open
        opened.append(frame)
        try:
            result = forward(module, *args, **kwargs)
        finally:
            opened.pop()
            if opened:
                opened[-1].inner = True
        if frame.served or not frame.inner:
            default = otherwise if isinstance(otherwise, str) else otherwise(result)
            reason = frame.reason or default or (_passed(module) if frame.original else "")
            with _lock:
                calls = _calls.setdefault(module, Calls())
                if reason and not frame.served:
                    calls.fallbacks[reason] += 1
                else:
                    calls.served += 1
        return result

    return with_frame


def marking(original: Callable[..., Any]) -> Callable[..., Any]:
    """The original ``forward`` of a swapped class: running it makes a call a fallback, unless a kernel ran inside."""

    @functools.wraps(original)
    def marked(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and _frames.open:
            _frames.open[-1].original = True
        return original(module, *args, **kwargs)

    return marked


def of_attention(result: tuple[Any, Any]) -> str:
    """Why an attention function that returned (output, maps) ran no fastxattn kernel."""
    return "torch's kernel ran" if result[1] is None else "attention maps were requested (output_attentions)"


def _passed(module: nn.Module) -> str:
    chosen = getattr(getattr(module, "config", None), "_attn_implementation", "fastxattn")
    if chosen != "fastxattn":
        return f"the model around it runs attn_implementation={chosen!r}; it must be swapped as well"
    return PASSED


def of(modules: Any) -> Calls:
    """The counts of ``modules``, added up."""
    found = Calls()
    for module in modules:
        if (calls := _calls.get(module)) is not None:
            found.add(calls)
    return found


def reset(model: nn.Module) -> None:
    """Count from 0 again."""
    for module in model.modules():
        _calls.pop(module, None)
