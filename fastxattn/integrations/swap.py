"""Changing the class of live modules, and changing it back.

``swap(module, adapter)`` sets ``module.__class__`` to a subclass of the module's own class with the adapter in front:
``type("CLIPAttention", (Adapter, CLIPAttention), ...)``. Parameters, buffers, hooks, ``state_dict`` keys,
``isinstance`` and ``repr`` stay what they were; what a restore needs is in the class or on the instance, so
``deepcopy``, pickling and saving work, and a copy can be restored like the original.

Adapters are found by the exact class of a module, never by a subclass: a subclass may have its own ``forward``.
"""

from __future__ import annotations

import importlib
from typing import Any, ClassVar

from torch import nn


class Adapter:
    """Base of all adapters: a mix-in whose ``forward`` replaces the original's, with ``super().forward`` behind it.

    An adapter must give the original's numbers for every input: what it does not handle it passes to
    ``super().forward``.
    """

    does: ClassVar[str] = ""
    """One line for the report: what the swap changes."""
    exact: ClassVar[bool] = True
    """False: an output that callers may look at changes, and ``accelerate(exact=False)`` is needed."""
    is_loss: ClassVar[bool] = False
    """True: swapped only with ``accelerate(loss=True)``."""

    @classmethod
    def refuses(cls, module: nn.Module, parent: nn.Module | None) -> str | None:
        """Why ``module`` is not swapped, or None. ``parent`` is the module that holds it."""
        return None

    @classmethod
    def swapped(cls, module: nn.Module) -> None:
        """Called after a swap, for what is not in the class (a configuration entry)."""

    @classmethod
    def restored(cls, module: nn.Module) -> None:
        """Called after a restore; undoes :meth:`swapped`."""


_adapters: dict[str, str | type[Adapter]] = {}
_classes: dict[tuple[type, type[Adapter]], type] = {}


def class_name(cls: type) -> str:
    """The full dotted name of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def register_adapter(original: type[nn.Module] | str, adapter: type[Adapter] | str) -> None:
    """Let :func:`fastxattn.accelerate` swap modules whose class is ``original``.

    Args:
        original: the class, or its full dotted name (so that its package need not be imported). The name of a module
            of transformers stands for all models in it that have no adapter of their own.
        adapter: an importable subclass of :class:`Adapter`, or its name as ``"package.module:Class"``.

    Raises:
        TypeError: ``adapter`` is not an Adapter subclass, or ``original`` not a module class.
    """
    if isinstance(original, type):
        if not issubclass(original, nn.Module):
            raise TypeError(f"original must be a subclass of torch.nn.Module; got {original!r}")
        original = class_name(original)
    if isinstance(adapter, type) and not issubclass(adapter, Adapter):
        raise TypeError(f"adapter must be a subclass of fastxattn.integrations.Adapter; got {adapter!r}")
    _adapters[original] = adapter


def adapter_for(module: nn.Module) -> type[Adapter] | None:
    """The adapter registered for the module's exact class."""
    cls = type(module)
    name = class_name(cls)
    found = _adapters.get(name)
    if found is None and hasattr(cls, "set_attn_implementation"):
        name = cls.__module__
        found = _adapters.get(name)
    if isinstance(found, str):
        path, _, attribute = found.partition(":")
        found = getattr(importlib.import_module(path), attribute)
        _adapters[name] = found
    return found  # type: ignore[return-value]


def adapter_of(module: nn.Module) -> type[Adapter] | None:
    """The adapter a module was swapped with, or None."""
    return getattr(type(module), "_fastxattn_adapter", None)


def swapped_class(original: type[nn.Module], adapter: type[Adapter]) -> type[nn.Module]:
    """The subclass of ``original`` that runs ``adapter``; made once."""
    made = _classes.get((original, adapter))
    if made is None:
        body: dict[str, Any] = {
            "__module__": original.__module__,  # repr, saved architectures and class-name policies stay as they were
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
            "__reduce_ex__": _reduce,
            "_fastxattn_original": original,
            "_fastxattn_adapter": adapter,
        }
        made = _classes[original, adapter] = type(original.__name__, (adapter, original), body)
    return made


def _reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    # The swapped class has its original's name, so pickle by the two classes it is made of.
    made = type(self)
    state = self.__getstate__() if hasattr(self, "__getstate__") else vars(self)  # object's own exists from 3.11 on
    return _rebuild, (made._fastxattn_original, made._fastxattn_adapter), state  # type: ignore[attr-defined]


def _rebuild(original: type[nn.Module], adapter: type[Adapter]) -> nn.Module:
    made = swapped_class(original, adapter)
    return made.__new__(made)


def refusal(module: nn.Module, adapter: type[Adapter], parent: nn.Module | None) -> str | None:
    """Why this module cannot be swapped, or None."""
    if "forward" in vars(module):
        return (
            "its forward is replaced on the instance (a device map or another library's hook): "
            "accelerate the model before adding such hooks"
        )
    return adapter.refuses(module, parent)


def swap(module: nn.Module, adapter: type[Adapter]) -> None:
    """Give ``module`` the class that runs ``adapter``."""
    module.__class__ = swapped_class(type(module), adapter)
    adapter.swapped(module)


def unswap(module: nn.Module) -> bool:
    """Give ``module`` its own class back; False when it has it.

    Raises:
        RuntimeError: another library changed the class since (``fully_shard`` does).
    """
    adapter = adapter_of(module)
    if adapter is None:
        return False
    if "_fastxattn_original" not in vars(type(module)):
        raise RuntimeError(
            f"{type(module).__name__} was given another class after accelerate(); undo that first, or restore() "
            "before wrapping the model"
        )
    module.__class__ = type(module)._fastxattn_original  # type: ignore[attr-defined]
    adapter.restored(module)
    return True
