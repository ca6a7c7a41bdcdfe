"""Nodes of the fastxattn domain for torch's exporter: what every ``ops/<op>/onnx.py`` shares."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import onnx
from onnx.defs import OpSchema
from onnxscript import OnnxFunction, values

from fastxattn.ops.arguments import Arguments
from fastxattn.ops.onnx_parts import NO_INTS, given

DOMAIN = values.Opset("fastxattn", 1)
_TYPES = {
    "FLOAT": "tensor(float)",
    "FLOAT16": "tensor(float16)",
    "BFLOAT16": "tensor(bfloat16)",
    "INT32": "tensor(int32)",
    "INT64": "tensor(int64)",
    "BOOL": "tensor(bool)",
}


def node(function: OnnxFunction) -> values.Op:
    """The operator that ``function`` is the portable body of, to be called where its node belongs.

    Calling the function itself would make the exporter inline it.
    """
    signature = function.op_signature
    constraints = {
        p.type_constraint.name: p.type_constraint.allowed_types for p in (*signature.inputs, *signature.outputs)
    }
    names = {name: sorted(_TYPES[t.dtype.name] for t in types) for name, types in constraints.items()}
    schema = OpSchema(
        function.name,
        DOMAIN.domain,
        1,
        inputs=[OpSchema.FormalParameter(p.name, p.type_constraint.name) for p in signature.inputs],
        outputs=[OpSchema.FormalParameter(p.name, p.type_constraint.name) for p in signature.outputs],
        type_constraints=[(name, types, "") for name, types in names.items()],
        attributes=[
            OpSchema.Attribute(p.name, OpSchema.AttrType(p.type.value), "", required=p.required)
            for p in signature.attributes
        ],
    )
    return values.Op(DOMAIN, function.name, schema)


def call(node: values.Op, problem: Arguments, empty: Mapping[str, onnx.TensorProto]) -> Any:
    """``node`` on the problem's fields: tensors are inputs, in order, and numbers attributes.

    Args:
        node: as from :func:`node`; fields that it does not have are left out.
        problem: holds symbolic values.
        empty: by input, the constant that stands for an absent tensor; an empty int32 vector for all others.
    """
    schema = node.op_schema
    assert schema is not None
    inputs = [given(getattr(problem, i.name), empty.get(i.name, NO_INTS)) for i in schema.inputs]
    return node(*inputs, **{name: getattr(problem, name) for name in schema.attributes})


def translation(problem: type[Arguments]) -> Callable[[Callable[[Any], Any]], Callable[..., Any]]:
    """Decorate a function of a problem as a function of its fields, which is what torch's exporter calls."""

    def decorate(function: Callable[[Any], Any]) -> Callable[..., Any]:
        def translate(*arguments: Any) -> Any:
            return function(problem.of(arguments))

        translate.__doc__, translate.__name__ = function.__doc__, function.__name__
        parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in problem.names]
        translate.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return translate

    return decorate
