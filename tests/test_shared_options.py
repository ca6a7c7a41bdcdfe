"""Options that operations share with attention: each is a field of the problem and reaches every list made of it."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import fastxattn
from fastxattn.ops import absorbed_attention, co_attention, importance
from fastxattn.ops.absorbed_attention import backends as absorbed_backends
from fastxattn.ops.absorbed_attention import problem as absorbed_problem
from fastxattn.ops.arguments import Arguments
from fastxattn.ops.attention.problem import Problem as AttentionProblem
from fastxattn.ops.co_attention import backends as co_backends
from fastxattn.ops.co_attention import problem as co_problem
from fastxattn.ops.importance import backends as importance_backends
from fastxattn.ops.importance import problem as importance_problem
from fastxattn.runtime import fast_path, native
from fastxattn.runtime.backend import use_backend

ATTENTION = tuple(inspect.signature(AttentionProblem).parameters)
HEADS, WIDTH, LENGTHS = 2, 8, ([40, 12], [40, 24])  # enough tokens for co-attention's own kernel


@dataclass(frozen=True)
class Operation:
    """What a row of the table needs."""

    function: Callable[..., Any]
    problem: type[Arguments]
    backends: ModuleType
    operator: str
    run: Callable[[Any, str], Any]
    internal: tuple[str, ...] = ()  # fields that the public function does not take


OPERATIONS = {
    "importance": Operation(
        importance.key_importance,
        importance_problem.Problem,
        importance_backends,
        "importance_cpu",
        importance_backends.run,
        ("seqused_q", "seqused_k"),
    ),
    "co_attention": Operation(
        co_attention.co_attention, co_problem.Problem, co_backends, "co_attention_cpu", co_backends.run
    ),
    "absorbed_attention": Operation(
        absorbed_attention.absorbed_attention,
        absorbed_problem.Problem,
        absorbed_backends,
        "absorbed_attention_cpu",
        lambda problem, backend: absorbed_backends.run(problem, None, backend),
    ),
}


def shared_with_attention(field: str) -> str | None:
    """Attention's name of a field, without the suffix of a side; None where attention has no such field."""
    bare = field.removesuffix("_a").removesuffix("_b")
    return next((name for name in (field, bare, f"{bare}_q") if name in ATTENTION), None)


OPTIONS = [
    (name, field)
    for name, operation in OPERATIONS.items()
    for field in operation.problem.names
    if shared_with_attention(field) and hasattr(operation.problem, field)  # a default: it is an option
]


def filled(problem: type[Arguments]) -> Any:
    """A problem by its fields, options at their defaults; side a of co-attention has the queries' lengths."""
    g = torch.Generator().manual_seed(0)
    of_q, of_k = (sum(lengths) for lengths in LENGTHS)
    made: dict[str, Tensor] = {"lse": torch.full((HEADS, of_q), 3.0), "context": torch.randn(of_k, WIDTH, generator=g)}
    made["query"] = torch.randn(of_q, HEADS, WIDTH, generator=g)
    made["key"] = torch.randn(of_k, HEADS, WIDTH, generator=g)
    for side, lengths in (("q", LENGTHS[0]), ("k", LENGTHS[1]), ("a", LENGTHS[0]), ("b", LENGTHS[1])):
        made[f"cu_seqlens_{side}"] = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32)
        for what in ("query", "value"):
            made[f"{what}_{side}"] = torch.randn(sum(lengths), HEADS, WIDTH, generator=g)
    return problem(**{name: made[name] for name in problem.names if name in made}, scale=WIDTH**-0.5)  # type: ignore[call-arg]


def changed(problem: Any, field: str) -> Any:
    """The same with one option that matters to the result."""
    of_q, of_k = (sum(lengths) for lengths in LENGTHS)
    rows = of_q if field.endswith("_a") else of_k
    values: dict[str, Callable[[], Any]] = {
        "seqused_q": lambda: torch.tensor([20, 1], dtype=torch.int32),
        "seqused_k": lambda: torch.tensor([7, 24], dtype=torch.int32),
        "query_index": lambda: torch.arange(of_q, dtype=torch.int32).flip(0),
        "key_index": lambda: torch.arange(of_k, dtype=torch.int32).flip(0),
        "kv_range": lambda: torch.tensor([[3, 20]] * of_q, dtype=torch.int32),
        "key_bias": lambda: torch.linspace(-1, 1, rows),
        "scale": lambda: 0.7,
        "softcap": lambda: 0.8,
        "dropout_p": lambda: 0.4,
    }
    more = {"dropout_seed": torch.tensor([3, 4])} if field.startswith("dropout") else {}
    name = shared_with_attention(field)
    assert name is not None
    value = {"dropout_p": 0.4} if name == "dropout_seed" else {field: values[name]()}
    return problem.replace(**value | more)


@pytest.mark.parametrize(("name", "field"), OPTIONS)
def test_an_option_changes_every_backend_alike(name: str, field: str) -> None:
    if reason := native.cpu_library().reason:
        pytest.skip(reason)
    operation = OPERATIONS[name]
    plain = filled(operation.problem)
    problem = changed(plain, field)
    results = {b: operation.run(problem, b) for b in ("cpu", "reference")}
    found, expected = (torch.cat([t.flatten() for t in tensors(results[b])]) for b in ("cpu", "reference"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    before = torch.cat([t.flatten() for t in tensors(operation.run(plain, "cpu"))])
    assert not torch.allclose(found, before, rtol=1e-3, atol=1e-4), f"{field} changes nothing"


def tensors(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_list_of_arguments_is_that_of_the_problem(name: str) -> None:
    operation = OPERATIONS[name]
    schema = getattr(torch.ops.fastxattn, operation.operator).default._schema
    assert tuple(a.name for a in schema.arguments) == operation.problem.names
    public = inspect.signature(operation.function).parameters
    assert [n for n in operation.problem.names if n not in public] == list(operation.internal)
    defaults = {n: p.default for n, p in public.items() if n in operation.problem.numbers}
    assert defaults.pop("scale") is None
    assert defaults == {n: getattr(operation.problem, n) for n in defaults}
    pytest.importorskip("onnxscript")
    if name != "co_attention":  # ONNX files hold it as two calls of attention
        face = importlib.import_module(f"fastxattn.ops.{name}.onnx")
        node = face.NODE.op_schema
        assert tuple(i.name for i in node.inputs) == operation.problem.tensors
        assert set(node.attributes) == set(operation.problem.numbers)


@pytest.mark.parametrize(("name", "field"), [o for o in OPTIONS if o[0] != "absorbed_attention"])
def test_attention_gets_every_option(name: str, field: str) -> None:
    problem: Any = changed(filled(OPERATIONS[name].problem), field)
    given = getattr(problem, field)
    if name == "importance":
        assert getattr(problem.attention(), field) is given
        return
    for reader in (0, 1):
        role = next((role for role, own in co_problem.roles(reader).items() if own == field), field)
        if hasattr(problem.direction(reader), role):
            got = getattr(problem.direction(reader), role)
            assert torch.equal(got, given[reader : reader + 1]) if field == "dropout_seed" else got is given


@pytest.mark.parametrize("name", OPERATIONS)
def test_errors_of_the_machine_are_raised_as_they_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sound arguments are not tried a second time; those that need a conversion are."""
    if reason := native.cpu_library().reason:
        pytest.skip(reason)
    operation = OPERATIONS[name]
    problem: Any = filled(operation.problem)
    expected = tensors(operation.run(problem, "auto"))  # loads the library
    calls: list[int] = []

    def out_of_memory(*arguments: Any) -> Any:
        calls.append(1)
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setitem(operation.backends.FORWARD, "cpu", out_of_memory)
        with pytest.raises(RuntimeError, match="out of memory"):
            operation.run(problem, "auto")
        assert len(calls) == 1
        first = problem.names[0]
        strided = getattr(problem, first).transpose(1, 2).contiguous().transpose(1, 2)
        with pytest.raises(RuntimeError, match="out of memory"):
            operation.run(problem.replace(**{first: strided}), "auto")
        assert len(calls) == 3

        def interrupted(*arguments: Any) -> Any:
            raise KeyboardInterrupt

        patch.setitem(operation.backends.FORWARD, "cpu", interrupted)
        with pytest.raises(KeyboardInterrupt):
            operation.run(problem, "auto")
    for a, b in zip(tensors(operation.run(problem, "auto")), expected, strict=True):
        assert torch.equal(a, b)


def test_the_fast_path_is_closed_where_something_has_to_be_decided() -> None:
    problem = filled(importance_problem.Problem)
    fastxattn.key_importance(*(getattr(problem, n) for n in problem.names[:5]))
    assert fast_path.allowed(problem, "auto") == (native.cpu_library().reason is None)
    assert not fast_path.allowed(problem, "reference")
    assert not fast_path.allowed(problem.replace(query=problem.query.to("meta")), "auto")
    assert not fast_path.allowed(problem.replace(query=None), "auto")
    with use_backend("reference"):
        assert not fast_path.allowed(problem, "auto")
    with torch.autocast("cpu", torch.bfloat16):
        assert not fast_path.allowed(problem, "auto")
