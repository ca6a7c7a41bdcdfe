"""What ``accelerate`` did to a model, in a form to print and to test against."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from fastxattn.integrations.calls import Calls
from fastxattn.integrations.pruning import Pruning
from fastxattn.runtime import html


@dataclass(frozen=True)
class Swap:
    """One module that was given an adapter (or would be, in a dry run)."""

    name: str
    """Dotted name in the model; "" is the model itself."""
    module: str
    """Full name of the original class."""
    adapter: str
    does: str
    calls: Calls | None = None
    """From :func:`fastxattn.status`: calls of it, and of the modules inside that are not swapped themselves."""


@dataclass(frozen=True)
class Left:
    """One module that has an adapter and was not swapped."""

    name: str
    module: str
    reason: str


@dataclass(frozen=True)
class Verification:
    """The swapped model against the original, on the inputs given as ``verify=``."""

    error: float
    """|accelerated - float64| of the output that comes closest to its budget, or exceeds it."""
    eager_error: float
    """The same for the original model in its own dtype: what rounding costs there."""
    budget: float
    """What ``error`` must not exceed."""
    speedup: float
    """Original time / accelerated time, the median of paired rounds."""
    spread: tuple[float, float]
    """Interval of that median, with 96 % confidence."""
    original_ms: float
    kept: bool
    """False: the swap was undone, for ``reason``."""
    reason: str = ""
    values: int = 0
    """How many output values were compared."""
    served: int = 0
    """Calls of swapped modules that ran a fastxattn kernel, of ``calls``."""
    calls: int = 0

    @classmethod
    def impossible(cls, reason: str) -> Verification:
        """Nothing could be compared."""
        nan = float("nan")
        return cls(nan, nan, nan, nan, (nan, nan), nan, kept=False, reason=reason)

    @property
    def speed(self) -> str:
        """The ratio of times with its interval, in words."""
        low, high = self.spread
        same = ": no difference measurable" if low <= 1 <= high else ""
        return f"{self.speedup:.2f}x ({low:.2f} to {high:.2f}){same}"

    def __str__(self) -> str:
        fate = "kept" if self.kept else f"undone: {self.reason}"
        if math.isnan(self.speedup):
            return fate
        return (
            f"error {self.error:.3g} (original {self.eager_error:.3g}, budget {self.budget:.3g}), "
            f"{self.values} values compared; {self.served} of {self.calls} calls used a fastxattn kernel; "
            f"original {self.original_ms:.3g} ms, {self.speed}; {fate}"
        )


@dataclass(repr=False)
class Report:
    """Everything that was swapped, everything that was not and why, and what verification found.

    ``print`` it for the whole text; a notebook shows a table. A copied or pickled report has no ``pruning`` handle,
    which belongs to one live model.
    """

    swapped: list[Swap] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    unknown: dict[str, int] = field(default_factory=dict)
    """Attention-like classes without an adapter, with how many modules of each."""
    verification: Verification | None = None
    dry_run: bool = False
    pruning: Pruning | None = None
    """Handle of the pruning that ``accelerate(prune=...)`` began."""

    def __bool__(self) -> bool:
        """Whether anything is swapped."""
        return bool(self.swapped)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"pruning": None}

    def __repr__(self) -> str:
        parts = [f"{len(self.swapped)} swapped", f"{len(self.left)} unchanged", f"{len(self.unknown)} unknown classes"]
        if self.verification is not None:
            parts.append(f"{self.verification.speedup:.2f}x, kept" if self.verification.kept else "undone")
        parts += ["dry run"] * self.dry_run + ["pruning"] * (self.pruning is not None)
        return f"Report({', '.join(parts)})"

    def _repr_html_(self) -> str:
        rows = [
            ("swapped", s.name or "(the model)", _short(s.module), s.does + (f" ({s.calls})" if s.calls else ""))
            for s in self.swapped
        ]
        rows += [("unchanged", entry.name or "(the model)", _short(entry.module), entry.reason) for entry in self.left]
        rows += [("no adapter", f"{count} modules", _short(name), "") for name, count in sorted(self.unknown.items())]
        if self.verification is not None:
            rows.append(("verified", "", "", str(self.verification)))
        return html.table(repr(self), ("", "module", "class", "what"), rows)

    def __str__(self) -> str:
        lines = ["fastxattn.accelerate" + (" (dry run: nothing was changed)" if self.dry_run else "")]
        for (module, does), group in groupby(sorted(self.swapped, key=_kind), key=_kind):
            swaps = list(group)
            names = [s.name or "(the model)" for s in swaps]
            lines.append(f"  swapped {len(names)} x {_short(module)}: {does}")
            lines.append(f"      {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}")
            counts = [s.calls for s in swaps if s.calls is not None]
            if counts:
                together = Calls()
                for one in counts:
                    together.add(one)
                lines.append(f"      calls: {together}")
        for entry in self.left:
            lines.append(f"  unchanged: {entry.name or '(the model)'} ({_short(entry.module)}): {entry.reason}")
        for name, count in sorted(self.unknown.items()):
            lines.append(f"  no adapter: {count} x {_short(name)}")
        if not self.swapped:
            lines.append("  nothing was swapped")
        if self.verification is not None:
            lines.append(f"  verified: {self.verification}")
        return "\n".join(lines)


def _kind(swap: Swap) -> tuple[str, str]:
    return swap.module, swap.does


def _short(name: str) -> str:
    return name.rpartition(".")[2]
