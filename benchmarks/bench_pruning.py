"""Pruning against what people write by hand, and what it does to whole models.

    python -m benchmarks.bench_pruning [--match TEXT] [--models WHICH] [--rounds N] [--cpu-time]

Kernels: each against its eager formulation on the same data. Models: a ViT-L-size encoder and a LLaVA-shaped prefill
(every width that of LLaVA-1.5-7B, one eighth of its layers) unpruned and pruned. Rows go to
benchmarks/results/pruning.csv. On a machine that others use, ``--cpu-time`` counts the process's own processor time on
one thread instead of the clock; its rows say so in their device column.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.common import RESULTS, nbytes, parser, run
from benchmarks.harness import Case, Record, Workload, interleaved, write_csv
from benchmarks.harness.report import print_table
from fastxattn.integrations.pruning import prune_model
from fastxattn.integrations.pruning.probe import encoder_scores
from fastxattn.ops.pruning import STRATEGIES, Budget, backends, bipartite, prune_tokens, select_tokens
from fastxattn.ops.pruning.problem import DETERMINANT, MAX_MIN, Greedy, Quantile

SHARES = (0.5, 0.25, 0.11)


def offsets(batch: int, length: int) -> Tensor:
    return torch.arange(batch + 1, dtype=torch.int32) * length


def verdict(same: bool, words: str) -> str:
    return "ok" if same else words


def select_and_gather(dtype: torch.dtype, share: float) -> Workload:
    batch, length, width = 64, 1024, 1024
    keep = int(length * share)
    torch.manual_seed(0)
    x, scores = torch.randn(batch, length, width, dtype=dtype), torch.randn(batch, length)
    cu = offsets(batch, length)

    def eager() -> Tensor:
        rows = []
        for image, score in zip(x, scores, strict=True):
            index = score.topk(keep).indices.sort().values
            rows.append(image.index_select(0, index))
        return torch.cat(rows)

    def batched() -> Tensor:
        index = scores.topk(keep, dim=1).indices.sort(dim=1).values
        return x.gather(1, index[..., None].expand(-1, -1, width)).flatten(0, 1)

    def ours() -> Tensor:
        return prune_tokens(x.view(-1, width), scores.view(-1), cu, Budget.count(keep), max_seqlen=length)[0]

    return Workload(
        {"fastxattn": ours, "eager loop": eager, "eager gather": batched},
        "eager loop",
        lambda: verdict(torch.equal(ours(), eager()), "other tokens than eager"),
        bytes=nbytes(scores) + 2 * batch * keep * nbytes(x[0, 0]),
    )


def indices_only() -> Workload:
    batch, length, keep = 64, 1024, 512
    torch.manual_seed(0)
    scores, cu = torch.randn(batch, length), offsets(64, 1024)

    def eager() -> Tensor:
        return torch.cat([s.topk(keep).indices.sort().values + i * length for i, s in enumerate(scores)])

    def ours() -> Tensor:
        return select_tokens(scores.view(-1), cu, Budget.count(keep), max_seqlen=length).keep_index

    return Workload(
        {"fastxattn": ours, "eager loop": eager},
        "eager loop",
        lambda: verdict(torch.equal(ours().long(), eager()), "other tokens"),
        bytes=nbytes(scores, scores),
    )


def quantiles() -> Workload:
    batch, length = 64, 1024
    torch.manual_seed(0)
    scores, cu, q = torch.randn(batch, length), offsets(batch, length), torch.tensor([0.5, 0.9])

    def eager() -> Tensor:
        return torch.stack([s.quantile(q) for s in scores])

    def ours() -> Tensor:
        return backends.run(Quantile(scores=scores.view(-1), cu_seqlens=cu, q=q), "auto")  # type: ignore[no-any-return]

    return Workload(
        {"fastxattn": ours, "eager loop": eager, "eager batched": lambda: scores.quantile(q, dim=1).T},
        "eager batched",
        lambda: verdict(torch.allclose(ours(), eager()), "other quantiles"),
        bytes=nbytes(scores),
    )


def tome_step(width: int, metric_width: int) -> Workload:
    batch, length, merges = 16, 576, 144
    torch.manual_seed(0)
    x, sizes = torch.randn(batch, length, width), torch.ones(batch, length, 1)
    metric = torch.randn(batch, length, metric_width)
    cu = offsets(batch, length)

    def eager() -> Tensor:
        unit = metric / metric.norm(dim=-1, keepdim=True)
        node_max, node_idx = (unit[:, ::2] @ unit[:, 1::2].transpose(-1, -2)).max(-1)
        edge = node_max.argsort(dim=-1, descending=True)[..., None]
        stay, source = edge[:, merges:].sort(1).values, edge[:, :merges]
        target = node_idx[..., None].gather(-2, source)

        def merge(t: Tensor) -> Tensor:
            a, b, c = t[:, ::2], t[:, 1::2], t.shape[-1]
            kept = a.gather(-2, stay.expand(-1, -1, c))
            moved = a.gather(-2, source.expand(-1, -1, c))
            return torch.cat([kept, b.scatter_reduce(-2, target.expand(-1, -1, c), moved, "sum")], 1)

        return merge(x * sizes) / merge(sizes)

    def ours() -> Tensor:
        merged = bipartite(metric.view(-1, metric_width), cu, merges, sizes=sizes.view(-1))
        return merged.reduce(x.view(-1, width))

    def check() -> str:
        # The same multiset of rows: eager puts A's rows before B's, fastxattn keeps the order of tokens.
        a, b = eager().double(), ours().view(batch, length - merges, width).double()
        near = torch.allclose(a.sort(1).values, b.sort(1).values, atol=1e-4)
        return verdict(near, "other rows than eager")

    products, rows = 2.0 * batch * (length // 2) ** 2 * metric_width, batch * (2 * length - merges)
    moved = nbytes(metric, sizes) + rows * nbytes(x[0, 0])
    return Workload({"fastxattn": ours, "eager": eager}, "eager", check, products, moved)


def greedy(mode: int, batch: int, length: int, keep: int) -> Workload:
    width = 1024
    torch.manual_seed(0)
    x, cu = torch.randn(batch * length, width), offsets(batch, length)
    counts = torch.full((batch,), keep, dtype=torch.int32)
    quality = torch.rand(batch * length) + 0.5  # the determinant's; without it every first pick is a tie

    def max_min(image: Tensor, weight: Tensor) -> Tensor:
        """The formulation of DivPrune's own code."""
        unit = image / image.norm(dim=1, keepdim=True)
        distance = 1 - unit @ unit.T
        picked = torch.empty(keep, dtype=torch.long)
        for step in range(keep):
            if step == 0:
                value = distance.topk(2, dim=0, largest=False).values[1]
            else:
                value = distance.index_select(0, picked[:step]).min(0).values
                value[picked[:step]] = -torch.inf
            picked[step] = value.argmax()
        return picked

    def determinant(image: Tensor, weight: Tensor) -> Tensor:
        """Greedy MAP of a determinantal process, as CDPruner's code does it."""
        unit = image / image.norm(dim=1, keepdim=True)
        similarity = unit @ unit.T * weight * weight[:, None]
        picked = torch.empty(keep, dtype=torch.long)
        factors = torch.zeros(keep, length)
        residual = similarity.diagonal().clone()
        for step in range(keep):
            best = residual.argmax()
            picked[step] = best
            factor = (similarity[best] - factors[:step, best] @ factors[:step]) / residual[best].sqrt()
            factors[step] = factor
            residual -= factor**2
            residual[best] = -torch.inf
        return picked

    def eager() -> Tensor:
        search = max_min if mode == MAX_MIN else determinant
        images = zip(x.split(length), quality.split(length), strict=True)
        return torch.cat([search(image, weight) + b * length for b, (image, weight) in enumerate(images)])

    def ours() -> Tensor:
        scores = backends.run(Greedy.of((x, quality, cu, counts, None, mode, keep)), "auto")
        return scores.view(batch, length).topk(keep).indices + cu[:-1, None]

    def check() -> str:
        return verdict(set(ours().flatten().tolist()) == set(eager().tolist()), "other tokens than eager")

    # Half of the similarities for the farthest first row; a determinant needs those of the picked rows alone.
    pairs = length * (length / 2 if mode == MAX_MIN else keep)
    flops = 2.0 * batch * pairs * width
    return Workload({"fastxattn": ours, "eager loop": eager}, "eager loop", check, flops, nbytes(x))


def cases(full: bool = False) -> list[Case]:
    f32, bf16 = torch.float32, torch.bfloat16
    table: list[tuple[str, str, torch.dtype, Callable[[], Workload]]] = [
        ("select", "select 64x1024, keep 512", f32, indices_only),
        ("select_gather", "select + gather 64x1024x1024, keep 50 %", f32, lambda: select_and_gather(f32, 0.5)),
        ("select_gather", "select + gather 64x1024x1024, keep 25 %", f32, lambda: select_and_gather(f32, 0.25)),
        ("select_gather", "select + gather 64x1024x1024, keep 50 %", bf16, lambda: select_and_gather(bf16, 0.5)),
        ("quantile", "quantiles 64x1024", f32, quantiles),
        ("merge", "ToMe step 16x576x1024, metric 64, merge 144", f32, lambda: tome_step(1024, 64)),
        ("merge", "ToMe step 16x576x1024, metric 1024, merge 144", f32, lambda: tome_step(1024, 1024)),
        ("max_min", "max-min 576x1024, keep 64", f32, lambda: greedy(MAX_MIN, 1, 576, 64)),
        ("max_min", "max-min 576x1024, keep 144", f32, lambda: greedy(MAX_MIN, 1, 576, 144)),
        ("max_min", "max-min 8x576x1024, keep 144", f32, lambda: greedy(MAX_MIN, 8, 576, 144)),
        ("determinant", "determinant 576x1024, keep 64", f32, lambda: greedy(DETERMINANT, 1, 576, 64)),
    ]
    return [Case(op, name, "forward", dtype, build) for op, name, dtype, build in table]


# Whole models ----------------------------------------------------------------------------------------------------


def model_records(op: str, case: str, dtype: torch.dtype, times: dict[str, float]) -> list[Record]:
    base = times["unpruned"]
    pruned = {name for name in times if name.startswith("fastxattn")}
    return [
        Record(
            op,
            case,
            "forward",
            name,
            "unpruned",
            str(dtype).removeprefix("torch."),
            torch.get_num_threads(),
            seconds * 1e3,
            base / seconds if name in pruned | {"unpruned"} else float("nan"),
            0.0,
            "prunes: differs by design" if name in pruned else "rival",
        )
        for name, seconds in times.items()
    ]


@torch.no_grad()
def encoder(rounds: int, clock: Callable[[], float]) -> list[Record]:
    """CLIP ViT-L/14 at 336 pixels: 24 layers, 577 tokens; pruned before layer 8."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    model, pixels = CLIPVisionModel(config).eval(), torch.randn(1, 3, 336, 336)

    def pruned(share: float) -> Callable[[], None]:
        def call() -> None:
            with prune_model(model, keep=share, at=8):
                model(pixels)

        return call

    calls: dict[str, Callable[[], object]] = {"unpruned": lambda: model(pixels)}
    calls |= {f"fastxattn keep {share:.0%} from layer 8": pruned(share) for share in SHARES}
    times = {name: timing.median for name, timing in interleaved(calls, rounds=rounds, clock=clock).items()}
    # The pruning alone: scores, selection and gathering on tensors of that size.
    query, key, hidden = torch.randn(1, 577, 16, 64), torch.randn(1, 577, 16, 64), torch.randn(577, 1024)
    special = torch.arange(577) < 1

    def step() -> None:
        attention, cu = encoder_scores(query, key, 0.125, True)
        kept = STRATEGIES["attention"](
            hidden, cu, Budget.count(289), attention=attention, protected=special, max_seqlen=577
        )
        kept.reduce(hidden)

    step()
    spent = []
    for _ in range(20):
        start = clock()
        step()
        spent.append(clock() - start)
    times["pruning step alone"] = sorted(spent)[10]
    inner = model.vision_model if hasattr(model, "vision_model") else model
    times["one encoder layer, 64x1024 tokens"] = min(_layer_seconds(inner.encoder.layers[0], clock))
    return model_records("encoder", "ViT-L/14-336, one image", torch.float32, times)


def _layer_seconds(layer: torch.nn.Module, clock: Callable[[], float]) -> list[float]:
    """One encoder layer on 4 x 1024 tokens, scaled to the 64 x 1024 of the selection benchmark."""
    x = torch.randn(4, 1024, 1024)
    spent = []
    for _ in range(2):
        start = clock()
        layer(x, None)
        spent.append((clock() - start) * 16)
    return spent


@torch.no_grad()
def prefill(rounds: int, clock: Callable[[], float]) -> list[Record]:
    """LLaVA-1.5-7B's widths with 3 of 24 vision and 4 of 32 language layers: 576 image and 64 text tokens, bfloat16."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=3,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    text = LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=4,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=32064,
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=32000, vision_feature_layer=-2)
        model = LlavaForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    ids = torch.cat([torch.full((1, 576), 32000), torch.randint(5, 30000, (1, 64))], 1)
    pixels = torch.randn(1, 3, 336, 336, dtype=torch.bfloat16)

    def whole() -> object:
        return model(input_ids=ids, pixel_values=pixels, logits_to_keep=1)

    def pruned(share: float, strategy: str, at: int) -> Callable[[], object]:
        def call() -> object:
            with prune_model(model, keep=share, strategy=strategy, at=at):
                return whole()

        return call

    calls: dict[str, Callable[[], object]] = {"unpruned": whole}
    calls |= {
        f"fastxattn attention {share:.0%} before the language model": pruned(share, "attention", 0) for share in SHARES
    }
    calls["fastxattn divprune 25% before the language model"] = pruned(0.25, "divprune", 0)
    calls["fastxattn FastV 25% from language layer 1"] = pruned(0.25, "attention", 1)
    times = {name: timing.median for name, timing in interleaved(calls, rounds=rounds, clock=clock).items()}
    return model_records("prefill", "LLaVA-1.5-7B widths, 1/8 of its layers, 576 + 64 tokens", torch.bfloat16, times)


def main() -> None:
    options_of = parser(rounds=7)
    options_of.add_argument("--models", choices=("no", "encoder", "prefill", "both"), default="no")
    options_of.add_argument("--cpu-time", action="store_true", help="processor time on one thread")
    options = options_of.parse_args()
    if options.cpu_time:
        options.threads = 1
    clock = time.process_time if options.cpu_time else time.perf_counter

    def placed(record: Record) -> Record:
        return replace(record, device=f"{record.device}, shared; processor time") if options.cpu_time else record

    run("pruning", cases() if options.match != "none" else [], options, placed, clock)
    models = {"encoder": encoder, "prefill": prefill}
    for name, measure in models.items():
        if options.models in (name, "both"):
            records = [placed(r) for r in measure(options.rounds, clock)]
            print_table(records, name)
            write_csv(RESULTS / "pruning.csv", records)


if __name__ == "__main__":
    main()
