"""Exported files in another version of ONNX Runtime, which needs neither torch nor fastxattn there.

python -m tests.export.old_runtime write FOLDER      (where fastxattn is installed: small models, inputs, results)
python tests/export/old_runtime.py run FOLDER LIBRARY (in an environment with only onnxruntime and numpy)
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime


def write(folder: Path) -> None:
    """Small models and operators: ``<name>.onnx``, and ``<name>.npz`` with inputs and float64 results."""
    import copy

    from benchmarks.export_zoo import MODELS, build
    from fastxattn.export import to_onnx
    from fastxattn.export.flat import bind, tensors
    from fastxattn.export.verify import _double, _run
    from tests.export import models, test_operations

    folder.mkdir(parents=True, exist_ok=True)
    cases = {}
    for model in MODELS:
        module, inputs = build(model, True, True)
        cases[model.name] = (module, inputs(2), inputs(3), model.dynamic)
    packed = models.packed
    for name, module, widths in (
        ("varlen", models.Varlen(), (32, 24)),
        ("importance", test_operations.Importance(), (32, 16)),
        ("context", test_operations.Context(), (32, 16)),
        ("prune", test_operations.Prune(), (8,)),
        ("late", test_operations.Late(), (8, 8)),
    ):
        args = [[packed(*n, width=w, seed=w) for w in widths] for n in ((2, 3), (4, 0, 1))]
        cases[name] = (module.eval(), *args, True)
    cases["bare"] = (models.Bare().eval(), models.bare_inputs(), models.bare_inputs(), True)
    for name, (module, example, args, dynamic) in cases.items():
        file = name.replace("/", " ")
        to_onnx(module, example, folder / f"{file}.onnx", dynamic=dynamic, overwrite=True)
        results, outputs = _run(copy.deepcopy(module).double(), *_double((tuple(args), {})))
        given = tensors(bind(module, args, {}))
        arrays = {f"in {n}": x.numpy() for n, x in given.items()}
        arrays |= {f"out {n}": x.numpy() for n, x in zip(outputs, results, strict=True)}
        np.savez(folder / f"{file}.npz", **arrays)
        print("wrote", file, flush=True)


def worst_error(session: onnxruntime.InferenceSession, arrays: dict[str, np.ndarray]) -> float:
    """Largest error relative to the output's largest value; infinite for another shape or NaN elsewhere."""
    feeds = {i.name: arrays[f"in {i.name}"] for i in session.get_inputs()}
    error = 0.0
    for value, got in zip(session.get_outputs(), session.run(None, feeds), strict=True):
        want = arrays[f"out {value.name}"]
        if got.shape != want.shape or not np.array_equal(np.isfinite(got), np.isfinite(want)):
            return float("inf")
        finite = np.isfinite(want)
        size = max(1.0, float(np.abs(want[finite]).max(initial=0.0)))
        error = max(error, float(np.abs(got[finite] - want[finite]).max(initial=0.0)) / size)
    return error


def run(folder: Path, library: Path) -> bool:
    """Every file with and without the library; True when each is within 1e-5 of its results."""
    good = True
    for path in sorted(folder.glob("*.onnx")):
        with np.load(path.with_suffix(".npz")) as saved:
            arrays = dict(saved)
        for side in ("portable", "library"):
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 4
            if side == "library":
                options.register_custom_ops_library(str(library))
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            try:
                error = worst_error(session, arrays)
                verdict = f"{error:.1e}{'' if error <= 1e-5 else '  FAILED'}"
            except Exception as fault:
                error, verdict = float("inf"), f"FAILED {fault}"
            good &= error <= 1e-5
            print(f"{path.stem:<36} {side:<9} {verdict}")
    print(f"onnxruntime {onnxruntime.__version__}: {'all passed' if good else 'FAILED'}")
    return good


if __name__ == "__main__":
    command, folder = sys.argv[1], Path(sys.argv[2])
    if command == "write":
        write(folder)
    else:
        raise SystemExit(not run(folder, Path(sys.argv[3])))
