"""Export: ONNX files that run anywhere and run fast with the operator library, and AOTInductor packages.

Needs the ``onnx`` extra (``pip install 'fastxattn[onnx]'``).
"""

try:
    import onnx as _onnx  # noqa: F401
    import onnxruntime as _onnxruntime  # noqa: F401
    import onnxscript as _onnxscript  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"fastxattn.export needs onnx, onnxscript and onnxruntime ({error.name} is missing): "
        "pip install 'fastxattn[onnx]', or 'fastxattn[onnx-gpu]'"
    ) from error

from fastxattn.export.aoti import Package, load_kernels, to_aoti
from fastxattn.export.inspect import Finding, Inspection, inspect
from fastxattn.export.onnx import Exported, to_onnx
from fastxattn.export.optimize import Optimized, optimize
from fastxattn.export.session import Session, ort_library_path, session_options
from fastxattn.export.verify import Verification, verify

__all__ = [
    "Exported",
    "Finding",
    "Inspection",
    "Optimized",
    "Package",
    "Session",
    "Verification",
    "inspect",
    "load_kernels",
    "optimize",
    "ort_library_path",
    "session_options",
    "to_aoti",
    "to_onnx",
    "verify",
]
