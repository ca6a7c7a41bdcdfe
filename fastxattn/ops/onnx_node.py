"""Nodes of the domain ``fastxattn`` for torch's exporter, shared by the ``ops/<op>/onnx.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from onnx import TensorProto
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
    """The operator that ``function`` is the portable body of, called where a graph needs its node.

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


def translation(problem: type[Arguments], made: values.Op, **absent: TensorProto) -> Callable[..., Any]:
    """What torch's exporter calls for an operator with this problem's arguments: it writes the node.

    Args:
        problem: its tensors are the node's inputs, its numbers the attributes.
        made: the node.
        absent: the empty tensor that stands for None, by input; int32 with one axis where none is given.
    """

    def translate(*arguments: Any) -> Any:
        by_name = dict(zip(problem.names, arguments, strict=True))
        inputs = [given(by_name[name], absent.get(name, NO_INTS)) for name in problem.tensors]
        return made(*inputs, **{name: by_name[name] for name in problem.numbers})

    return translate
