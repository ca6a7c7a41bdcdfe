"""What ``accelerate`` did to a model, in a form to print and to test against."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

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
    """Largest |accelerated - float64| over all outputs."""
    eager_error: float
    """The same for the original model in its own dtype: what rounding costs there."""
    budget: float
    """What ``error`` must not exceed."""
    speedup: float
    """Original time / accelerated time, the median of interleaved rounds."""
    original_ms: float
    accelerated_ms: float
    kept: bool
    """False: the swap was undone, for ``reason``."""
    reason: str = ""

    def __str__(self) -> str:
        fate = "kept" if self.kept else f"undone: {self.reason}"
        return (
            f"error {self.error:.3g} (original {self.eager_error:.3g}, budget {self.budget:.3g}); "
            f"{self.original_ms:.3g} ms -> {self.accelerated_ms:.3g} ms, {self.speedup:.2f}x; {fate}"
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
            parts.append(f"{self.verification.speedup:.2f}x, {'kept' if self.verification.kept else 'undone'}")
        parts += ["dry run"] * self.dry_run + ["pruning"] * (self.pruning is not None)
        return f"Report({', '.join(parts)})"

    def _repr_html_(self) -> str:
        rows = [("swapped", s.name or "(the model)", _short(s.module), s.does) for s in self.swapped]
        rows += [("unchanged", entry.name or "(the model)", _short(entry.module), entry.reason) for entry in self.left]
        rows += [("no adapter", f"{count} modules", _short(name), "") for name, count in sorted(self.unknown.items())]
        if self.verification is not None:
            rows.append(("verified", "", "", str(self.verification)))
        return html.table(repr(self), ("", "module", "class", "what"), rows)

    def __str__(self) -> str:
        lines = ["fastxattn.accelerate" + (" (dry run: nothing was changed)" if self.dry_run else "")]
        for (module, does), group in groupby(sorted(self.swapped, key=_kind), key=_kind):
            names = [s.name or "(the model)" for s in group]
            lines.append(f"  swapped {len(names)} x {_short(module)}: {does}")
            lines.append(f"      {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}")
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
