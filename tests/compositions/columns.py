"""The columns of the composition table: what a PyTorch user does around a call.

Each function raises :class:`Wrong` where a result is not right, and whatever the call raises where it is refused.
"""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from fastxattn.runtime.backend import use_backend
from tests.compositions.problem import Problem, Wrong, near, outputs, reference, results, same

Column = Callable[[Problem], None]


def eager(p: Problem) -> None:
    found = results(p)
    without = [name for name in (*p.names, *p.parameters()) if f"grad {name}" not in found]
    if without:
        raise Wrong(f"no gradient for {without}")
    near(found, reference(p.row, torch.float64), reference(p.row, torch.float32), torch.float32)


def export(p: Problem) -> None:
    """The program gives the same for the sizes it was exported with and for others."""
    larger = p.make(1)
    shapes = {
        name: {d: torch.export.Dim.AUTO for d in range(t.ndim) if t.shape[d] != larger[name].shape[d]} or None
        for name, t in p.inputs.items()
    }

    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = p.module

        def forward(self, inputs: Any) -> Any:
            return p(inputs)

    with torch.no_grad():
        exported = torch.export.export(Whole(), (p.copied(),), dynamic_shapes=(shapes,), strict=False).module()
        for inputs in (p.inputs, larger):
            found = {f"out {i}": t for i, t in enumerate(p.trimmed(exported(inputs)))}
            same(found, outputs(p, inputs), "exported")


def autocast(p: Problem) -> None:
    """As near to float64 as the reference backend is under autocast."""

    def under(inputs: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return p(inputs)

    found = results(p, call=under)
    with use_backend("reference"):
        yardstick = results(p, call=under)
    near(found, reference(p.row, torch.float64), yardstick, torch.bfloat16)


def checkpointed(reentrant: bool) -> Column:
    def run(p: Problem) -> None:
        found = results(p, call=lambda x: _checkpoint(p, x, reentrant))
        wanted = results(p)
        same(found, wanted, "checkpointed")

    return run


def _checkpoint(p: Problem, inputs: Any, reentrant: bool) -> Any:
    names = list(inputs)

    def call(*tensors: Tensor) -> Any:
        return p(dict(zip(names, tensors, strict=True)))

    return checkpoint(call, *inputs.values(), use_reentrant=reentrant)


def saved_hooks(p: Problem) -> None:
    """Saved tensors kept elsewhere, and copied by hooks."""
    wanted = results(p)
    with torch.autograd.graph.save_on_cpu():
        same(results(p), wanted, "save_on_cpu")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (t.clone(), t.dtype), lambda kept: kept[0].clone()):
        same(results(p), wanted, "hooks")


def _second(p: Problem) -> dict[str, Tensor]:
    given = p.leaves()
    leaves = [given[n] for n in p.names]
    first = torch.autograd.grad(p.scalar(given), leaves, create_graph=True, allow_unused=True)
    total = sum(g.double().sin().sum() for g in first if g is not None and g.requires_grad)
    if not isinstance(total, Tensor):
        return {n: torch.zeros_like(x) for n, x in zip(p.names, leaves, strict=True)}
    second = torch.autograd.grad(total, leaves, allow_unused=True)
    return {n: torch.zeros_like(x) if g is None else g for n, x, g in zip(p.names, leaves, second, strict=True)}


def create_graph(p: Problem) -> None:
    """Against the reference in float64."""
    found = _second(p)
    with use_backend("reference"):
        exact, yardstick = _second(Problem(p.row, torch.float64)), _second(p)
    near(found, exact, yardstick, torch.float32)


def _tangents(p: Problem) -> dict[str, Tensor]:
    f, ts = p.of(*p.names)
    found = {"func": torch.func.jvp(f, ts, tuple(t.cos() for t in ts))[1].detach()}
    given = p.copied()
    with forward_ad.dual_level():
        duals = {n: forward_ad.make_dual(given[n], given[n].cos()) for n in p.names}
        tangent = forward_ad.unpack_dual(p.scalar({**given, **duals})).tangent
        found["dual"] = torch.zeros((), dtype=torch.float64) if tangent is None else tangent.detach()
    return found


def forward_mode(p: Problem) -> None:
    found = _tangents(p)
    with use_backend("reference"):
        exact, yardstick = _tangents(Problem(p.row, torch.float64)), _tangents(p)
    near(found, exact, yardstick, torch.float32)


def _batches(p: Problem) -> list[tuple[Callable[..., Tensor], list[tuple[Tensor, ...]]]]:
    """Functions with examples for each: of the first input, and of all of them."""
    found = []
    for names in {tuple(p.names[:1]), tuple(p.names)}:
        f, ts = p.of(*names)
        found.append((f, [ts, tuple(t * 0.5 for t in ts)]))
    return found


def vmap(p: Problem) -> None:
    for f, examples in _batches(p):
        stacked = [torch.stack(ts) for ts in zip(*examples, strict=True)]
        same(torch.vmap(f)(*stacked).detach(), torch.stack([f(*e).detach() for e in examples]), "vmap")


def _gradients(f: Callable[..., Tensor], ts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    leaves = [t.clone().requires_grad_() for t in ts]
    grads = torch.autograd.grad(f(*leaves), leaves, allow_unused=True, materialize_grads=True)
    return tuple(g.detach() for g in grads)


def func_grad(p: Problem) -> None:
    """``torch.func.grad``, and ``vmap`` of it."""
    for f, examples in _batches(p):
        g = torch.func.grad(f, argnums=tuple(range(len(examples[0]))))
        wanted = [_gradients(f, e) for e in examples]
        for a, b in zip(g(*examples[0]), wanted[0], strict=True):
            same(a.detach(), b, "func.grad")


def vmap_grad(p: Problem) -> None:
    for f, examples in _batches(p):
        g = torch.func.grad(f, argnums=tuple(range(len(examples[0]))))
        wanted = [_gradients(f, e) for e in examples]
        stacked = [torch.stack(ts) for ts in zip(*examples, strict=True)]
        for a, b in zip(torch.vmap(g)(*stacked), zip(*wanted, strict=True), strict=True):
            same(a.detach(), torch.stack(b), "vmap(grad)")


def jacobians(p: Problem) -> None:
    """``jacrev`` twice: every second derivative of one input."""

    def twice(q: Problem) -> dict[str, Tensor]:
        f, ts = q.of(q.names[0])
        return {"hessian": torch.func.jacrev(torch.func.jacrev(f))(*ts).detach()}

    found = twice(p)
    with use_backend("reference"):
        exact, yardstick = twice(Problem(p.row, torch.float64)), twice(p)
    near(found, exact, yardstick, torch.float32)


def batched_gradients(p: Problem) -> None:
    given = p.leaves()
    leaves = [given[n] for n in p.names]
    total = p.scalar(given)
    wanted = torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
    grads = torch.autograd.grad(
        total, leaves, torch.tensor([1.0, 0.5]).double(), is_grads_batched=True, allow_unused=True
    )
    for name, a, b in zip(p.names, grads, wanted, strict=True):
        if a is not None:
            same(a, torch.stack([b, b * 0.5]), f"batched {name}")


def aliased(p: Problem) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs in which each group of ``row.same`` is one tensor, and with copies in its place."""
    one, copies = p.copied(), p.copied()
    for first, *others in p.row.same:
        one |= dict.fromkeys(others, one[first])
        copies |= {n: copies[first].clone() for n in others}
    return one, copies


def twice_wanted(p: Problem) -> dict[str, Tensor]:
    """What a call with one tensor in several places must give: the sums of the copies' gradients."""
    wanted = results(p, p.leaves(inputs=aliased(p)[1]))
    for first, *others in p.row.same:
        if f"grad {first}" in wanted:
            wanted[f"grad {first}"] += sum(wanted.pop(f"grad {n}") for n in others)
    return wanted


def twice_found(p: Problem, call: Callable[[Any], Any] | None = None) -> dict[str, Tensor]:
    """The same with one tensor."""
    given = p.leaves(inputs=aliased(p)[1])
    for first, *others in p.row.same:
        given |= dict.fromkeys(others, given[first])
    found = results(p, given, call)
    return {n: t for n, t in found.items() if not any(n == f"grad {o}" for _, *os in p.row.same for o in os)}


def one_tensor(p: Problem) -> None:
    same(twice_found(p), twice_wanted(p), "one tensor")


def backward_twice(p: Problem) -> None:
    wanted, given = results(p), p.leaves()
    total = p.scalar(given)
    leaves = {**{n: given[n] for n in p.names}, **p.parameters()}
    for _ in range(2):
        grads = torch.autograd.grad(total, list(leaves.values()), retain_graph=True, allow_unused=True)
        for name, grad in zip(leaves, grads, strict=True):
            if grad is not None:
                same(grad, wanted[f"grad {name}"], f"backward twice, {name}")


def copies(p: Problem) -> None:
    """``deepcopy``, ``pickle`` and ``torch.save`` of the module, before and after use."""
    assert p.module is not None
    wanted = results(p)
    file = io.BytesIO()
    torch.save(p.module, file)
    file.seek(0)
    for other in (
        copy.deepcopy(p.module),
        pickle.loads(pickle.dumps(p.module)),
        torch.load(file, weights_only=False),
    ):
        q = Problem(p.row)
        q.module = other
        same(results(q), wanted, "copy")


def _shapes(p: Problem, found: tuple[Any, ...]) -> None:
    wanted = p(p.inputs)
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        if p.row.ragged is not None and i == p.row.ragged[0]:
            a = a[: b.shape[0]]
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            raise Wrong(f"out {i} is {a.dtype} {tuple(a.shape)}; eager gives {b.dtype} {tuple(b.shape)}")


def meta(p: Problem) -> None:
    """Shapes and dtypes, every tensor on the meta device."""
    q = Problem(p.row)
    q.module = None if q.module is None else q.module.to("meta")
    found = q({name: t.to("meta") for name, t in p.inputs.items()})
    if any(t.device.type != "meta" for t in found):
        raise Wrong("a result is not on meta")
    _shapes(p, found)


def fake(p: Problem) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        q = Problem.__new__(Problem)
        q.row, q.dtype, q.names = p.row, p.dtype, p.names
        q.module = None if p.row.build is None else p.row.build().eval()
        found = q({name: mode.from_tensor(t) for name, t in p.inputs.items()})
    _shapes(p, found)


def one_meta(p: Problem) -> None:
    """One argument on the meta device among those on the CPU: each in turn has to be refused."""
    reasons = {}
    for name in p.inputs:
        try:
            p({**p.copied(), name: p.inputs[name].to("meta")})
        except Exception as error:
            reasons[name] = f"{type(error).__name__}: {error}"
        else:
            raise Wrong(f"{name} on meta was accepted")
    silent = {n: r for n, r in reasons.items() if not any(w in r.lower() for w in ("meta", "device"))}
    if silent:
        raise Wrong(f"the message does not speak of the device: {silent}")
    raise RuntimeError("device: " + " | ".join(reasons.values()))


def without_grad(p: Problem) -> None:
    wanted = outputs(p, p.leaves())
    with torch.no_grad():
        same(outputs(p, p.leaves()), wanted, "no_grad")
    with torch.inference_mode():
        same(outputs(p, p.copied()), wanted, "inference_mode")


def subsets(p: Problem) -> None:
    """Each differentiable input and each parameter alone."""
    wanted = results(p)
    parameters = p.parameters()
    for name in [*p.names, *parameters]:
        for other, t in parameters.items():
            t.requires_grad_(other == name)
        given = p.leaves(name) if name in p.names else {n: t.detach() for n, t in p.copied().items()}
        found = results(p, given)
        expected = {n: t for n, t in wanted.items() if n.startswith("out") or n == f"grad {name}"}
        same(found, expected, f"{name} alone")
    for t in parameters.values():
        t.requires_grad_(True)


def strided(p: Problem) -> None:
    """Inputs that are not leaves and lie in memory in every other way."""

    def every_second(t: Tensor) -> Tensor:
        return torch.stack([t, t], -1)[..., 0]

    def transposed(t: Tensor) -> Tensor:
        return t.mT.contiguous().mT if t.ndim > 1 else t.clone()

    def shifted(t: Tensor) -> Tensor:
        return torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape)

    wanted = results(p)
    for change in (every_second, transposed, shifted):
        found = results(p, call=lambda x, change=change: p({n: change(t) for n, t in x.items()}))
        same(found, wanted, change.__name__)
    base = {n: t[:1].clone() if t.ndim and n in p.names else t for n, t in p.copied().items()}

    def expand(x: Any, copy: bool) -> Any:
        wide = {n: t.expand(p.inputs[n].shape) if n in p.names else t for n, t in x.items()}
        return p({n: t.clone() if copy else t for n, t in wide.items()})

    found = results(p, p.leaves(inputs=dict(base)), lambda x: expand(x, False))
    same(found, results(p, p.leaves(inputs=dict(base)), lambda x: expand(x, True)), "expanded")


def threads(p: Problem) -> None:
    """Four threads at once, each with a module and inputs of its own."""
    wanted, found, errors = results(p), {}, []
    problems = [Problem(p.row) for _ in range(4)]  # made here: torch's seed belongs to the process

    def work(i: int) -> None:
        try:
            found[i] = results(problems[i])
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    if errors:
        raise errors[0]
    if len(found) != 4:
        raise Wrong("a thread did not come back")
    for one in found.values():
        same(one, wanted, "thread")


def defaults(p: Problem) -> None:
    """Under another default dtype, and another default device."""
    wanted = results(p)
    for dtype in (torch.float64, torch.bfloat16):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            found = results(p)
        finally:
            torch.set_default_dtype(before)
        same(found, wanted, f"default {dtype}")
    given = p.copied()
    with torch.device("meta"):
        out = p.trimmed(p(given))
    same({f"out {i}": t.detach() for i, t in enumerate(out)}, outputs(p, p.inputs), "default device")


COLUMNS: dict[str, Column] = {
    "eager": eager,
    "export": export,
    "autocast": autocast,
    "checkpoint": checkpointed(False),
    "checkpoint, reentrant": checkpointed(True),
    "saved-tensor hooks": saved_hooks,
    "second derivative": create_graph,
    "forward mode": forward_mode,
    "vmap": vmap,
    "func.grad": func_grad,
    "vmap(grad)": vmap_grad,
    "jacrev(jacrev)": jacobians,
    "is_grads_batched": batched_gradients,
    "one tensor twice": one_tensor,
    "backward twice": backward_twice,
    "deepcopy, pickle": copies,
    "meta": meta,
    "FakeTensorMode": fake,
    "one argument on meta": one_meta,
    "no_grad, inference": without_grad,
    "some gradients": subsets,
    "strides": strided,
    "threads": threads,
    "defaults": defaults,
}
"""Those that run in the test's own process; :mod:`tests.compositions.fresh` has the others."""
