"""Cells that need a process in which nothing has run: ``python -m tests.compositions.fresh [ROW...]``.

Prints a line of JSON for each.

The process imports torch, fastxattn and Dynamo, loads no library and runs no operation; each row is tried in a fork of
it, so that a compiled call is the first use.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._dynamo

from fastxattn.runtime import native
from tests.compositions.columns import twice_found, twice_wanted
from tests.compositions.judge import outcome
from tests.compositions.problem import Problem, Wrong, results, same
from tests.compositions.rows import BY_NAME, ROWS
from tests.compositions.table import SAMPLED, applies

LONGEST = 300
"""Seconds that one row may take before it counts as hanging."""


def first(p: Problem, backend: str = "aot_eager") -> None:
    """Compiled whole, forward and backward, before any other call."""
    if native.cpu_library.cache_info().currsize:
        raise Wrong("the library was loaded before: this is no first use")
    compiled = torch.compile(p, fullgraph=True, backend=backend)
    same(results(p, call=compiled), results(p), "compiled")


def inductor(p: Problem) -> None:
    """Compiled to machine code."""
    first(p, "inductor")


def twice(p: Problem) -> None:
    """One tensor in several places."""
    torch._dynamo.reset()
    compiled = torch.compile(p, fullgraph=True, backend="aot_eager")
    same(twice_found(p, compiled), twice_wanted(p), "compiled with one tensor")


def func_grad(p: Problem) -> None:
    """A compiled ``torch.func.grad``."""
    torch._dynamo.reset()
    f, ts = p.of(*p.names)
    found = torch.compile(torch.func.grad(f), fullgraph=True, backend="aot_eager")(*ts)
    leaf = ts[0].clone().requires_grad_()
    f(leaf, *ts[1:]).backward()
    assert leaf.grad is not None
    same(found.detach(), leaf.grad, "compiled func.grad")


def fork(p: Problem) -> None:
    """Used before a fork and after it. The child has one thread, as PyTorch's own pool does not survive a fork."""
    wanted = results(p)

    def work() -> None:
        torch.set_num_threads(1)
        same(results(p), wanted, "after fork")
        print("right")

    code, said = forked(work)
    if code != 0 or said != b"right\n":
        raise Wrong(f"the child ended with {code} and said {said.decode()!r}")


FRESH: dict[str, Callable[[Problem], None]] = {
    "compile": first,
    "one tensor twice, compiled": twice,
    "compiled func.grad": func_grad,
}


def forked(work: Callable[[], None]) -> tuple[int, bytes]:
    """Exit code and standard output of a child; -1 where it had to be killed."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        os.dup2(write, 1)
        code = 1
        try:
            work()
            sys.stdout.flush()
            code = 0
        except BaseException as error:
            print(type(error).__name__, error, flush=True)
        finally:
            os._exit(code)
    os.close(write)
    deadline, said = time.monotonic() + LONGEST, b""
    with os.fdopen(read, "rb") as pipe:
        os.set_blocking(pipe.fileno(), False)
        while time.monotonic() < deadline:
            part = pipe.read()
            if part == b"":
                return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said
            said += part or b""
            time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -1, said


IN_OTHER_PROCESSES = (*FRESH, "inductor", "fork")


def warm() -> None:
    """Compile something else, so that no child has to import the compiler."""
    x = torch.ones(3, requires_grad=True)
    torch.compile(lambda t: (t.sin() * 2).sum(), backend="aot_eager", fullgraph=True)(x).backward()
    torch._dynamo.reset()


def cells(names: list[str]) -> Iterator[dict[str, Any]]:
    """Row, column and outcome of every cell."""

    def work(columns: dict[str, Callable[[Problem], None]], name: str) -> Callable[[], None]:
        def run() -> None:
            for column, cell in columns.items():
                if applies(BY_NAME[name], column):
                    print(json.dumps({"row": name, "column": column, "outcome": outcome(cell, name)}), flush=True)

        return run

    warm()
    for name in names:
        for columns in [FRESH | {"fork": fork}, *([{"inductor": inductor}] if name in SAMPLED else [])]:
            code, said = forked(work(columns, name))
            done = [json.loads(line) for line in said.decode().splitlines()]
            yield from done
            if code != 0:
                yield {"row": name, "column": "", "outcome": f"the process ended with {code} after {done[-1:]}"}


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    for cell in cells(sys.argv[1:] or [row.name for row in ROWS]):
        print(json.dumps(cell), flush=True)
