"""Changing the class of live modules, and changing it back.

``swap(module, adapter)`` sets ``module.__class__`` to a subclass of the module's own class with the adapter in front:
``type("CLIPAttention", (Adapter, CLIPAttention), ...)``. Parameters, buffers, hooks, ``state_dict`` keys,
``isinstance`` and ``repr`` stay what they were; what a restore needs is in the class or on the instance, so
``deepcopy``, pickling and saving work, and a copy can be restored like the original.

Adapters are found by the exact class of a module, never by a subclass: a subclass may have its own ``forward``. Two
subclasses are known: the one that ``fully_shard`` makes, and one of a transformers model whose adapter replaces no
method but only chooses the attention function.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
from collections.abc import Iterator
from typing import Any, ClassVar

from torch import nn

from fastxattn.integrations import calls

OLDEST_TRANSFORMERS = (5, 21)
"""Before it, transformers passes T5's position bias and the masks of some models in other ways."""


class Adapter:
    """Base of all adapters: a mix-in whose ``forward`` replaces the original's, with ``super().forward`` behind it.

    An adapter must give the original's numbers for every input: what it does not handle it passes to
    ``super().forward``.
    """

    does: ClassVar[str] = ""
    """One line for the report: what the swap changes."""
    exact: ClassVar[bool] = True
    """False: an output that callers may look at changes, and ``accelerate(exact=False)`` is needed."""
    changes: ClassVar[tuple[str, ...]] = ()
    """Patterns of the outputs that keep no value (``"text_model_output.*"``), which verification does not compare."""
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


_CHOSEN = "_attn_implementation_internal"  # where a configuration of transformers keeps its attention function
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
    """The adapter registered for the module's class."""
    cls = _unsharded(type(module))
    found = _registered(class_name(cls))
    if found is None and hasattr(cls, "set_attn_implementation"):
        found = _registered(cls.__module__)
        chosen = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if found is None and chosen != "eager":
            # A model that someone derived: choosing its attention function replaces no code of the subclass. With
            # eager attention that code may expect additive masks.
            found = next((made for base in cls.__mro__ if (made := _registered(base.__module__)) is not None), None)
    return found


def _registered(name: str) -> type[Adapter] | None:
    found = _adapters.get(name)
    if isinstance(found, str):
        path, _, attribute = found.partition(":")
        found = _adapters[name] = getattr(importlib.import_module(path), attribute)
    return found  # type: ignore[return-value]


def _unsharded(cls: type) -> type:
    """The class of which ``fully_shard`` made ``cls``."""
    bases = [base.__name__ for base in cls.__bases__]
    return cls.__bases__[1] if len(bases) == 2 and bases[0] == "FSDPModule" else cls


def adapter_of(module: nn.Module) -> type[Adapter] | None:
    """The adapter a module was swapped with, or None."""
    return getattr(type(module), "_fastxattn_adapter", None)


def swapped_class(original: type[nn.Module], adapter: type[Adapter]) -> type[nn.Module]:
    """The subclass of ``original`` that runs ``adapter``; made once."""
    made = _classes.get((original, adapter))
    if made is None:
        names = {  # repr, saved architectures and class-name policies stay as they were
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
        }
        own = getattr(adapter, "forward", None)
        marked = type(original.__name__, (original,), {**names, "forward": calls.marking(original.forward)})
        body: dict[str, Any] = {
            **names,
            "forward": calls.counted(own) if own else calls.counted(original.forward, calls.NEVER_ASKED),
            "__reduce_ex__": _reduce,
            "_fastxattn_original": original,
            "_fastxattn_adapter": adapter,
        }
        if hasattr(original, "save_pretrained"):
            body["save_pretrained"] = _saving_as_original(original.save_pretrained)  # type: ignore[arg-type]
        base = marked if own else original  # without a forward of its own, an adapter only changes what runs inside
        made = _classes[original, adapter] = type(original.__name__, (adapter, base), body)
    return made


def _saving_as_original(save: Any) -> Any:
    @functools.wraps(save)
    def save_pretrained(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # A configuration that asks for attention maps is only valid with the attention that it was made for.
        with _settings_of_original(self):
            return save(self, *args, **kwargs)

    return save_pretrained


@contextlib.contextmanager
def _settings_of_original(model: nn.Module) -> Iterator[None]:
    swapped = [(module, adapter) for module in model.modules() if (adapter := adapter_of(module)) is not None]
    held = [config for m in model.modules() if (config := getattr(m, "config", None)) is not None]
    chosen = [(c, vars(c)[_CHOSEN]) for c in held if _CHOSEN in getattr(c, "__dict__", ())]
    for module, adapter in reversed(swapped):
        adapter.restored(module)
    try:
        yield
    finally:
        for module, adapter in swapped:
            adapter.swapped(module)
        for config, implementation in chosen:
            vars(config)[_CHOSEN] = implementation


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
    return unsupported_transformers(module) or adapter.refuses(module, parent)


def unsupported_transformers(module: nn.Module) -> str | None:
    """Why a module of the installed transformers is not swapped, or None."""
    if not type(module).__module__.startswith("transformers."):
        return None
    import transformers

    found = tuple(int(part) for part in re.findall(r"\d+", transformers.__version__)[:2])
    if found >= OLDEST_TRANSFORMERS:
        return None
    oldest = ".".join(map(str, OLDEST_TRANSFORMERS))
    return (
        f"transformers {transformers.__version__} is older than {oldest}, the oldest with the attention interface that "
        f'these adapters need: pip install "transformers>={oldest}"'
    )


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
