"""Problem: an operation's arguments as one frozen dataclass, from which every other list of arguments is derived.

A problem's fields, in order, are the arguments of its operators: :meth:`Arguments.schema` writes the operator's schema,
:meth:`Arguments.save` and :meth:`Arguments.restore` carry a problem from forward to backward, :meth:`Arguments.needs`
and :meth:`Arguments.routed` select and place its gradients. Adding an argument to an operation adds one field.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import typing
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_exporting
from typing_extensions import Self, dataclass_transform

LARGEST = torch.finfo(torch.float32).max
"""Of a number: kernels take it in float32."""
_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", int: "int", bool: "bool", str: "str"}
_Problem = TypeVar("_Problem", bound="type[Arguments]")


def differentiable(**options: Any) -> Any:
    """A tensor field that gets a gradient; ``options`` are those of :func:`dataclasses.field`."""
    return dataclasses.field(metadata={"gradient": True}, **options)


def size(**options: Any) -> Any:
    """An integer field that may be symbolic in a traced program; ``options`` as above."""
    return dataclasses.field(metadata={"schema": "SymInt"}, **options)


def number(low: float = -math.inf, below: float = math.inf, **options: Any) -> Any:
    """A number that is finite in float32, at least ``low`` and less than ``below``; ``options`` as above."""
    return dataclasses.field(metadata={"limits": (low, below)}, **options)


class Arguments:
    """Base of problems; :func:`problem` fills the class variables."""

    names: ClassVar[tuple[str, ...]]
    """Every field, in the operator's order."""
    tensors: ClassVar[tuple[str, ...]]
    """Fields that hold a tensor or None."""
    numbers: ClassVar[tuple[str, ...]]
    """Fields that hold anything else."""
    bits: ClassVar[dict[str, int]]
    """Differentiable fields, each with its bit in the backward operator's ``needs``."""
    limits: ClassVar[dict[str, tuple[float, float]]]
    """Fields made by :func:`number`, each with its ``low`` and ``below``."""
    _ends: ClassVar[tuple[tuple[str, float, float], ...]]
    _get: ClassVar[Callable[[Any], tuple[Any, ...]]]

    def values(self) -> tuple[Any, ...]:
        """The fields' values in order: the operator's positional arguments."""
        if is_compiling():  # Dynamo traces no attrgetter
            return tuple([getattr(self, name) for name in self.names])
        return type(self)._get(self)

    def replace(self, **changes: Any) -> Self:
        """A copy with these fields changed."""
        fields = dict(zip(self.names, self.values(), strict=True)) if is_compiling() else self.__dict__
        return type(self)(**(fields | changes))

    def plain_numbers(self) -> bool:
        """Whether every field made by :func:`number` holds a float within its limits, which a kernel takes as it is."""
        for name, low, high in self._ends:
            x = getattr(self, name)
            if type(x) is not float or not low <= x <= high:
                return False
        return True

    def differentiated(self) -> tuple[Tensor | None, ...]:
        """The tensors that may get a gradient."""
        return tuple([getattr(self, name) for name in self.bits])

    def tracked(self) -> bool:
        """Whether autograd records a gradient of any of them; for eager calls."""
        if torch.is_grad_enabled():
            for name in self.bits:
                t = getattr(self, name)
                if t is not None and t.requires_grad:
                    return True
        return False

    @classmethod
    def of(cls, values: Sequence[Any]) -> Self:
        """A problem from an operator's positional arguments."""
        return cls(**dict(zip(cls.names, values, strict=True)))

    @classmethod
    def positional(cls, function: Callable[[Any], Any]) -> Callable[..., Any]:
        """``function`` of a problem as one of an operator's positional arguments."""

        @functools.wraps(function)
        def call(*arguments: Any) -> Any:
            return function(cls.of(arguments))

        return call

    @classmethod
    def schema(cls) -> str:
        """The arguments as an operator schema spells them."""
        hints = typing.get_type_hints(cls)
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]
        return ", ".join(f"{f.metadata.get('schema') or _TYPES[hints[f.name]]} {f.name}" for f in fields)

    @classmethod
    def needs(cls, needed: Sequence[bool]) -> int:
        """The bit mask of the gradients asked for; ``needed`` has one entry per field (``ctx.needs_input_grad``)."""
        return sum(cls.bits.get(name, 0) for name, wanted in zip(cls.names, needed, strict=True) if wanted)

    @classmethod
    def routed(cls, grads: Sequence[Tensor | None], needs: int) -> tuple[Tensor | None, ...]:
        """One entry per field: its gradient where ``needs`` asks for it, else None.

        Args:
            grads: one per differentiable field, in order.
            needs: as from :meth:`needs`.
        """
        by_name = {n: g for (n, bit), g in zip(cls.bits.items(), grads, strict=True) if needs & bit}
        return tuple(by_name.get(name) for name in cls.names)

    def save(self, ctx: Any, *results: Tensor | None) -> None:
        """Store the problem and ``results`` on an autograd context."""
        ctx.numbers = {name: getattr(self, name) for name in self.numbers}
        ctx.save_for_backward(*(getattr(self, name) for name in self.tensors), *results)

    @classmethod
    def restore(cls, ctx: Any, saved: Sequence[Any]) -> tuple[Self, tuple[Any, ...]]:
        """The problem and the results that :meth:`save` stored; ``saved`` are the context's saved tensors."""
        count = len(cls.tensors)
        fields = dict(zip(cls.tensors, saved[:count], strict=True))
        return cls(**fields, **ctx.numbers), tuple(saved[count:])


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(differentiable, size, number))
def problem(cls: _Problem) -> _Problem:
    """Make a subclass of :class:`Arguments` a frozen dataclass with keyword arguments and fill its class variables."""
    made: Any = dataclasses.dataclass(frozen=True, kw_only=True, eq=False)(cls)
    fields, hints = dataclasses.fields(made), typing.get_type_hints(made)
    made.names = tuple(f.name for f in fields)
    made.tensors = tuple(n for n in made.names if hints[n] in (Tensor, Tensor | None))
    made.numbers = tuple(n for n in made.names if n not in made.tensors)
    made.bits = {name: 1 << i for i, name in enumerate(f.name for f in fields if f.metadata.get("gradient"))}
    made.limits = {f.name: f.metadata["limits"] for f in fields if "limits" in f.metadata}
    made._ends = tuple(
        (name, max(low, -LARGEST), min(math.nextafter(below, -math.inf), LARGEST))
        for name, (low, below) in made.limits.items()
    )
    made._get = operator.attrgetter(*made.names)
    made.__init__ = _quick(made.__init__)
    return made  # type: ignore[no-any-return]


def _quick(generated: Any) -> Any:
    """A frozen dataclass's ``__init__`` in half its time, which counts in a call of twenty microseconds.

    Defaults are class attributes, which an instance without the field shows.
    """

    def __init__(self: Any, **fields: Any) -> None:
        if is_compiling():
            generated(self, **fields)
        else:
            object.__setattr__(self, "__dict__", fields)

    return __init__


def default_scale(query: object, scale: float | None) -> float:
    """``scale``; 1 / sqrt(width of the last axis of ``query``) when None."""
    if scale is not None:
        return scale
    try:
        width = query.size(-1)  # type: ignore[attr-defined]
        # An exported graph holds the scale as a number, so the width is fixed; else the example's scale would be kept.
        fixed = width if isinstance(width, int) or not is_exporting() else int(width)
        return fixed**-0.5  # type: ignore[no-any-return]
    except (AttributeError, TypeError, IndexError, ZeroDivisionError):
        return 1.0  # checks refuse a query that is no tensor or has no width
