"""``fastxattn.accelerate(model)``: make a model that someone already has faster, with the same numbers."""

from __future__ import annotations

import contextlib
import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from fastxattn.integrations import catalogue  # noqa: F401  fills the registry
from fastxattn.integrations.pruning import prune_model, restore_pruning
from fastxattn.integrations.report import Left, Report, Swap
from fastxattn.integrations.swap import adapter_for, adapter_of, class_name, refusal, swap, unswap
from fastxattn.integrations.verify import verify_swap

Selector = str | type[nn.Module] | Callable[[str, nn.Module], bool]


def accelerate(
    model: nn.Module,
    *,
    include: Selector | Iterable[Selector] | None = None,
    exclude: Selector | Iterable[Selector] | None = None,
    exact: bool = True,
    prune: dict[str, Any] | None = None,
    loss: bool = False,
    verify: Any = None,
    dry_run: bool = False,
    strict: bool = False,
) -> Report:
    """Swap the modules of ``model`` that fastxattn has a faster form of, in place.

    Parameters stay where they are; ``state_dict`` keys, ``isinstance``, ``repr``, copying, pickling and saving are
    unchanged. Only classes with an adapter are touched (:func:`register_adapter` adds one). An adapter looks at every
    call and passes what it does not handle, and what is too small to gain, to the original ``forward``.

    Args:
        model: any module; containers such as DDP are looked into. Accelerate before ``torch.compile``.
        include: swap only these: patterns over dotted module names (``"qformer.*"``), module classes, or functions
            ``(name, module) -> bool``; one, or several of which any may match. None: everything.
        exclude: leave these alone, in the same form; wins over ``include``.
        exact: only swaps whose every output keeps its value. False also makes those that change an output which the
            model's own result does not depend on (the report names them).
        prune: keyword arguments of :func:`fastxattn.prune_model` (``{"keep": 0.5}``): prune image tokens too.
            That changes results, so it needs ``exact=False``; ``verify`` judges the swap without it.
        loss: swap contrastive loss modules too (open_clip's).
        verify: inputs to try the model on, a dict of keyword arguments or a tuple of positional ones: the original,
            the accelerated and a float64 copy of the original are run and the first two timed. If the error budget is
            broken, or the model became slower, the swap is undone; the report says so. If a run raises, so does this
            call, and nothing stays swapped.
        dry_run: report what would be swapped, and change nothing.
        strict: raise where a module that has an adapter cannot be swapped, and where verification undoes the swap.

    Returns:
        The :class:`Report`; print it. Modules that were swapped before are not listed again.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``model`` is compiled already, ``verify`` is not a dict or tuple, or ``prune`` came with ``exact``.
        RuntimeError: under ``strict``, with the reasons.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    if verify is not None and not isinstance(verify, (dict, tuple)):
        raise ValueError(
            f"verify must be a dict of keyword arguments or a tuple of arguments; got {type(verify).__name__}"
        )
    for name, module in model.named_modules():
        if type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(f"model is compiled ({name or 'the model'}): accelerate it before torch.compile")
    if dry_run and verify is not None:
        raise ValueError("verify needs the swap: it cannot be used with dry_run")
    if prune is not None and exact:
        raise ValueError("prune changes results: pass exact=False with it")
    report, done = Report(dry_run=dry_run), []
    wanted, unwanted = _selectors(include), _selectors(exclude)
    parents = _parents(model)
    for name, module in model.named_modules():
        if adapter_of(module) is not None:
            continue
        adapter = adapter_for(module)
        if adapter is None:
            _note_unknown(report, module)
            continue
        if (wanted and not _matches(wanted, name, module)) or _matches(unwanted, name, module):
            continue
        reason = refusal(module, adapter, parents.get(id(module)))
        if reason is None and exact and not adapter.exact:
            reason = f"changes an output ({adapter.does}); pass exact=False to allow it"
        if reason is None and adapter.is_loss and not loss:
            reason = "a loss; pass loss=True to swap it"
        if reason is not None:
            report.left.append(Left(name, class_name(type(module)), reason))
            continue
        report.swapped.append(Swap(name, class_name(type(module)), class_name(adapter), adapter.does))
        done.append((module, adapter))
    if strict and report.left:
        raise RuntimeError(f"accelerate(strict=True) would leave modules alone:\n{report}")
    if dry_run:
        return report
    for module, adapter in done:
        swap(module, adapter)
    if verify is not None and done:
        try:
            with _temporarily([module for module, _ in done]) as original:
                report.verification = verify_swap(model, verify, original)
        finally:
            if report.verification is None or not report.verification.kept:
                for module, _ in reversed(done):
                    unswap(module)
        if not report.verification.kept:
            report.left += [Left(s.name, s.module, report.verification.reason) for s in report.swapped]
            report.swapped = []
            if strict:
                raise RuntimeError(f"accelerate(strict=True): verification failed\n{report}")
    if prune is not None:
        try:
            report.pruning = prune_model(model, **prune)
        except BaseException:
            for module, _ in reversed(done):
                unswap(module)
            raise
    return report


def restore(model: nn.Module) -> int:
    """Give every module of ``model`` its own class back, and end its pruning.

    Returns how many modules were swapped (0: none ever was).
    """
    restore_pruning(model)
    return sum([unswap(module) for module in model.modules()])


@contextlib.contextmanager
def accelerated(model: nn.Module, **options: Any) -> Iterator[Report]:
    """:func:`accelerate` inside a ``with`` block; at the end the modules that it swapped or pruned are restored."""
    before = {id(module) for module in model.modules() if adapter_of(module) is not None}
    report = None
    try:
        report = accelerate(model, **options)
        yield report
    finally:
        if report is not None and report.pruning is not None:
            report.pruning.restore()
        for module in model.modules():
            if id(module) not in before:
                unswap(module)


def status(model: nn.Module) -> Report:
    """What is swapped in ``model`` now."""
    report = Report()
    for name, module in model.named_modules():
        adapter = adapter_of(module)
        if adapter is not None:
            original = getattr(type(module), "_fastxattn_original")  # noqa: B009
            report.swapped.append(Swap(name, class_name(original), class_name(adapter), adapter.does))
    return report


@contextlib.contextmanager
def _temporarily(modules: list[nn.Module]) -> Iterator[Callable[[bool], None]]:
    """A switch between swapped (True) and original (False); swapped at the end."""
    adapters = [(module, adapter_of(module)) for module in modules]

    def set_swapped(on: bool) -> None:
        for module, adapter in adapters:
            if on and adapter_of(module) is None and adapter is not None:
                swap(module, adapter)
            elif not on:
                unswap(module)

    try:
        yield set_swapped
    finally:
        set_swapped(True)


def _selectors(given: Selector | Iterable[Selector] | None) -> list[Selector]:
    if given is None:
        return []
    several = [given] if isinstance(given, (str, type)) or not isinstance(given, Iterable) else list(given)
    for one in several:
        if not (isinstance(one, (str, type)) or callable(one)):
            raise TypeError(f"include and exclude take name patterns, classes or functions; got {one!r}")
    return several  # type: ignore[return-value]


def _matches(selectors: list[Selector], name: str, module: nn.Module) -> bool:
    for one in selectors:
        if isinstance(one, str):
            hit = fnmatch.fnmatchcase(name, one)
        elif isinstance(one, type):
            hit = isinstance(module, one)
        else:
            hit = bool(one(name, module))
        if hit:
            return True
    return False


def _parents(model: nn.Module) -> dict[int, nn.Module]:
    return {id(child): module for module in model.modules() for child in module.children()}


def _note_unknown(report: Report, module: nn.Module) -> None:
    # A leaf that projects keys and values itself; its containers have nothing to swap.
    if re.search("Atte?n", type(module).__name__) and not any(
        re.search("Atte?n", type(child).__name__) for child in module.modules() if child is not module
    ):
        full = class_name(type(module))
        report.unknown[full] = report.unknown.get(full, 0) + 1
