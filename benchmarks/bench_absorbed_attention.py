"""Q-Former and cross-attention with absorbed projections on the CPU, against the same model with SDPA.

    python -m benchmarks.bench_absorbed_attention [--match TEXT] [--full] [--rounds N]

The Q-Former is Hugging Face's class at its real size (12 layers, hidden 768, 12 heads, cross-attention in every second
layer, image width 1408, 32 queries) with random weights and without dropout; twelve images of 64 to 1024 tokens, padded
with a mask for the rival. "packed only" has absorption off. For forward+backward the image features need no gradient
(the image encoder is frozen in BLIP-2), except where the case says so. Results are checked against float64 on the
shortest and the longest image alone (float64 on all twelve would take minutes).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastxattn
from benchmarks.common import main, nbytes
from benchmarks.harness import Case, Workload
from fastxattn.nn import MultiheadCrossAttention, QFormer
from fastxattn.testing import measure_error

IMAGE_WIDTH, QUERIES, HIDDEN, BATCH = 1408, 32, 768, 12
LENGTHS = tuple(torch.linspace(64, 1024, BATCH).round().int().tolist())


def qformer(dtype: torch.dtype) -> Any:
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    torch.manual_seed(0)
    config = Blip2QFormerConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config._attn_implementation = "sdpa"
    return Blip2QFormerModel(config).eval().to(dtype)


def qformer_flops() -> float:
    """Multiply-adds times two of the work that has to be done: no padding, projections absorbed where that is less."""
    per_query = 12 * (4 * HIDDEN**2 + 8 * HIDDEN**2) + 6 * 2 * HIDDEN**2
    own = 12 * BATCH * 2 * QUERIES * QUERIES * HIDDEN
    return 2.0 * (BATCH * QUERIES * per_query + own) + 6 * cross_flops(QUERIES, IMAGE_WIDTH, 12, HIDDEN)


def cross_flops(queries: int, width: int, heads: int, inner: int) -> float:
    """Of one cross-attention's keys, values, scores and sums: projected as stated, or absorbed into the queries."""
    pairs, rows = queries * sum(LENGTHS), BATCH * queries
    return 4.0 * min(sum(LENGTHS) * width * inner + pairs * inner, pairs * heads * width + rows * inner * width)


def qformer_workload(dtype: torch.dtype, grad: bool, image_grad: bool = False) -> Workload:
    model = qformer(dtype)
    absorbed, packed_only = QFormer.from_hf(model), QFormer.from_hf(model, absorb="off")
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(BATCH, max(LENGTHS), IMAGE_WIDTH, generator=generator).to(dtype).requires_grad_(image_grad)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    queries = (torch.randn(1, QUERIES, HIDDEN, generator=generator) * 0.02).to(dtype)
    weight = torch.randn(BATCH, QUERIES, HIDDEN, generator=generator).to(dtype)

    def original(m: Any, x: Tensor, there: Tensor) -> Tensor:
        some = queries.to(x.dtype).expand(x.shape[0], -1, -1)
        out = m(query_embeds=some, encoder_hidden_states=x, encoder_attention_mask=there.long())
        return out.last_hidden_state  # type: ignore[no-any-return]

    def provider(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def forward() -> Tensor:
            with torch.no_grad():
                return call()

        def forward_backward() -> Tensor:
            model.zero_grad(set_to_none=True)
            image.grad = None
            out = call()
            out.backward(weight)
            return out

        return forward_backward if grad else forward

    def check() -> str:
        some = [0, BATCH - 1]
        x, there = image.detach()[some], mask[some]

        def gradients(m: nn.Module, call: Callable[[], Tensor]) -> list[Tensor]:
            out = call()
            names = [
                "encoder.layer.0.crossattention.attention.query.weight",
                "encoder.layer.11.output_query.dense.weight",
            ]
            values = dict(m.named_parameters())
            return [out, *torch.autograd.grad((out * weight[some].to(out.dtype)).sum(), [values[n] for n in names])]

        exact = copy.deepcopy(model).double()
        ref = gradients(exact, lambda: original(exact, x.double(), there))
        eager = gradients(model, lambda: original(model, x, there))
        ours = gradients(absorbed, lambda: absorbed(queries, x, context_mask=there)[0])
        for i, name in enumerate(["out", "grad of a query weight", "grad of a feed-forward"][: 3 if grad else 1]):
            report = measure_error(name, ours[i], ref[i], eager[i], backward=i > 0)
            if not report.ok:
                return str(report)
        return "ok"

    return Workload(
        {
            "fastxattn": provider(lambda: absorbed(queries, image, context_mask=mask)[0]),
            "fastxattn packed only": provider(lambda: packed_only(queries, image, context_mask=mask)[0]),
            "transformers sdpa": provider(lambda: original(model, image, mask)),
        },
        rival="transformers sdpa",
        check=check,
        flops=qformer_flops() * ((3 if image_grad else 2) if grad else 1),
        bytes=(nbytes(*model.parameters()) + nbytes(image[mask])) * (3 if grad else 1),
    )


def layer_workload(dtype: torch.dtype, queries_per_image: int, width: int, heads: int, dim: int) -> Workload:
    """One cross-attention with its projections: torch.nn.MultiheadAttention's numbers through SDPA, padded."""
    torch.manual_seed(0)
    inner = heads * dim
    ours = MultiheadCrossAttention(inner, heads, kdim=width, vdim=width).to(dtype).eval()
    off = MultiheadCrossAttention(inner, heads, kdim=width, vdim=width, absorb="off").to(dtype).eval()
    off.load_state_dict(ours.state_dict())
    image = torch.randn(BATCH, max(LENGTHS), width).to(dtype)
    query = torch.randn(BATCH, queries_per_image, inner).to(dtype)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    packed = fastxattn.PackedTokens.from_padded(image, mask)

    def sdpa(m: MultiheadCrossAttention, q: Tensor, x: Tensor) -> Tensor:
        kv = m.key_value_weights()

        def split(t: Tensor) -> Tensor:
            return t.unflatten(-1, (heads, dim)).transpose(1, 2)

        out = F.scaled_dot_product_attention(
            split(F.linear(q, *m.query_weights())),
            split(F.linear(x, kv.key_weight, kv.key_bias)),
            split(F.linear(x, kv.value_weight, kv.value_bias)),
            attn_mask=mask[:, None, None],
        )
        return m.out_proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def quiet(call: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            with torch.no_grad():
                return call()

        return run

    def check() -> str:
        with torch.no_grad():
            exact = copy.deepcopy(ours).double()
            reference = sdpa(exact, query.double(), image.double())
            report = measure_error("out", ours(query, packed), reference, sdpa(ours, query, image))
        return "ok" if report.ok else str(report)

    return Workload(
        {
            "fastxattn": quiet(lambda: ours(query, packed)),
            "fastxattn packed only": quiet(lambda: off(query, packed)),
            "padded sdpa": quiet(lambda: sdpa(ours, query, image)),
        },
        rival="padded sdpa",
        check=check,
        flops=4.0 * BATCH * queries_per_image * inner**2 + cross_flops(queries_per_image, width, heads, inner),
        bytes=nbytes(*ours.parameters(), packed.values, query, query),
    )


def cases(full: bool = False) -> Iterator[Case]:
    layers = [("1 query, width 1024, 16 x 64", 1, 1024, 16, 64), ("32 queries, width 1408, 12 x 64", 32, 1408, 12, 64)]
    if full:
        layers.append(("64 queries, width 1024, 16 x 64", 64, 1024, 16, 64))
    for title, *sizes in layers:
        for dtype in (torch.float32, torch.bfloat16):
            build = lambda dtype=dtype, sizes=sizes: layer_workload(dtype, *sizes)  # noqa: E731
            yield Case("absorbed_attention", f"layer, {title}", "forward", dtype, build)
    name = "Q-Former, 12 images of 64..1024"
    for dtype in (torch.float32, torch.bfloat16):
        yield Case("absorbed_attention", name, "forward", dtype, lambda dtype=dtype: qformer_workload(dtype, False))
        yield Case(
            "absorbed_attention", name, "forward+backward", dtype, lambda dtype=dtype: qformer_workload(dtype, True)
        )
    if full:
        grads = "Q-Former, 12 images of 64..1024, image gradient too"
        for dtype in (torch.float32, torch.bfloat16):
            build = lambda dtype=dtype: qformer_workload(dtype, True, True)  # noqa: E731
            yield Case("absorbed_attention", grads, "forward+backward", dtype, build)


if __name__ == "__main__":
    main("absorbed_attention", cases, provider="fastxattn")
