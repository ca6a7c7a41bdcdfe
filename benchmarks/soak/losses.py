"""Random problems of the losses: all options that go together, on sides of any size, none included."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch import Tensor

import fastxattn
from benchmarks.soak.trials import Draw, Maker, Trial
from fastxattn.ops.contrastive.reference import unit_rows
from fastxattn.testing import offsets

Inputs = dict[str, Tensor]
APART = 1e-4
"""Two logits whose order decides something (a limit, a rank, a maximum) are equal, or differ by more than this."""
FEATURES = ("a", "b", "image_queue", "text_queue", "hard_negatives")


def numbers(d: Draw, name: str, values: tuple[float, ...], inputs: Inputs) -> Callable[[Inputs], Any]:
    """One of the values as a number, which has no gradient, or among the ``inputs`` as a tensor of any dtype."""
    value = d.of(*values)
    if d.often(0.2):
        number = d.of(float, numpy.float32, numpy.float64)(value)
        return lambda x: number
    inputs[name] = torch.full(d.of((), (1,), (1, 1)), value, dtype=d.of(torch.float32, torch.float64, d.dtype))
    return lambda x: x[name]


def mixed(d: Draw, inputs: Inputs) -> bool:
    """Whether the loss runs under autocast to 16 bits: then some of the features are made float32."""
    wanted = d.dtype != torch.float32 and d.often(0.2)
    for name in inputs:
        if wanted and name in FEATURES and d.often(0.7):
            inputs[name] = inputs[name].float()
    return wanted


def autocast(d: Draw, enabled: bool) -> contextlib.AbstractContextManager[object]:
    """Autocast to the draw's dtype if ``enabled``; the reference's float64 features stay float64."""
    return torch.autocast("cpu", d.dtype) if enabled else contextlib.nullcontext()


def decided(z: Tensor, shift: float, ties: bool) -> bool:
    """Whether rounding decides no comparison of a logit with another plus ``shift``; equal ones may be ``ties``."""
    apart = (z.flatten()[:, None] - z.flatten() - shift).abs()
    close = apart < APART * max(1.0, float(z.abs().max()) if z.numel() else 0.0)
    return bool(~(close & (apart > 0)).any()) if ties else int(close.sum()) <= (z.numel() if shift == 0 else 0)


def weights_of(d: Draw, n: int) -> Tensor:
    """Positive weights; or whole ones of any sign, whose sum is exact and may be 0."""
    return torch.rand(n, generator=d.g) + 0.1 if d.often(0.7) else d.integers(-1, 4, n).float()


def sides(d: Draw, few: bool) -> tuple[int, int, int]:
    """Rows of both sides and the number of features."""
    if few:
        n = d.r.randint(0, 12)
        return n, n if d.often(0.6) else d.r.randint(0, 12), d.r.randint(1, 24)
    n = d.size(1, 2, 33, 64, 129, 300)
    return n, n if d.often(0.7) else d.size(1, 2, 40, 130), d.size(1, 8, 63, 256)


def masks(d: Draw, n: int, m: int) -> dict[str, Any]:
    """Options of both losses that say which pairs are positive and which take part."""
    options: dict[str, Any] = {}

    def ids(high: int) -> Any:
        one = n == m and d.often(0.3)
        pair = tuple(d.integers(-1, high, k).to(d.of(torch.int32, torch.int64)) for k in (n, m))
        return pair[0] if one else pair

    kind = d.of("default", "targets", "targets", "groups", "groups")
    if kind == "targets":
        options["targets"] = d.integers(-1, m, n) if m else torch.full((n,), -1)
    elif kind == "groups":
        options["groups"] = ids(d.of(1, 3, 9))
    if d.often(0.3):
        options["ignore_ids"] = ids(d.of(1, 3, 9))
    if d.often(0.3):
        options["exclude_self"] = True
    return options


def infonce_call(a: Tensor, b: Tensor, scale: Any, *, groups: Any = None, teacher: Any = None, **options: Any) -> Any:
    """InfoNCE, or the sibling that takes groups or a teacher."""
    if groups is not None:
        return fastxattn.multi_positive_infonce_loss(a, b, scale, groups=groups, **options)
    if teacher is not None:
        names = "teacher_image_features", "teacher_text_features", "teacher_logit_scale"
        return fastxattn.distillation_loss(a, b, scale, **dict(zip(names, teacher, strict=True)), **options)
    return fastxattn.infonce_loss(a, b, scale, **options)


def infonce_options(d: Draw, n: int, m: int, width: int, inputs: Inputs) -> dict[str, Any]:
    """Options of InfoNCE alone; what excludes what is as its checks say."""
    options = masks(d, n, m)
    if d.often(0.3):
        options["symmetric"] = False
    if d.often(0.15):
        wide = d.r.randint(1, 9)
        dtype = d.of(torch.float32, d.dtype)
        scale = d.of(5.0, numpy.float32(5.0), torch.tensor(5.0), torch.tensor([5.0], dtype=torch.float64))
        features = (d.rows(k, wide, unit=True).to(dtype) for k in (n, m))
        return {"teacher": (*features, scale), **{k: v for k, v in options.items() if k == "symmetric"}}
    if d.often(0.4):
        inputs["hard_negatives"] = d.rows(n, d.r.randint(0, 3), width, unit=True)
    if d.often(0.4):
        inputs["text_queue"] = d.rows(d.of(0, 1, 7, 40), width, unit=True)
    if d.often(0.4) and options.get("symmetric", True):
        inputs["image_queue"] = d.rows(d.of(0, 1, 7, 40), width, unit=True)
    kind = d.of("plain", "smoothing", "decoupled")
    if kind == "smoothing":
        options["label_smoothing"] = d.of(0.1, 0.5)
    elif kind == "decoupled":
        options["decoupled"] = True
    if "groups" not in options:
        if d.often(0.4):
            options["false_negative_margin"] = d.of(0.0, 0.05, 0.3, -0.1)
        if d.often(0.5):
            options["return_metrics"] = True
    return options


def contrastive(infonce: bool, few: bool) -> Maker:
    """A contrastive loss, with the gradient of everything that has one."""

    def make(d: Draw) -> Trial:
        n, m, width = sides(d, few)
        normalize, shared = d.often(0.3), n == m and d.often(0.15)
        inputs = {"a": d.rows(n, width, unit=not normalize)}
        if not shared:
            inputs["b"] = d.rows(m, width, unit=not normalize)
        if m > 1 and d.often(0.1):
            inputs["b" if "b" in inputs else "a"][1] = inputs["a"][0] if n else 0.0  # ties, and zero vectors
        if n and normalize and d.often(0.2):
            inputs["a"][-1] = 0.0
        options = infonce_options(d, n, m, width, inputs) if infonce else masks(d, n, m)
        options |= {"normalize": normalize, "reduction": d.of("mean", "mean", "sum", "none")}
        scale = numbers(d, "scale", (1.0, 14.3, 100.0, -2.0), inputs)
        bias = None if infonce else numbers(d, "bias", (0.0, -5.0), inputs)
        factor = float(scale(inputs))
        x, y = (inputs.get(side, inputs["a"]).double() for side in ("a", "b"))
        z = factor * (unit_rows(x) @ unit_rows(y).T if normalize else x @ y.T)
        margin = options.get("false_negative_margin")
        if margin is not None and not decided(z, factor * margin, margin == 0.0 and not normalize):
            del options["false_negative_margin"]
        if "return_metrics" in options and not decided(z, 0.0, not normalize):
            del options["return_metrics"]
        several = infonce and options.get("symmetric", True) and (n != m or d.often(0.5))
        if d.often(0.4):
            counts = {"weights": n, "weights of b": m} if several else {"weights": n}
            inputs |= {name: weights_of(d, count) for name, count in counts.items()}
        cast = mixed(d, inputs)

        def run(x: Inputs, backend: str) -> Any:
            tensors = {name: x[name] for name in FEATURES[2:] if name in x}
            if "weights" in x:
                tensors["weights"] = (x["weights"], x["weights of b"]) if several else x["weights"]  # type: ignore[assignment]
            loss: Any = infonce_call if infonce else fastxattn.sigmoid_loss
            more = () if bias is None else (bias(x),)
            with autocast(d, cast):
                out = loss(x["a"], x.get("b", x["a"]), scale(x), *more, **options, **tensors, backend=backend)
            out, metrics = out if "return_metrics" in options else (out, [])
            figures = [t for f in metrics for t in (f.rank, f.mean_positive, f.mean_negative, f.top1, f.median_rank)]
            return (*(out if isinstance(out, tuple) else (out,)), *(t.float() for t in figures))

        shown = {k: v for k, v in options.items() if v is not False and not isinstance(v, (Tensor, tuple))}
        case = f"N={n} M={m} D={width} scale={factor:g} {[*inputs]} {[*options]} {shown}{', autocast' if cast else ''}"
        terms = float(z.abs().max()) if "teacher" in options and z.numel() else 0.0  # log-sum-exp less mean logit
        return Trial(case, d.dtype, inputs, run, terms=terms)

    return make


def token_sets(d: Draw, sets_a: int, sets_b: int, few: bool) -> tuple[list[int], list[int], Inputs]:
    """Lengths of the sets of both sides, and their tokens; no token has two best matches by rounding alone."""
    while True:
        if few:
            of_a, of_b = ([d.r.randint(0, 6) for _ in range(n)] for n in (sets_a, sets_b))
            width = d.r.randint(1, 24)
        else:
            of_a, of_b, width = d.lengths(sets_a), d.lengths(sets_b), d.size(1, 8, 63, 128)
        inputs = {name: d.rows(sum(of), width, unit=True) for name, of in (("a", of_a), ("b", of_b))}
        if not few or decided(inputs["a"].double() @ inputs["b"].double().T, 0.0, ties=True):
            return of_a, of_b, inputs


def maxsim(few: bool) -> Maker:
    """Scores of token sets."""

    def make(d: Draw) -> Trial:
        least = 0 if few else 1
        of_a, of_b, inputs = token_sets(d, d.r.randint(least, 5), d.r.randint(least, 5), few)
        smooth = d.of(None, 0.05, 1.0) if d.small else None  # the CPU kernels have none
        options: dict[str, Any] = {"direction": d.of("a", "b", "both"), "reduction": d.of("sum", "mean")}
        options["smooth"], cast = smooth, mixed(d, inputs)
        said = f"{of_a} x {of_b}, D={inputs['a'].shape[1]}, {options}{', autocast' if cast else ''}"

        def run(x: Inputs, backend: str) -> Any:
            with autocast(d, cast):
                return fastxattn.maxsim(x["a"], x["b"], offsets(of_a), offsets(of_b), **options, backend=backend)

        return Trial(said, d.dtype, inputs, run)

    return make


def late_interaction(few: bool) -> Maker:
    """FILIP's loss."""

    def make(d: Draw) -> Trial:
        sets = d.r.randint(0 if few else 1, 5)
        of_a, of_b, inputs = token_sets(d, sets, sets, few)
        scale, reduction = numbers(d, "scale", (1.0, 10.0), inputs), d.of("mean", "sum")
        cast = mixed(d, inputs)
        said = f"{of_a} x {of_b}, D={inputs['a'].shape[1]}, {reduction}{', autocast' if cast else ''}"

        def run(x: Inputs, backend: str) -> Any:
            cu = offsets(of_a), offsets(of_b)
            with autocast(d, cast):
                return fastxattn.late_interaction_loss(
                    x["a"], x["b"], *cu, scale(x), reduction=reduction, backend=backend
                )

        return Trial(said, d.dtype, inputs, run)

    return make


def losses(few: bool) -> dict[str, Maker]:
    """All of them; with ``few`` on at most a dozen rows, of which thousands a minute are tried."""
    return {
        "infonce": contrastive(True, few),
        "sigmoid": contrastive(False, few),
        "maxsim": maxsim(few),
        "late_interaction": late_interaction(few),
    }
