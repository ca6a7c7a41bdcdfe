"""Exported models in ONNX Runtime: the operator library against the portable body and the runtime's own attention.

    python -m benchmarks.bench_export [--match TEXT] [--full] [--rounds N]

Every provider is a session of this process on the same numbers, with the same number of threads, which are told to
stop spinning when a run ends: otherwise one session's threads would slow the next one's run. The runtime's own
operators get padded inputs in the layout they like best, and a mask that they accept.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper
from torch import Tensor

from benchmarks.common import main, nbytes
from benchmarks.export_zoo import MODELS, Model, build
from benchmarks.harness import Case, Workload
from fastxattn.export import to_onnx
from fastxattn.export.flat import bind, tensors
from fastxattn.export.operations import functions
from fastxattn.export.session import session_options
from fastxattn.export.verify import PARITY
from fastxattn.testing import measure_error

ROOT = Path(__file__).resolve().parents[1]
HEADS, DIM, SEQUENCES = 12, 64, 16
TEXT = [5 + i * 72 // 15 for i in range(SEQUENCES)]
IMAGE = [64 + i * 960 // 15 for i in range(SEQUENCES)]


class Runtime:
    """A session whose inputs are bound once: what is timed is the run."""

    def __init__(self, model: onnx.ModelProto | Path, feeds: dict[str, Tensor], library: bool = False) -> None:
        options = session_options(library=library, threads=torch.get_num_threads())
        options.add_session_config_entry("session.force_spinning_stop", "1")
        source = str(model) if isinstance(model, Path) else model.SerializeToString()
        self.session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        self.binding = self.session.io_binding()
        for value in self.session.get_inputs():
            self.binding.bind_ortvalue_input(
                value.name, onnxruntime.OrtValue.ortvalue_from_numpy(feeds[value.name].contiguous().numpy())
            )
        for value in self.session.get_outputs():
            self.binding.bind_output(value.name)

    def __call__(self) -> None:
        self.session.run_with_iobinding(self.binding)

    def outputs(self) -> list[Tensor]:
        self()
        return [torch.from_numpy(x) for x in self.binding.copy_outputs_to_cpu()]


def model_of(nodes: list[onnx.NodeProto], inputs: dict[str, Tensor], outputs: list[str], opset: int) -> onnx.ModelProto:
    """A graph of ``nodes``; input types are those of the tensors, all axes open."""
    types = {torch.float32: TensorProto.FLOAT, torch.int32: TensorProto.INT32, torch.bool: TensorProto.BOOL}
    graph = helper.make_graph(
        nodes,
        "benchmark",
        [
            helper.make_tensor_value_info(name, types[x.dtype], [f"{name}_{i}" for i in range(x.ndim)])
            for name, x in inputs.items()
        ],
        [helper.make_value_info(name, helper.make_tensor_type_proto(TensorProto.FLOAT, None)) for name in outputs],
    )
    domains = {"": opset, "fastxattn": 1, "com.microsoft": 1}
    own = [f for name, f in functions("loop", opset).items() if any(n.op_type == name for n in nodes)]
    opsets = [helper.make_opsetid(name, version) for name, version in domains.items()]
    return helper.make_model(graph, opset_imports=opsets, functions=own, ir_version=10)


def varlen_node(source: str = "query", result: str = "out") -> list[onnx.NodeProto]:
    """fastxattn::Attention with nothing optional."""
    empty = {"i": ([0], TensorProto.INT32), "r": ([0, 2], TensorProto.INT32), "k": ([0], TensorProto.FLOAT)}
    empty["b"] = ([0, 0, 0, 0], TensorProto.FLOAT)
    constants = [
        helper.make_node("Constant", [], [name], value=helper.make_tensor(name, kind, shape, []))
        for name, (shape, kind) in empty.items()
    ]
    names = [source, "key", "value", "cu_seqlens_q", "cu_seqlens_k", "i", "i", "i", "i", "r", "k", "b"]
    attributes = {"scale": DIM**-0.5, "softcap": 0.0}
    outputs = [result, f"{result}_lse"]  # a runtime without the operator infers both of the function's outputs
    return [*constants, helper.make_node("Attention", names, outputs, domain="fastxattn", **attributes)]


class Inputs:
    """One ragged problem, packed and padded."""

    def __init__(self, lengths_q: list[int], lengths_k: list[int]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.lengths = lengths_q, lengths_k
        rows = sum(lengths_q), sum(lengths_k), sum(lengths_k)
        packed = [torch.randn(n, HEADS, DIM, generator=generator) for n in rows]
        offsets = [torch.tensor([0, *x]).cumsum(0).to(torch.int32) for x in self.lengths]
        self.packed = dict(
            zip(("query", "key", "value", "cu_seqlens_q", "cu_seqlens_k"), packed + offsets, strict=True)
        )
        self.each = [t.split(n) for t, n in zip(packed, (lengths_q, lengths_k, lengths_k), strict=True)]
        pad = torch.nn.utils.rnn.pad_sequence
        q, k, v = (pad(list(x), batch_first=True) for x in self.each)
        present = torch.arange(k.shape[1]) < torch.tensor(lengths_k)[:, None]
        heads_first = {name: t.transpose(1, 2).contiguous() for name, t in zip("qkv", (q, k, v), strict=True)}
        # The operator refuses a mask that broadcasts over queries.
        self.native = {**heads_first, "mask": present[:, None, None, :].expand(-1, 1, q.shape[1], -1).contiguous()}
        self.contrib = {n: t.flatten(2).contiguous() for n, t in zip("qkv", (q, k, v), strict=True)}
        self.contrib["lengths"] = torch.tensor(lengths_k, dtype=torch.int32)

    def exact(self, dtype: torch.dtype) -> Tensor:
        parts = [[x.to(dtype).transpose(0, 1) for x in xs] for xs in self.each]
        results = [(q @ k.mT * DIM**-0.5).softmax(-1) @ v for q, k, v in zip(*parts, strict=True)]
        return torch.cat([x.transpose(0, 1) for x in results])


def attention_workload(lengths_q: list[int], lengths_k: list[int]) -> Workload:
    data = Inputs(lengths_q, lengths_k)
    file = model_of(varlen_node(), data.packed, ["out"], 18)
    native = helper.make_node("Attention", ["q", "k", "v", "mask"], ["out"])
    contrib = helper.make_node(
        "MultiHeadAttention", ["q", "k", "v", "", "lengths"], ["out"], domain="com.microsoft", num_heads=HEADS
    )
    ours = Runtime(file, data.packed, library=True)
    providers: dict[str, Callable[[], object]] = {
        "fastxattn library": ours,
        "portable body": Runtime(file, data.packed),
        "Attention, padded": Runtime(model_of([native], data.native, ["out"], 23), data.native),
        "MultiHeadAttention, padded": Runtime(model_of([contrib], data.contrib, ["out"], 18), data.contrib),
    }

    def check() -> str:
        report = measure_error("out", ours.outputs()[0], data.exact(torch.float64), data.exact(torch.float32))
        return "ok" if report.ok else str(report)

    pairs = sum(q * k for q, k in zip(lengths_q, lengths_k, strict=True))
    moved = nbytes(*data.packed.values(), data.packed["query"])
    return Workload(providers, "MultiHeadAttention, padded", check, flops=4 * HEADS * DIM * pairs, bytes=moved)


def overhead_workload(nodes: int = 1000) -> Workload:
    """A chain of ``nodes`` attention nodes over one query and one key, beside a chain of the runtime's smallest node.

    The times are per chain: divide by ``nodes`` for one node.
    """
    one = {name: torch.randn(1, 1, 8) for name in ("query", "key", "value")}
    one |= {name: torch.tensor([0, 1], dtype=torch.int32) for name in ("cu_seqlens_q", "cu_seqlens_k")}
    chain, plain = varlen_node(result="x0"), [helper.make_node("Neg", ["query"], ["x0"])]
    for i in range(1, nodes):
        chain.append(varlen_node(source=f"x{i - 1}", result=f"x{i}")[-1])
        plain.append(helper.make_node("Neg", [f"x{i - 1}"], [f"x{i}"]))
    last = f"x{nodes - 1}"
    ours = Runtime(model_of(chain, one, [last], 18), one, library=True)
    rival = Runtime(model_of(plain, {"query": one["query"]}, [last], 18), one)

    def check() -> str:
        return "ok" if torch.equal(ours.outputs()[0], one["value"]) else "one key must give its value"

    return Workload({"fastxattn library": ours, "Neg": rival}, rival="Neg", check=check)


def exported(model: Model, accelerated: bool) -> Path:
    """The model's file at its real size, kept in build/ (exporting takes up to some minutes)."""
    path = ROOT / "build/bench_export" / f"{model.name.replace('/', '-')}{' accelerated' if accelerated else ''}.onnx"
    if not path.exists():
        module, inputs = build(model, small=False, accelerated=accelerated)
        start = time.perf_counter()
        print(to_onnx(module, inputs(2), path, dynamic=model.dynamic), f"in {time.perf_counter() - start:.0f} s")
    return path


def model_workload(model: Model) -> Workload:
    """A whole model: with the library, without it, and the same module exported without ``accelerate``."""
    module, inputs = build(model, small=False, accelerated=False)
    torch.manual_seed(1)
    args = inputs(model.batch)
    feeds = tensors(bind(module, args, {}))
    ours = Runtime(exported(model, True), feeds, library=True)
    portable = Runtime(exported(model, True), feeds)
    providers: dict[str, Callable[[], object]] = {"fastxattn library": ours, "portable body": portable}
    plain = Runtime(exported(model, False), feeds) if model.plain else portable
    if model.plain:
        providers["exported from SDPA"] = plain

    def check() -> str:
        # Against float64 the small models of the tests are verified; here the files have to agree.
        worst = 0.0
        for ours_out, theirs in zip(ours.outputs(), plain.outputs(), strict=True):
            size = max(1.0, theirs.double().abs().max().item())
            worst = max(worst, (ours_out.double() - theirs.double()).abs().max().item() / size)
        print(f"{model.name}: largest difference {worst:.1e} of the largest value")
        return "ok" if worst <= PARITY[torch.float32] else f"difference {worst:.2e}"

    return Workload(providers, rival="exported from SDPA" if model.plain else "portable body", check=check)


def cases(full: bool = False) -> Iterator[Case]:
    f32 = torch.float32
    yield Case("export", "node, text to image", "forward", f32, lambda: attention_workload(TEXT, IMAGE[::-1]))
    yield Case("export", "node, image to text", "forward", f32, lambda: attention_workload(IMAGE, TEXT[::-1]))
    yield Case("export", "1000 nodes of 1x1", "forward", f32, overhead_workload)
    if full:
        for model in MODELS:
            title = f"{model.name}, batch {model.batch}"
            yield Case("export", title, "forward", f32, functools.partial(model_workload, model))


if __name__ == "__main__":
    main("export", cases, provider="fastxattn library")
