"""A node of our own domain for torch's exporter: what the ``ops/<op>/onnx.py`` rooms share."""

from __future__ import annotations

from onnx.defs import OpSchema
from onnxscript import OnnxFunction, values

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
    """The operator that ``function`` is the portable body of, to be called where its node is wanted.

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
