"""ONNX forms of the operators, from ``ops/<op>/onnx.py``: translations for torch's exporter, and functions."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import onnx
import torch

from fastxattn.export import aten
from fastxattn.ops.onnx_parts import inlined

DOMAIN = "fastxattn"
FORMS = ("loop", "padded")
OPERATIONS = ("attention", "absorbed_attention", "importance", "late_interaction", "pruning", "retrieval")


@functools.cache
def _modules() -> tuple[Any, ...]:
    return tuple(importlib.import_module(f"fastxattn.ops.{name}.onnx") for name in OPERATIONS)


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """From each compiled operator to the function that writes its node: torch's ``custom_translation_table``."""
    for operation in OPERATIONS:
        importlib.import_module(f"fastxattn.ops.{operation}")  # defines the operators
    nodes = {
        getattr(torch.ops.fastxattn, name).default: translate
        for module in _modules()
        for name, translate in module.TRANSLATIONS.items()
    }
    return {**aten.TRANSLATIONS, **nodes}


def functions(form: str, opset: int) -> dict[str, onnx.FunctionProto]:
    """The portable bodies by node name, importing ``opset``: a function must import the opset of its model.

    The bodies use nothing that changed its meaning between opsets 18 and 24.
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}; got {form!r}")
    protos: dict[str, onnx.FunctionProto] = {}
    for module in _modules():
        for name, bodies in module.bodies().items():
            proto = inlined(bodies.get(form, bodies["loop"]))
            proto.name = name
            del proto.opset_import[:]
            proto.opset_import.append(onnx.helper.make_opsetid("", opset))
            protos[name] = proto
    return protos
