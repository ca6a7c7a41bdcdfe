"""Running an exported file on torch tensors, without copies, with the operator library where it is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor

from fastxattn.runtime.native import LIBRARY_DIR

_LIBRARIES = {
    "cpu": ("libfastxattn_ort.so", "pip install --no-build-isolation ."),
    "cuda": ("libfastxattn_ort_cuda.so", "python csrc/bindings/cuda/build.py"),
}
_DEVICES = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_TYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16,
    "tensor(double)": torch.float64,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(int8)": torch.int8,
    "tensor(uint8)": torch.uint8,
    "tensor(bool)": torch.bool,
}
_ONNX_TYPES = {
    torch.float32: 1,
    torch.uint8: 2,
    torch.int8: 3,
    torch.int32: 6,
    torch.int64: 7,
    torch.bool: 9,
    torch.float16: 10,
    torch.float64: 11,
    torch.bfloat16: 16,
}


def ort_library_path(device: str = "cpu") -> Path:
    """The operator library, for ``session_options.register_custom_ops_library(str(path))`` in any language.

    ``"cuda"``: its twin, with the CPU's operators and those of the CUDA provider. A session registers one of the two.

    Raises:
        FileNotFoundError: it was not built with this installation.
        ValueError: an unknown device.
    """
    if device not in _LIBRARIES:
        raise ValueError(f"device must be one of {', '.join(_LIBRARIES)}; got {device!r}")
    name, command = _LIBRARIES[device]
    path = LIBRARY_DIR / name
    if not path.exists():
        raise FileNotFoundError(
            f"the ONNX Runtime operators for {device} were not built with this installation ({path} is missing); "
            f"build them with `{command}`"
        )
    return path


def session_options(
    *, library: bool = True, threads: int | None = None, device: str = "cpu"
) -> onnxruntime.SessionOptions:
    """ONNX Runtime options with the fastxattn operators registered (``library``) and ``threads`` intra-op threads.

    On CUDA without the twin library nothing is registered: portable bodies run on the device, where the CPU's operators
    would have everything copied to the host and back.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    if library and not (device == "cuda" and not (LIBRARY_DIR / _LIBRARIES[device][0]).exists()):
        options.register_custom_ops_library(str(ort_library_path(device)))
    return options


class Session:
    """An ONNX file as a function of torch tensors.

    Inputs are passed without a copy and outputs come back as torch tensors over the runtime's memory: nothing is
    copied on the CPU or on a CUDA device.

    Args:
        path: the ONNX file.
        library: register the fastxattn operators; False runs the portable bodies.
        device: ``"cpu"`` or ``"cuda"`` (needs onnxruntime-gpu).
        threads: intra-op threads; the runtime's own choice when None.

    Raises:
        RuntimeError: the device's provider is not in this onnxruntime.

    Example:
        >>> session = fastxattn.export.Session("model.onnx")
        >>> (out,) = session(query, key)
    """

    def __init__(
        self, path: str | Path, *, library: bool = True, device: str = "cpu", threads: int | None = None
    ) -> None:
        if device not in _DEVICES:
            raise ValueError(f"device must be one of {', '.join(_DEVICES)}; got {device!r}")
        provider = _DEVICES[device]
        if provider not in onnxruntime.get_available_providers():
            raise RuntimeError(f"this onnxruntime has no {provider}; pip install 'fastxattn[onnx-gpu]'")
        self.device = device
        self._session = onnxruntime.InferenceSession(
            str(path), session_options(library=library, threads=threads, device=device), providers=[provider]
        )
        self.input_names = [value.name for value in self._session.get_inputs()]
        self.output_names = [value.name for value in self._session.get_outputs()]
        self._types = {value.name: value.type for value in self._session.get_inputs()}

    def __call__(self, *args: Tensor, **named: Tensor) -> tuple[Tensor, ...]:
        """Run on tensors in the order of ``input_names``, or by name.

        Raises:
            TypeError: a tensor's dtype is not the file's.
            ValueError: an input is missing, unknown, or on another device.
        """
        feeds = self._feeds(args, named)
        binding = self._session.io_binding()
        for name, tensor in feeds.items():
            shape = list(tensor.shape)
            binding.bind_input(name, self.device, 0, _ONNX_TYPES[tensor.dtype], shape, _address(tensor))
        for name in self.output_names:
            binding.bind_output(name, self.device)
        self._session.run_with_iobinding(binding)
        return tuple(_to_torch(value) for value in binding.get_outputs())

    def takes(self, args: Sequence[Tensor]) -> bool:
        """Whether the sizes are those that the file fixes."""
        declared = [value.shape for value in self._session.get_inputs()]
        return all(
            not isinstance(size, int) or size == given
            for sizes, x in zip(declared, args, strict=True)
            for size, given in zip(sizes, x.shape, strict=True)
        )

    def _feeds(self, args: Sequence[Tensor], named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if len(args) > len(self.input_names):
            raise ValueError(f"at most {len(self.input_names)} inputs ({self.input_names}); got {len(args)}")
        feeds = {**dict(zip(self.input_names, args, strict=False)), **named}
        missing = [name for name in self.input_names if name not in feeds]
        unknown = [name for name in feeds if name not in self._types]
        if missing or unknown:
            raise ValueError(f"inputs missing: {missing}, unknown: {unknown}; the file has {self.input_names}")
        for name, tensor in feeds.items():
            if tensor.dtype != _TYPES.get(self._types[name]):
                raise TypeError(f"{name} must be {self._types[name]}; got {tensor.dtype}")
            if tensor.device.type != self.device:
                raise ValueError(f"{name} must be on {self.device}; got {tensor.device}")
        return {name: tensor.detach().resolve_conj().resolve_neg().contiguous() for name, tensor in feeds.items()}


_NOTHING = torch.zeros(1, dtype=torch.int64)


def _address(tensor: Tensor) -> int:
    # An empty tensor has no address, and the runtime refuses a null one.
    return tensor.data_ptr() or _NOTHING.data_ptr()


def _to_torch(value: Any) -> Tensor:
    inner = getattr(value, "_ortvalue", value)
    if value.data_type() == "tensor(bool)":  # DLPack has no boolean here: it travels as bytes
        return torch.utils.dlpack.from_dlpack(inner.to_dlpack()).to(torch.bool)
    return torch.utils.dlpack.from_dlpack(inner.to_dlpack())
