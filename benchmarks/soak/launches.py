"""Triton launches with wrong integers, in the interpreter: ``python -m benchmarks.soak.launches SECONDS SEED [OP]``.

Small random problems of every operation run forward and backward. Each launch is made again with copies of its
tensors, one of which holds wrong integers: negative ones, ones beyond what they index, the extremes of the dtype,
offsets that decrease, do not start at 0 or end past the data. Every access is checked: a kernel may compute anything,
and reads and stores nothing outside its tensors. SECONDS 0 runs that seed and nothing else.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.soak.makers import MAKERS, NO_TRITON
from benchmarks.soak.modules import MODULES
from benchmarks.soak.pruning import PRUNING
from benchmarks.soak.trials import DTYPES, Draw, T, attention_problem, attention_results, results
from fastxattn.ops.co_attention import backends as co_attention
from fastxattn.testing.bounds import OutOfBounds, checked_accesses

OPS = ("attention", *(name for name in MAKERS if name not in (*NO_TRITON, *PRUNING, *MODULES)))
"""Operations with kernels of their own; modules and strategies launch the same ones."""
MADE_AGAIN = 2
"""How often a launch is made again for each of its tensors of integers."""
GAP = 1 << 20
"""Elements of nothing on either side of a copy: a near miss does not end in another tensor."""
INTEGERS = (torch.int32, torch.int64)
WAYS = ("negative", "past the end", "extreme", "decreasing", "late start", "late end", "all extreme", "random")


class Small(random.Random):
    """Chance that prefers small problems: of numbers above 4 the smaller half, of batches 3 at most."""

    def randint(self, a: int, b: int) -> int:
        """Between ``a`` and ``b``, 3 if that is between them."""
        return super().randint(a, min(b, max(a, 3)))

    def choice(self, seq: Sequence[T]) -> T:  # type: ignore[override]
        """One of them; the size of something is not the largest."""
        sizes = [v for v in seq if type(v) is int and v > 4]
        return super().choice(sorted(seq)[: -(-len(seq) // 2)] if len(sizes) == len(seq) else seq)  # type: ignore[type-var]


class Tiny(Draw):
    """Problems of at most 20 tokens a sequence: what matters is the indices."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        super().__init__(seed, dtype, "triton")
        self.r = Small(seed)

    def size(self, *values: int) -> int:
        """One of the values, 20 at most."""
        return min(20, self.r.choice(values))

    def lengths(self, batch: int, longest: int = 20) -> list[int]:
        """Of every sequence; empty ones are common, and one is not."""
        return [self.r.choice((0, 1, 4, 17)) for _ in range(batch - 1)] + [self.r.choice((1, 3, 20))]


def wrong(x: Tensor, way: str, r: random.Random) -> Tensor:
    """A copy of integers that is wrong in this way."""
    x, bounds = x.clone(), torch.iinfo(torch.int32)
    flat, most = x.view(-1), max(-2, min(int(x.max()), 1 << 30))
    at = r.randrange(flat.numel())
    if way == "negative":
        flat[at] = r.choice((-1, -2, -7, -1000, -(1 << 20)))
    elif way == "past the end":
        flat[at] = most + r.choice((1, 2, 9, 1000, 1 << 20))
    elif way == "extreme":
        flat[at] = r.choice((bounds.min, bounds.min + 1, bounds.max, bounds.max - 1))
    elif way == "decreasing":
        x = x.flip(0)
    elif way == "late start":
        flat += r.choice((1, 3, 1000))
    elif way == "late end":
        flat[-1] = most + r.choice((1, 5, 70, 1 << 20))
    elif way == "all extreme":
        flat.fill_(r.choice((bounds.min, bounds.max, -1, 1 << 20)))
    else:
        low, high = r.choice(((-3, most + 4), (bounds.min, bounds.max)))
        flat.copy_(torch.randint(low, high, flat.shape, generator=torch.Generator().manual_seed(r.randrange(1 << 30))))
    return x


def apart(x: Tensor) -> Tensor:
    """A copy of the same strides, with nothing near it."""
    extent = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1 if x.numel() else 0
    wide = torch.empty(extent + 2 * GAP, dtype=x.dtype)
    return wide.as_strided(x.shape, x.stride(), GAP).copy_(x)


@contextmanager
def wrong_launches(r: random.Random, counts: Counter[str]) -> Iterator[None]:
    """Make each launch within again with wrong integers, checked; counts them by kernel."""
    from triton.runtime import interpreter

    with checked_accesses():
        executor = interpreter.GridExecutor
        checked = executor.__call__

        def launch(self: Any, *arguments: Any, **named: Any) -> Any:
            every = [*arguments, *named.values()]
            for i, x in enumerate(every):
                if not isinstance(x, Tensor) or x.dtype not in INTEGERS or not x.numel():
                    continue
                for way in r.sample(WAYS, MADE_AGAIN):
                    given = [apart(wrong(t, way, r) if t is x else t) if isinstance(t, Tensor) else t for t in every]
                    kernel = self.fn.__name__
                    try:
                        rest = dict(zip(named, given[len(arguments) :], strict=True))
                        checked(self, *given[: len(arguments)], **rest)
                    except Exception as error:
                        cause = error.__cause__ if isinstance(error.__cause__, OutOfBounds) else error
                        message = f"{kernel}, argument {i} of {len(every)}, {way}: {cause}"
                        raise AssertionError(message) from error
                    counts[kernel] += 1
            return checked(self, *arguments, **named)

        executor.__call__ = launch
        try:
            yield
        finally:
            executor.__call__ = checked


def one(seed: int, op: str) -> Counter[str]:
    """Run a problem of an operation, and its launches again with wrong integers."""
    r, counts = random.Random(seed), Counter[str]()
    draw = Tiny(r.randrange(1 << 30), r.choice(DTYPES))
    # Co-attention's own kernels too, which are slower than two calls of attention.
    with wrong_launches(r, counts), mock.patch.dict(co_attention.ONE_PASS, triton=lambda problem: True):
        if op == "attention":
            attention_results(attention_problem(draw)[1], "triton")
        else:
            results(MAKERS[op](draw), "triton", None)
    return counts


def main() -> None:
    """Command line; see the module's docstring."""
    seconds, seed, ops = float(sys.argv[1]), int(sys.argv[2]), tuple(sys.argv[3:]) or OPS
    torch.set_num_threads(1)
    end = time.monotonic() + seconds
    while True:
        op = ops[seed % len(ops)]
        print(json.dumps({"seed": seed, "op": op}), flush=True)
        print(json.dumps({"seed": seed, "counts": one(seed, op)}), flush=True)
        seed += 1
        if time.monotonic() >= end:
            return


if __name__ == "__main__":
    main()
