"""What dataclasses of tensors have in common with tensors: moving, pinning, detaching, a short repr."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self


class TensorFields:
    """Mix-in for frozen dataclasses whose fields are tensors, None or plain values."""

    _lead: ClassVar[str]
    """The field that has the record's device and dtype; the others keep their dtypes."""
    _casts: ClassVar[bool] = True
    """Whether its dtype may change."""

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        device: torch.device = getattr(self, self._lead).device
        return device

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move the tensors, as ``Tensor.to`` does with the same arguments; ``self`` where nothing changes."""
        if args and isinstance(args[0], TensorFields):
            args = (getattr(args[0], args[0]._lead), *args[1:])
        if args and isinstance(args[0], Tensor) and not self._casts:
            args = (args[0].device, *args[1:])
        before: Tensor = getattr(self, self._lead)
        lead = before.to(*args, **kwargs)
        if lead.dtype != before.dtype and not self._casts:
            raise TypeError(f"a {type(self).__name__} moves to a device and keeps its dtypes; got {lead.dtype}")
        flags: dict[str, Any] = dict(
            zip(("non_blocking", "copy"), (a for a in args if isinstance(a, bool)), strict=False)
        )
        flags |= {name: kwargs[name] for name in ("non_blocking", "copy") if name in kwargs}
        changes = self._changed(lambda t: t.to(lead.device, **flags)) | {self._lead: lead}
        if all(t is getattr(self, name) for name, t in changes.items()):
            return self
        return self._with(changes)

    def cpu(self) -> Self:
        """Move to the CPU."""
        return self.to("cpu")

    def cuda(self, device: int | str | torch.device | None = None, non_blocking: bool = False) -> Self:
        """Move to a GPU, the current one when None."""
        return self.to("cuda" if device is None else torch.device(device), non_blocking=non_blocking)

    def float(self) -> Self:
        """``to(torch.float32)``."""
        return self.to(torch.float32)

    def double(self) -> Self:
        """``to(torch.float64)``."""
        return self.to(torch.float64)

    def half(self) -> Self:
        """``to(torch.float16)``."""
        return self.to(torch.float16)

    def bfloat16(self) -> Self:
        """``to(torch.bfloat16)``."""
        return self.to(torch.bfloat16)

    def pin_memory(self) -> Self:
        """Copy to page-locked memory, from which ``to(device, non_blocking=True)`` overlaps with computation."""
        return self._with(self._changed(Tensor.pin_memory))

    def is_pinned(self) -> bool:
        """Whether all tensors are in page-locked memory."""
        return all(t.is_pinned() for t in self._tensors().values())

    def detach(self) -> Self:
        """The same tensors outside the autograd graph."""
        return self._with(self._changed(Tensor.detach))

    def _tensors(self) -> dict[str, Tensor]:
        names: Any = self.__dataclass_fields__  # type: ignore[attr-defined]
        return {name: t for name in names if isinstance(t := getattr(self, name), Tensor)}

    def _changed(self, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        return {name: change(t) for name, t in self._tensors().items()}

    def _with(self, changes: dict[str, Any]) -> Self:
        # Past the checks: a copy that is still on its way to the CPU must not be read.
        names: Any = self.__dataclass_fields__  # type: ignore[attr-defined]
        new = object.__new__(type(self))
        for name in names:
            object.__setattr__(new, name, changes.get(name, getattr(self, name)))
        return new


def describe(t: object) -> str:
    """Shape, dtype and device of a tensor, or the type of anything else; reads no data."""
    if not isinstance(t, Tensor):
        return type(t).__name__
    return f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')} {t.device}"


def describe_lengths(cu_seqlens: object) -> str:
    """Number of sequences, and their lengths where reading them does not wait for a device."""
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.ndim != 1 or torch.compiler.is_compiling():
        return "sequences"
    text = f"{cu_seqlens.shape[0] - 1} sequences"
    if type(cu_seqlens) is not Tensor or cu_seqlens.device.type != "cpu" or cu_seqlens.shape[0] < 2:
        return text
    try:
        low, high = (int(n) for n in cu_seqlens.diff().aminmax())
    except RuntimeError:  # a batched tensor of torch.vmap
        return text
    return f"{text} of {low} to {high} rows" if low != high else f"{text} of {low} rows"
