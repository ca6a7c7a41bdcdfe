"""Every operator of the library by itself, as graphs and files reach it: registrations and derivatives."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastxattn import co_attention, export, select_tokens
from fastxattn.ops.pruning import STRATEGIES, Budget
from fastxattn.runtime import native, operators
from fastxattn.testing import offsets
from tests.compositions.problem import Problem, results, weigh
from tests.compositions.rows import ROWS

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(native.cpu_library().reason is not None, reason="needs the CPU kernels")
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


class Recorder(TorchDispatchMode):
    """Keeps the first arguments of every operator of the library."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastxattn" and func._schema.name not in self.seen:
            self.seen[func._schema.name] = tuple(t.detach().clone() if isinstance(t, Tensor) else t for t in args)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def calls() -> dict[str, tuple[Any, ...]]:
    """Arguments of every operator that the rows of the composition table and the pruning strategies call."""
    if native.cpu_library().reason is None:
        export.load_kernels()
    x, cu = torch.randn(12, 8, generator=torch.Generator().manual_seed(0)), offsets([5, 7])
    more = {"attention": x[:, 0], "relevance": x[:, 1].sigmoid(), "text": x[:2], "frames": torch.arange(12) // 3}
    with Recorder() as recorder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for row in ROWS:
            problem = Problem(row)
            results(problem)
        for strategy in STRATEGIES.values():
            for names in ((), ("attention",), ("relevance",), ("attention", "relevance")):
                try:
                    strategy(x, cu, Budget.count(3), **{name: more[name] for name in names})
                except (TypeError, ValueError):
                    continue
        select_tokens(x[:, 0], cu, Budget.adaptive())
        a, cu = torch.randn(30, 2, 8, requires_grad=True), offsets([30])  # enough tokens for a kernel of its own
        sum(o.sum() for o in co_attention(a, a * 0.5, a, a, cu, cu)).backward()
    return recorder.seen


def names() -> Iterator[str]:
    """Of all operators of the namespace."""
    return (n for n in torch._C._dispatch_get_all_op_names() if n.startswith("fastxattn::"))


def test_every_operator_has_an_autograd_registration(calls: dict[str, tuple[Any, ...]]) -> None:
    found = list(names())
    assert len(found) > 50
    for name in found:
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        assert has(name, "CompositeImplicitAutograd") or has(name, "Autograd"), name


def test_every_cpu_operator_is_called_here(calls: dict[str, tuple[Any, ...]]) -> None:
    mine = {n for n in names() if n.endswith("_cpu")}
    assert sorted(mine - set(calls)) == []


def _operator(name: str) -> Any:
    return getattr(torch.ops.fastxattn, name.removeprefix("fastxattn::")).default


def _results(name: str, arguments: tuple[Any, ...] | list[Any]) -> tuple[Tensor, ...]:
    out = _operator(name)(*arguments)
    return tuple(out) if isinstance(out, tuple | list) else (out,)


def _directional(name: str, arguments: tuple[Any, ...], places: list[int], of: list[int], step: float = 1e-2) -> float:
    """The central difference of these weighed results along all floating point arguments at once."""

    def at(sign: float) -> float:
        moved = [t + sign * step * t.cos() if i in places else t for i, t in enumerate(arguments)]
        with torch.no_grad():
            out = _results(name, moved)
        return weigh(tuple(out[i] for i in of)).item()

    return (at(1) - at(-1)) / (2 * step)


def _gradients(total: Tensor, inputs: list[Tensor], **options: Any) -> Any:
    """Gradients, or the message of what refuses them."""
    try:
        return torch.autograd.grad(total, inputs, allow_unused=True, **options)
    except RuntimeError as error:
        return str(error)


def test_derivatives_are_right_or_refused(calls: dict[str, tuple[Any, ...]]) -> None:
    right, refused, second_refused, second_right = [], [], [], []
    for name, arguments in calls.items():
        places = [i for i, t in enumerate(arguments) if isinstance(t, Tensor) and t.is_floating_point() and t.numel()]
        leaves = [t.clone().requires_grad_() if i in places else t for i, t in enumerate(arguments)]
        inputs = [leaves[i] for i in places]
        out = _results(name, leaves)
        if not inputs or not any(t.is_floating_point() for t in out):
            continue
        of = [i for i, t in enumerate(out) if t.requires_grad]
        assert of, f"{name}: results without a graph drop the gradient"
        grads = _gradients(weigh(tuple(out[i] for i in of)), inputs, create_graph=True)
        if isinstance(grads, str):
            assert "no derivative" in grads, (name, grads)
            refused.append(name)
            continue
        slope = sum((g * t.cos()).sum() for g, t in zip(grads, inputs, strict=True) if g is not None)
        wanted = _directional(name, arguments, places, of)
        assert abs(float(slope) - wanted) <= 2e-2 * max(1.0, abs(wanted)), (name, float(slope), wanted)
        right.append(name)
        total = sum(g.sin().sum() for g in grads if g is not None and g.requires_grad)
        if not isinstance(total, Tensor):
            continue
        second = _gradients(total, inputs)
        (second_refused if isinstance(second, str) else second_right).append(name)
        assert not isinstance(second, str) or "cannot be differentiated again" in second, (name, second)
    assert {"fastxattn::attention_cpu", "fastxattn::maxsim_cpu", "fastxattn::pruning_gather_cpu"} <= set(right)
    assert {"fastxattn::attention_backward_cpu", "fastxattn::topk_similarity_cpu"} <= set(refused)
    assert "fastxattn::attention_cpu" in second_refused
    # Linear: second derivatives by tests/test_compositions.py against float64.
    assert set(second_right) <= {"fastxattn::pruning_gather_cpu", "fastxattn::pruning_merge_cpu"}


def test_opcheck(calls: dict[str, tuple[Any, ...]]) -> None:
    for name, arguments in calls.items():
        torch.library.opcheck(_operator(name), arguments, test_utils=CHECKS)


def test_operators_of_a_library_get_the_refusal() -> None:
    """As those that only the CUDA library defines: no derivative is dropped in silence."""
    library = torch.library.Library("fastxattn", "FRAGMENT")
    library.define("double_for_a_test(Tensor x) -> Tensor")
    library.define("write_for_a_test(Tensor x, Tensor(a!) out) -> ()")
    library.impl("double_for_a_test", lambda x: 2 * x.detach(), "CPU")
    library.impl("write_for_a_test", lambda x, out: (out.copy_(x.detach()), None)[1], "CPU")
    x = torch.ones(3, requires_grad=True)
    try:
        operators.refuse_rest()
        assert torch.equal(torch.ops.fastxattn.double_for_a_test(x.detach()), torch.full((3,), 2.0))
        with pytest.raises(RuntimeError, match="double_for_a_test has no derivative"):
            torch.ops.fastxattn.double_for_a_test(x).sum().backward()
        with pytest.raises(RuntimeError, match="write_for_a_test has no derivative"):
            torch.ops.fastxattn.write_for_a_test(x, torch.zeros(3))
        with torch.no_grad():
            torch.ops.fastxattn.write_for_a_test(x.detach(), out := torch.zeros(3))
        assert torch.equal(out, torch.ones(3))
    finally:
        library._destroy()


SAVED = """
import sys, torch, fastxattn
if sys.argv[2] == "all":
    fastxattn.export.load_kernels()
program = torch.export.load(sys.argv[1]).module()
x, cu = torch.load(sys.argv[3])
with torch.inference_mode(sys.argv[4] == "inference"):
    torch.save(program(x, cu), sys.argv[5])
"""


@pytest.mark.parametrize("mode", ["grad", "inference"])
@pytest.mark.parametrize("what", ["attention", "maxsim"])
def test_a_saved_program_runs_in_a_fresh_process(what: str, mode: str, tmp_path: Path) -> None:
    import fastxattn

    class Model(torch.nn.Module):
        def forward(self, x: Tensor, cu: Tensor) -> Any:
            if what == "maxsim":
                return fastxattn.maxsim(x, x, cu, cu)
            return fastxattn.varlen_cross_attention(x, x, x, cu, cu)

    x, cu = torch.randn(6, 8) if what == "maxsim" else torch.randn(6, 2, 8), offsets([2, 4])
    torch.export.save(torch.export.export(Model(), (x, cu), strict=False), tmp_path / "model.pt2")
    torch.save((x, cu), tmp_path / "in.pt")
    needs = "all" if what == "maxsim" else "import"
    arguments = [str(tmp_path / "model.pt2"), needs, str(tmp_path / "in.pt"), mode, str(tmp_path / "out.pt")]
    done = subprocess.run(
        [sys.executable, "-c", SAVED, *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), Model()(x, cu))
