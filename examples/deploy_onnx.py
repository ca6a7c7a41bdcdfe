"""Deploy with ONNX Runtime: export a Perceiver resampler, verify it, run it in a process that has no torch.

python examples/deploy_onnx.py [FOLDER]
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from fastxattn import PackedTokens, export
from fastxattn.nn import MultiheadCrossAttention

SERVE = """
import sys, numpy, onnxruntime
path, library = sys.argv[1:]
def session(registered):
    options = onnxruntime.SessionOptions()
    if registered:
        options.register_custom_ops_library(library)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
random = numpy.random.default_rng(0)
lengths = [64, 1, 300]  # other lengths and another batch than the example's
feeds = {}
for value in session(False).get_inputs():
    sizes = {"query": (len(lengths), 8, 64), "image_values": (sum(lengths), 96)}
    if value.name.endswith("cu_seqlens"):
        feeds[value.name] = numpy.cumsum([0, *lengths]).astype("int32")
    elif value.name in sizes:
        feeds[value.name] = random.standard_normal(sizes[value.name]).astype("float32")
    else:
        raise SystemExit(f"unexpected input {value.name}")
portable, fast = (session(r).run(None, feeds)[0] for r in (False, True))
assert "torch" not in sys.modules
print("outputs", fast.shape, "library and portable body differ by", abs(fast - portable).max())
assert abs(fast - portable).max() < 1e-4
"""


class Reader(torch.nn.Module):
    """Learned queries read the tokens of an image, however many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = MultiheadCrossAttention(64, 4, kdim=96, vdim=96)

    def forward(self, query: torch.Tensor, image: PackedTokens) -> torch.Tensor:
        return self.attention(query, image)  # type: ignore[no-any-return]


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "build/deploy")
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = Reader().eval()
    example = torch.randn(2, 8, 64), PackedTokens.from_list([torch.randn(n, 96) for n in (37, 5)])
    path = folder / "reader.onnx"
    print(export.to_onnx(model, example, path, overwrite=True))
    checked = export.verify(path, model, example)
    print(checked)
    if not checked.ok:
        sys.exit(1)
    command = [sys.executable, "-c", SERVE, str(path), str(export.ort_library_path())]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
