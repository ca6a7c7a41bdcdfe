"""The proof behind ``accelerate(verify=inputs)``: error against float64, calls served, time against the original."""

from __future__ import annotations

import contextlib
import copy
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastxattn.integrations import calls
from fastxattn.integrations.compare import Comparison, compare, leaves, rebuilt
from fastxattn.integrations.report import Verification
from fastxattn.integrations.swap import adapter_of, unswap

# A model is given back when it is measurably slower than this share of its original speed.
SLOWER = 0.97
# Of 9 paired ratios, the second smallest and second largest enclose the median with 96 % confidence.
ROUNDS = 9
SEED = 0
_QUANTISED = ("quantized", "bitsandbytes", "torchao", "quanto", "gptq", "awq", "hqq", "compressed_tensors")


def arguments(inputs: Any) -> dict[str, Any] | tuple[Any, ...] | None:
    """Keyword arguments (of a mapping: a dict, BatchEncoding, BatchFeature) or positional ones; None: neither."""
    if not isinstance(inputs, (Mapping, tuple, Tensor)):
        inputs = getattr(inputs, "data", inputs)
    if isinstance(inputs, Mapping):
        return dict(inputs)
    return tuple(inputs) if isinstance(inputs, (tuple, list)) else None


def verify_swap(
    model: nn.Module, inputs: dict[str, Any] | tuple[Any, ...], set_swapped: Callable[[bool], None]
) -> Verification:
    """Run and time ``model`` swapped and not, against a float64 copy of the original.

    Every run draws the same random numbers and gets its own copy of the inputs, so that a cache is not advanced. The
    budget of every output is twice the original's error in its own dtype, plus what rounding the result costs.
    """
    with _evaluation(model), torch.no_grad(), _random_numbers(model) as reseed:
        outer: list[str] = []

        def run() -> Any:
            reseed()
            return _call(model, _copied(inputs), outer)

        set_swapped(True)
        outermost = _outermost(model)
        set_swapped(False)
        original = run()
        if not any(isinstance(x, Tensor) and x.is_floating_point() for _, x in leaves(original)):
            outer += outermost  # token ids hide errors: compare what the swapped modules returned as well
            original = run()
        again = run()
        try:
            reference = _in_float64(model, inputs, reseed, outer)
        except Exception as error:
            return Verification.impossible(_no_float64(model, error))
        repeated = compare(again, original, reference)
        del again
        set_swapped(True)
        changes = [c for m in model.modules() for c in getattr(adapter_of(m), "changes", ())]
        calls.reset(model)
        found = compare(run(), original, reference, tuple(changes))
        counted = calls.of(model.modules())
        del original, reference
        ratios, original_ms = _timed(model, inputs, set_swapped, reseed)
    speedup, spread = statistics.median(ratios), (sorted(ratios)[1], sorted(ratios)[-2])
    result = Verification(
        found.error,
        found.eager_error,
        found.budget,
        speedup,
        spread,
        original_ms,
        values=found.values,
        served=counted.served,
        calls=counted.total,
        kept=False,
    )
    return replace(result, **_verdict(found, repeated, counted, speedup, spread))


def _verdict(
    found: Comparison, repeated: Comparison, counted: calls.Calls, speedup: float, spread: tuple[float, float]
) -> dict[str, Any]:
    reason = ""
    if repeated.reason and repeated.values:
        reason = f"two runs of the original from one seed do not agree: {repeated.reason}"
    elif found.reason:
        reason = found.reason
    elif not counted.served:
        reason = f"0 of {counted.total} calls used a fastxattn kernel" + (f": {counted.why}" if counted.total else "")
    elif spread[1] < SLOWER:
        reason = f"the model became slower ({speedup:.2f}x) on these inputs"
    return {"kept": not reason, "reason": reason}


def _call(model: nn.Module, inputs: Any, inside: Iterable[str] = ()) -> Any:
    """The model's output; with ``inside``, (output, what each of these modules returned at its first call)."""
    found: dict[str, Any] = {}
    hooks = [model.get_submodule(name).register_forward_hook(partial(_remember, found, name)) for name in inside]
    try:
        output = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return (output, found) if hooks else output


def _remember(found: dict[str, Any], name: str, module: nn.Module, given: Any, output: Any) -> None:
    found.setdefault(name, output)


def _outermost(model: nn.Module) -> list[str]:
    names = [name for name, module in model.named_modules() if adapter_of(module) is not None]
    return [n for n in names if not any(n.startswith(f"{other}.") or other == "" for other in names if other != n)]


def _copied(inputs: Any) -> Any:
    return rebuilt(inputs, lambda t: t.detach().clone())


def _in_float64(model: nn.Module, inputs: Any, reseed: Callable[[], None], inside: Iterable[str]) -> Any:
    wide = copy.deepcopy(model).double()
    for module in wide.modules():
        unswap(module)
    given = rebuilt(inputs, lambda t: t.detach().double() if t.is_floating_point() else t.detach().clone())
    reseed()
    with _Truth():
        return _call(wide, given, inside)


def _no_float64(model: nn.Module, error: Exception) -> str:
    for name, module in model.named_modules():
        kinds = [type(module), *(type(p) for p in module.parameters(recurse=False))]
        if any(word in kind.__module__ for kind in kinds for word in _QUANTISED):
            return (
                f"{name} ({type(module).__name__}) is quantised and has no float64 form, so nothing tells a right "
                "result from a wrong one: verify the model before quantising it, or accelerate it without verify"
            )
    text = (str(error).splitlines() or [""])[0]
    return f"the model does not run in float64, so there is nothing to compare with ({type(error).__name__}: {text})"


class _Truth(TorchFunctionMode):
    """In float64: attention rows without keys give 0, and random numbers are those that float32 would draw."""

    softmax = (torch.softmax, F.softmax, Tensor.softmax)
    drawing = (torch.randn_like, torch.rand_like, torch.bernoulli, Tensor.normal_, Tensor.uniform_, Tensor.bernoulli_)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        wide = bool(args) and isinstance(args[0], Tensor) and args[0].dtype == torch.float64
        if func in self.softmax:
            return _softmax(func, *args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return _attention(func, *args, **kwargs)
        if func is F.dropout and wide:
            kept = func(torch.ones_like(args[0], dtype=torch.float32), *args[1:], **{**kwargs, "inplace": False}) != 0
            p = (args[1] if len(args) > 1 else kwargs.get("p", 0.5)) if not bool(kept.all()) else 0.0
            return args[0] * kept / (1 - p)
        if func in self.drawing and wide and "dtype" not in kwargs:
            drawn = func(args[0].float(), *args[1:], **kwargs).double()
            return args[0].copy_(drawn) if func.__name__.endswith("_") else drawn
        if func is F.multi_head_attention_forward:  # its inner calls do not come here
            attention: Any = partial(_attention, F.scaled_dot_product_attention)
            softmax: Any = partial(_softmax, F.softmax)
            with mock.patch.multiple(F, softmax=softmax, scaled_dot_product_attention=attention):
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def _softmax(func: Any, scores: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    empty = (scores == -torch.inf).all(args[0] if args else kwargs["dim"], keepdim=True)
    return func(scores, *args, **kwargs).masked_fill(empty, 0)  # type: ignore[no-any-return]


def _attention(func: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    out: Tensor = func(query, key, value, *args, **kwargs)
    mask: Tensor | None = args[0] if args else kwargs.get("attn_mask")
    if mask is None:
        return out
    hidden = ~mask if mask.dtype == torch.bool else mask == -torch.inf
    return out.masked_fill(hidden.all(-1, keepdim=True), 0)


def _timed(
    model: nn.Module,
    inputs: Any,
    set_swapped: Callable[[bool], None],
    reseed: Callable[[], None],
    seconds: float = 0.01,
) -> tuple[list[float], float]:
    """Paired ratios original / accelerated, and the median milliseconds of the original. Copies are not timed."""

    def taken(on: bool, repeats: int) -> float:
        set_swapped(on)
        total = 0.0
        for _ in range(repeats):
            given = _copied(inputs)
            reseed()
            _synchronize()
            start = time.perf_counter()
            _call(model, given)
            _synchronize()
            total += time.perf_counter() - start
        return total / repeats

    once = max(taken(True, 1), taken(False, 1), 1e-7)
    repeats = max(1, min(100, round(seconds / once)))
    pairs = []
    for i in range(ROUNDS):
        order = (False, True) if i % 2 else (True, False)
        took = {on: taken(on, repeats) for on in order}
        pairs.append((took[False], took[True]))
    return [a / b for a, b in pairs], statistics.median(a for a, _ in pairs) * 1e3


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextlib.contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def _random_numbers(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Yields what starts every generator anew; at the end they are as they were."""
    numpy: Any = sys.modules.get("numpy")
    python, arrays = random.getstate(), numpy and numpy.random.get_state()

    def reseed() -> None:
        torch.manual_seed(SEED)
        random.seed(SEED)
        if numpy:
            numpy.random.seed(SEED)

    on_gpu = any(p.device.type == "cuda" for p in model.parameters())
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if on_gpu else []):
            yield reseed
    finally:
        random.setstate(python)
        if numpy:
            numpy.random.set_state(arrays)
