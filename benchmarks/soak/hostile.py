"""Hostile arguments for the CPU operators: ``python -m benchmarks.soak.hostile SECONDS SEED [LEAST]``.

Valid calls are recorded from the soak's random problems; each is made again with one to three arguments changed:
offsets that decrease or leave the data, extremes of int32 and int64, indices out of range, rows at odd elements and odd
strides, other shapes and dtypes, empty axes, sizes beyond memory, NaN and infinity, absent and swapped tensors. The
operator returns a result or raises an error with a message. A process of its own, because a crash is a finding too: a
line before each seed, and one after with the calls it made. Instruction sets take turns. SECONDS 0 runs that seed and
nothing else, unless LEAST asks for so many calls of each operator.
"""

from __future__ import annotations

import json
import os
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.soak.makers import MAKERS
from benchmarks.soak.trials import DTYPES, Draw, attention_problem, attention_results, results
from fastxattn.runtime import native

MADE_AGAIN = 25
"""How often a recorded call is made with other arguments."""
MEMORY = 16 << 30
"""Bytes of address space: what asks for more gets an error, and the machine stays usable."""
INTEGERS = (0, 1, -1, 2, 7, 2**31, 2**33, 2**62, 2**63 - 1, -(2**31), -(2**63))
FLOATS = (0.0, -1.0, float("nan"), float("inf"), -float("inf"), 1e38)
Call = tuple[Any, tuple[Any, ...]]


def operators() -> list[str]:
    """Every operator that the CPU library implements."""
    names = torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
    return sorted(n.removeprefix("fastxattn::") for n in names if n.startswith("fastxattn::") and n.endswith("_cpu"))


class Recorder(TorchDispatchMode):
    """Collects the calls of CPU operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastxattn" and func._opname.endswith("_cpu"):
            given = {**dict(zip((a.name for a in func._schema.arguments), args, strict=False)), **(kwargs or {})}
            self.calls.append((func, tuple(given.get(a.name, a.default_value) for a in func._schema.arguments)))
        return func(*args, **(kwargs or {}))


def recorded(seed: int) -> list[Call]:
    """The operators that a random problem calls, forward and backward, with their arguments."""
    r = random.Random(seed)
    draw = Draw(r.randrange(1 << 30), r.choice(DTYPES))
    name = r.choice(("attention", *(name for name in MAKERS if name != "model")))
    with Recorder() as recorder:
        if name == "attention":
            attention_results(attention_problem(draw)[1], "cpu")
        else:
            results(MAKERS[name](draw), "cpu", None)
    return recorder.calls


def at_odd_element(x: Tensor) -> Tensor:
    """The same values one element further on in memory, with one more element between rows."""
    if x.dim() == 0:
        return torch.cat([x.reshape(1), x.reshape(1)])[1]
    wide = x.new_zeros(x.numel() // max(1, x.shape[-1]) * (x.shape[-1] + 1) + 1)
    strides = [1]
    for size in x.shape[:0:-1]:
        strides.insert(0, strides[0] * (size + (len(strides) == 1)))
    return wide.as_strided(x.shape, strides, 1).copy_(x)


def at_odd_byte(x: Tensor) -> Tensor:
    """The same values at an odd address."""
    size = x.numel() * x.element_size()
    if size == 0:
        return x
    memory = torch.zeros(size + 1, dtype=torch.uint8)
    memory[1:] = x.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)
    return torch.frombuffer(memory.numpy(), dtype=x.dtype, offset=1).view(x.shape)


def with_entry(x: Tensor, r: random.Random) -> Tensor:
    """A copy with one to three entries replaced."""
    x = x.clone(memory_format=torch.contiguous_format)
    flat, most = x.view(-1), x.numel()
    for _ in range(r.randint(1, 3) if most else 0):
        if x.dtype.is_floating_point:
            flat[r.randrange(most)] = r.choice(FLOATS)
        elif x.dtype == torch.bool:
            flat[r.randrange(most)] ^= True
        else:
            bounds = torch.iinfo(x.dtype)
            near = int(flat.max()) + r.choice((-1, 1, 2, 1000))
            value = r.choice((bounds.min, bounds.max, -1, 0, near, bounds.max - 1, 1 << 20))
            flat[r.randrange(most)] = min(max(value, bounds.min), bounds.max)
    return x


def other_shape(x: Tensor, r: random.Random) -> Tensor:
    """An axis shorter, longer, empty, gone or new, or two of them exchanged."""
    if x.dim() == 0:
        return x.reshape(1)
    axis = r.randrange(x.dim())
    changes: tuple[Callable[[], Tensor], ...] = (
        lambda: x.narrow(axis, 0, max(0, x.shape[axis] - 1)),
        lambda: x.narrow(axis, 0, 0),
        lambda: torch.cat([x, x], axis),
        lambda: x.unsqueeze(axis),
        lambda: x.transpose(0, -1),
        lambda: x.select(axis, 0) if x.shape[axis] else x,
        lambda: x.reshape(-1),
        lambda: x.repeat_interleave(2, -1)[..., ::2],
        lambda: x.transpose(0, -1).contiguous().transpose(0, -1),
    )
    return r.choice(changes)()


def of_beyond_memory(x: Tensor) -> Tensor:
    """2^40 rows that are one."""
    return x[:1].expand(1 << 40, *x.shape[1:]) if x.dim() and len(x) else x


def hostile(value: Any, others: Sequence[Any], r: random.Random, huge: bool) -> Any:
    """Another value for an argument."""
    if isinstance(value, Tensor):
        if value.numel() > 1 << 30:
            return value
        kinds: list[Callable[[], Any]] = [
            *[lambda: with_entry(value, r)] * 4,
            *[lambda: other_shape(value, r)] * 3,
            lambda: at_odd_element(value),
            lambda: at_odd_byte(value),
            lambda: value.flip(0) if value.dim() else value,
            lambda: torch.zeros_like(value),
            lambda: value.to(r.choice((*DTYPES, torch.float64, torch.int32, torch.int64, torch.int8))),
            lambda: r.choice([t for t in others if isinstance(t, Tensor)]),
        ]
        return r.choice(kinds + [lambda: of_beyond_memory(value)] * huge)()
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return r.choice((*INTEGERS, value + 1, max(0, value - 1), 2 * value))
    if isinstance(value, float):
        return r.choice(FLOATS)
    return r.choice([t for t in others if isinstance(t, Tensor)])  # absent: something stands there


def changed(call: Call, r: random.Random, huge: bool) -> tuple[Any, ...]:
    """Arguments of the call, one to three of them hostile."""
    func, args = call
    values = list(args)
    for _ in range(r.choice((1, 1, 1, 2, 3))):
        at = r.randrange(len(values))
        optional = str(func._schema.arguments[at].type).startswith("Optional")
        absent = optional and values[at] is not None and r.random() < 0.2
        values[at] = None if absent else hostile(values[at], args, r, huge)
    return tuple(values)


def attempt(func: Any, args: tuple[Any, ...]) -> str:
    """``ran`` or ``refused``; an error whose message says nothing is a failure."""
    try:
        func(*args)
    except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
        message = str(error)
    else:
        return "ran"
    assert message.strip(), "an error without a message"
    assert not message.startswith(("std::", "vector::", "Unknown")), message
    assert "API call failed" not in message, message
    return "refused"


def one(seed: int, isa: str, huge: bool) -> dict[str, Any]:
    """Record the problem of ``seed`` and make its calls again with other arguments, on one instruction set."""
    native.force_cpu_isa(isa)
    r, counts = random.Random(seed), Counter[str]()
    torch.set_num_threads(r.choice((1, 2, 4)))
    for call in recorded(seed):
        for _ in range(MADE_AGAIN):
            args = changed(call, r, huge)
            if os.environ.get("FASTXATTN_SOAK_TRACE"):
                print(call[0], *map(shown, args), file=sys.stderr, flush=True)
            counts[f"{call[0]._opname}: {attempt(call[0], args)}"] += 1
    return {"seed": seed, "isa": isa, "counts": counts}


def shown(value: Any) -> str:
    """An argument in a trace."""
    return f"{value.dtype}{[*value.shape]}{value.stride()}" if isinstance(value, Tensor) else repr(value)


def main() -> None:
    """Command line; see the module's docstring."""
    seconds, seed, least = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0
    if folder := os.environ.get("FASTXATTN_SOAK_LIBRARY"):
        native.LIBRARY_DIR = Path(folder)
    if reason := native.cpu_library().reason:
        sys.exit(reason)
    sanitized = "LD_PRELOAD" in os.environ  # then operator new ends the process where memory runs out
    if not sanitized:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    end, isas, names, calls = time.monotonic() + seconds, native.available_cpu_isas(), operators(), Counter[str]()
    while True:
        isa = isas[seed % len(isas)]
        print(json.dumps({"seed": seed, "isa": isa}), flush=True)
        found = one(seed, isa, huge=not sanitized)
        print(json.dumps(found), flush=True)
        for what, count in found["counts"].items():
            calls[what.partition(":")[0]] += count
        seed += 1
        if time.monotonic() >= end and all(calls[name] >= least for name in names):
            return


if __name__ == "__main__":
    main()
