"""``fastxattn.accelerate(model)``: make a model that someone already has faster, with the same numbers."""

from __future__ import annotations

import contextlib
import fnmatch
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from fastxattn.integrations import calls, catalogue  # noqa: F401  catalogue fills the registry
from fastxattn.integrations.configs import Owned, is_pretrained
from fastxattn.integrations.pruning import prune_model, restore_pruning
from fastxattn.integrations.report import Left, Report, Swap
from fastxattn.integrations.swap import Adapter, adapter_for, adapter_of, class_name, refusal, swap, unswap
from fastxattn.integrations.verify import arguments, verify_swap

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
    call and passes what it does not support, and what is too small to gain, to the original ``forward``;
    :func:`status` counts both. A transformers model gets copies of its configurations, so that other models built
    from the same objects keep their attention.

    Args:
        model: any module; containers such as DDP are looked into. Accelerate before ``torch.compile``.
        include: swap only these: patterns over dotted module names (``"qformer.*"``), module classes, or functions
            ``(name, module) -> bool``; one, or several of which any may match. None: everything.
        exclude: do not swap these, in the same form; wins over ``include``. What is inside an excluded module keeps
            its attention function too.
        exact: only swaps whose every output keeps its value. False also makes those that change an output which the
            model's own result does not depend on (the report names them): CLIP's text states after the end token.
        prune: keyword arguments of :func:`fastxattn.prune_model` (``{"keep": 0.5}``): prune image tokens too.
            That changes results, so it needs ``exact=False``; ``verify`` judges the swap without it.
        loss: swap contrastive loss modules too (open_clip's).
        verify: inputs to try the model on, a mapping of keyword arguments (what tokenizers and processors return) or
            a tuple of positional ones: the original, the accelerated and a float64 copy of the original are run on
            copies of the inputs and from one random seed, and the first two timed. Every value of the outputs is
            compared. If one exceeds its error budget, nothing could be compared, no call used a kernel or the model
            became measurably slower, the swap is undone; the report has the reason. If a run raises, so does this
            call, and nothing stays swapped.
        dry_run: report what would be swapped, and change nothing.
        strict: raise where a module that has an adapter cannot be swapped, and where verification undoes the swap.

    Returns:
        The :class:`Report`; print it. Modules that were swapped before are not listed again.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``model`` is compiled already, ``verify`` is not a mapping or tuple, ``prune`` came with
            ``exact``, or a pattern or class of ``include`` or ``exclude`` matches no module.
        RuntimeError: under ``strict``, with the reasons.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    inputs = None if verify is None else arguments(verify)
    if verify is not None and inputs is None:
        raise ValueError(
            "verify must be a dict of keyword arguments (or another mapping, as tokenizers return) or a tuple of "
            f"arguments; got {type(verify).__name__}"
        )
    for name, module in model.named_modules():
        if type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(f"model is compiled ({name or 'the model'}): accelerate it before torch.compile")
    if dry_run and verify is not None:
        raise ValueError("verify needs the swap: it cannot be used with dry_run")
    if prune is not None and exact:
        raise ValueError("prune changes results: pass exact=False with it")
    report, done = Report(dry_run=dry_run), []
    included, excluded = _selected(model, "include", include), _selected(model, "exclude", exclude)
    parents = _parents(model)
    for name, module in model.named_modules():
        adapter = None if adapter_of(module) is not None else adapter_for(module)
        if adapter is None or (included is not None and id(module) not in included) or id(module) in (excluded or ()):
            continue
        reason = refusal(module, adapter, parents.get(id(module))) or _eager_inside(module, excluded or set())
        if reason is None and exact and not adapter.exact:
            reason = f"changes an output ({adapter.does}); pass exact=False to allow it"
        if reason is None and adapter.is_loss and not loss:
            reason = "a loss; pass loss=True to swap it"
        if reason is not None:
            report.left.append(Left(name, class_name(type(module)), reason))
            continue
        report.swapped.append(Swap(name, class_name(type(module)), class_name(adapter), adapter.does))
        done.append((module, adapter))
    _note_unknown(report, model)
    if strict and report.left:
        raise RuntimeError(f"accelerate(strict=True) would leave modules alone:\n{report}")
    if dry_run:
        return report
    owned = Owned(model, {id(module) for module, _ in done}, excluded or set())
    try:
        for module, adapter in done:
            swap(module, adapter)
        owned.settle()
        if inputs is not None and done:
            with _temporarily([module for module, _ in done], owned) as set_swapped:
                report.verification = verify_swap(model, inputs, set_swapped)
        if report.verification is None or report.verification.kept:
            if prune is not None:
                report.pruning = prune_model(model, **prune)
            calls.reset(model)
            return report
    except BaseException:
        _undo(done, owned)
        raise
    _undo(done, owned)
    report.left += [Left(s.name, s.module, report.verification.reason) for s in report.swapped]
    report.swapped = []
    if strict:
        raise RuntimeError(f"accelerate(strict=True): verification failed\n{report}")
    return report


def _undo(done: list[tuple[nn.Module, type[Adapter]]], owned: Owned) -> None:
    for module, _ in reversed(done):
        unswap(module)
    owned.undo()


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
    """What is swapped in ``model`` now, and how many calls each module served or passed to the original, and why.

    Models that run ``attn_implementation="fastxattn"`` by name are listed too. Calls under ``torch.compile`` are not
    counted.
    """
    report = Report()
    owned: dict[str, list[nn.Module]] = {}
    found: dict[str, tuple[type, str, str]] = {}
    for name, module in model.named_modules():
        adapter, cls = adapter_of(module), type(module)
        owner = next((n for n in _around(name) if n in found), None)
        if adapter is not None:
            found[name] = getattr(cls, "_fastxattn_original", cls), class_name(adapter), adapter.does
            owner = name
        elif owner is None and is_pretrained(module) and module.config._attn_implementation == "fastxattn":  # type: ignore
            found[name] = cls, "attn_implementation", "attention function chosen by name"
            owner = name
        if owner is not None:
            owned.setdefault(owner, []).append(module)
    for name, (cls, adapter_name, does) in found.items():
        report.swapped.append(Swap(name, class_name(cls), adapter_name, does, calls.of(owned[name])))
    return report


def _around(name: str) -> Iterator[str]:
    """The dotted names of a module and of those around it, the innermost first."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""


@contextlib.contextmanager
def _temporarily(modules: list[nn.Module], owned: Owned) -> Iterator[Callable[[bool], None]]:
    """A switch between swapped (True) and original (False); swapped at the end."""
    adapters = [(module, adapter_of(module)) for module in modules]

    def set_swapped(on: bool) -> None:
        for module, adapter in adapters:
            if on and adapter_of(module) is None and adapter is not None:
                swap(module, adapter)
            elif not on:
                unswap(module)
        owned.settle()

    try:
        yield set_swapped
    finally:
        set_swapped(True)


def _selected(model: nn.Module, argument: str, given: Selector | Iterable[Selector] | None) -> set[int] | None:
    """The modules that ``include`` or ``exclude`` matches, by id; None where nothing was asked for.

    Raises:
        TypeError: a selector is neither a pattern nor a class nor a function.
        ValueError: a pattern or class matches no module, or, of ``include``, none that has an adapter.
    """
    if given is None:
        return None
    several: list[Any] = [given] if isinstance(given, (str, type)) or not isinstance(given, Iterable) else list(given)
    every = list(model.named_modules())
    known = [(n, m) for n, m in every if adapter_of(m) is not None or adapter_for(m) is not None]
    found: set[int] = set()
    for one in several:
        if not (isinstance(one, (str, type)) or callable(one)):
            raise TypeError(f"include and exclude take name patterns, classes or functions; got {one!r}")
        hits = [m for n, m in (known if argument == "include" else every) if _matches(one, n, m)]
        if not hits and isinstance(one, (str, type)):
            names = ", ".join(repr(n) for n, _ in known[:8]) + (", ..." if len(known) > 8 else "")
            raise ValueError(f"{argument}={one!r} matches no module that has an adapter; those are: {names or 'none'}")
        found.update(map(id, hits))
    return found


def _matches(selector: Any, name: str, module: nn.Module) -> bool:
    if isinstance(selector, str):
        return fnmatch.fnmatchcase(name, selector)
    return isinstance(module, selector) if isinstance(selector, type) else bool(selector(name, module))


def _parents(model: nn.Module) -> dict[int, nn.Module]:
    return {id(child): module for module in model.modules() for child in module.children()}


def _eager_inside(module: nn.Module, excluded: set[int]) -> str | None:
    """Why a model whose parts are excluded cannot be swapped around them, or None."""
    if not is_pretrained(module) or module.config._attn_implementation != "eager":  # type: ignore
        return None
    if any(id(part) in excluded and any(map(uses_interface, part.modules())) for part in module.modules()):
        return "excluded modules inside run eager attention, which cannot read its masks; set 'sdpa' first"
    return None


def uses_interface(module: nn.Module) -> bool:
    """Whether a module's ``forward`` calls transformers' attention interface."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def _note_unknown(report: Report, model: nn.Module) -> None:
    """List attention classes without an adapter: leaves, whose model does not choose their attention function."""
    seen: set[int] = set()
    stack = [(model, False)]
    while stack:
        module, hooked = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        known = adapter_of(module) or adapter_for(module)
        hooked = known is not None if is_pretrained(module) else hooked
        children = list(module.children())
        stack += [(child, hooked) for child in children]
        inner = (type(m).__name__ for m in module.modules() if m is not module)
        leaf = re.search("Atte?n", type(module).__name__) and not any(re.search("Atte?n", name) for name in inner)
        if leaf and known is None and not (hooked and uses_interface(module)):
            full = class_name(type(module))
            report.unknown[full] = report.unknown.get(full, 0) + 1
