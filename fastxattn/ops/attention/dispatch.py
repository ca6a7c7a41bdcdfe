"""From arguments to a backend: the short way for plain CPU calls, the checked way for all others."""

from __future__ import annotations

import numbers
import operator
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastxattn.ops.attention import checks, cpu, cuda, flash, triton
from fastxattn.ops.attention.autograd import FORWARD, Attention, wants_gradient
from fastxattn.ops.attention.problem import Problem
from fastxattn.ops.attention.reference import attention_reference
from fastxattn.ops.attention.triton.config import kind_of, padded_dim
from fastxattn.ops.offsets import readable
from fastxattn.runtime import backend as explaining
from fastxattn.runtime import env, tuning
from fastxattn.runtime.autocast import cast, no_autocast
from fastxattn.runtime.backend import Backend, preferring, resolve
from fastxattn.runtime.operators import plain, transforming
from fastxattn.runtime.operators import run as run_operator

_TENSORS = Problem._fields.index("scale")
_INDICES = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "query_index", "key_index", "kv_range")
_CPU = ("auto", "cpu")
BACKENDS = (
    Backend("cpu", cpu.supports),
    Backend("triton", triton.supports),
    Backend("cuda", cuda.supports),
    Backend("flash", flash.supports),
    Backend("reference", lambda problem: None),
)


def short_way(backend: str) -> bool:
    """Whether a call may go to the CPU operator at once, which checks everything it relies on."""
    return (
        not is_compiling()  # first: a trace must not depend on the state below
        and cpu.ready
        and backend in _CPU
        and env.default_backend in _CPU
        and explaining.explaining_in is None
        and not torch.is_autocast_enabled("cpu")
        and not transforming()
    )


def sound_numbers(scale: object, softcap: object, dropout_p: object = 0.0) -> bool:
    """Whether these are plain floats in their ranges; anything else is for the validated path to name or convert."""
    return (
        type(scale) is float
        and type(softcap) is float
        and type(dropout_p) is float
        and -checks.LARGEST <= scale <= checks.LARGEST
        and 0.0 <= softcap <= checks.LARGEST
        and 0.0 <= dropout_p < 1.0
    )


def fits(kv_range: Tensor | None, query: Tensor) -> bool:
    """Whether ranges have one row per query token: operators accept surplus rows."""
    return kv_range is None or kv_range.shape[:1] == query.shape[:1]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    query_index: Tensor | None,
    key_index: Tensor | None,
    kv_range: Tensor | None,
    key_bias: Tensor | None,
    bias: Tensor | None,
    scale: float | None,
    softcap: float,
    dropout_p: float,
    dropout_seed: int | Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Out and lse of a problem; arguments as in the operator schema, ``scale`` None for 1 / sqrt(head_dim)."""
    refused: RuntimeError | None = None
    if short_way(backend):
        # The operator checks everything it relies on, and Python looks only when it has refused.
        try:
            scale_ = query.size(-1) ** -0.5 if scale is None else scale
            if not sound_numbers(scale_, softcap, dropout_p) or not fits(kv_range, query):
                raise ValueError
            if dropout_p:
                dropout_seed = seed_tensor(dropout_seed, query.device)
            if torch.is_grad_enabled() and (
                query.requires_grad
                or key.requires_grad
                or value.requires_grad
                or (key_bias is not None and key_bias.requires_grad)
                or (bias is not None and bias.requires_grad)
            ):
                return Attention.apply(
                    "cpu", query, key, value, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, query_index, key_index,
                    kv_range, key_bias, bias, scale_, softcap, dropout_p, dropout_seed,
                )  # fmt: skip
            return run_operator(
                cpu.direct, query, key, value, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, query_index, key_index,
                kv_range, key_bias, bias, scale_, softcap, dropout_p, dropout_seed,
            )  # fmt: skip
        except (TypeError, ValueError, AttributeError, ZeroDivisionError):
            pass  # for the validated path to name or convert
        except RuntimeError as error:
            refused = error
    return _checked(
        query, key, value, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, query_index, key_index, kv_range,
        key_bias, bias, scale, softcap, dropout_p, dropout_seed, backend=backend, refused=refused,
    )  # fmt: skip


def _checked(*arguments: Any, backend: str, refused: RuntimeError | None) -> tuple[Tensor, Tensor]:
    """Check, choose the backend, run; ``refused`` is what the operator raised on the fast path."""
    problem = prepare(*arguments)
    if not torch.compiler.is_compiling():  # while tracing, the operator's fake checks
        checks.check_shapes(problem)
        if readable(problem.cu_seqlens_q):
            checks.check_contents(problem)
    name = resolve("attention", in_order(problem), problem, backend)
    if refused is not None and name == "cpu" and all(map(operator.is_, problem[:_TENSORS], arguments)):
        raise refused  # sound arguments, handed over as they were: out of memory, say, which a second try would repeat
    return run(name, problem)


def in_order(problem: Problem) -> tuple[Backend, ...]:
    """The table of backends, with the one first that was measured to be the fastest on this device, if any was.

    Where nobody measured, float32 goes to the CUDA kernels: on an H200 they took a half to a fifth of the time of
    Triton's, which were the faster ones in 16 bits. A traced program takes the table as it is.
    """
    if torch.compiler.is_compiling() or not problem.query.is_cuda:
        return BACKENDS
    rich = any(t is not None for t in (problem.kv_range, problem.key_bias, problem.bias, problem.dropout_seed))
    dim = padded_dim(max(problem.query.shape[2], problem.value.shape[2]))
    kind = kind_of(problem.query.element_size(), rich)
    best = tuning.preferred("attention", kind, dim, problem.query.device)
    return preferring(BACKENDS, best or ("cuda" if problem.query.dtype == torch.float32 else None))


def run(name: str, problem: Problem) -> tuple[Tensor, Tensor]:
    """Run a backend on a problem that is known to be sound, differentiably."""
    if name == "reference":
        with no_autocast(problem.query.device):
            return attention_reference(*problem)
    if name == "flash":
        return flash.attend(problem)
    if wants_gradient(problem):
        out, lse = Attention.apply(name, *problem)
    else:
        out, lse = plain(FORWARD[name], *problem)
    return out, lse


def prepare(*arguments: Any) -> Problem:
    """The arguments as backends want them; what is not a tensor passes through, for the checks to name."""
    problem = Problem(*arguments)
    query = problem.query
    if not isinstance(query, Tensor) or query.ndim != 3:
        return problem._replace(scale=1.0 if problem.scale is None else problem.scale)
    changes: dict[str, Any] = {}
    for name in ("query", "key", "value"):
        t = getattr(problem, name)
        if isinstance(t, Tensor) and t.ndim == 3:
            t = cast(t)
            changes[name] = t if t.layout != torch.strided or t.stride(2) == 1 or t.shape[2] == 1 else t.contiguous()
    for name in _INDICES:
        if isinstance(t := getattr(problem, name), Tensor):
            changes[name] = t.contiguous()
    wide = torch.float64 if changes["query"].dtype == torch.float64 else torch.float32
    if isinstance(problem.key_bias, Tensor) and problem.key_bias.is_floating_point():
        changes["key_bias"] = problem.key_bias.to(wide)
    if problem.scale is None:
        changes["scale"] = query.shape[2] ** -0.5 if query.shape[2] != 0 else 1.0  # 0 is refused by the checks
    elif isinstance(problem.scale, numbers.Real) and not isinstance(problem.scale, bool):
        changes["scale"] = checks.float_of(problem.scale)
    for name in ("softcap", "dropout_p"):
        if isinstance(number := getattr(problem, name), numbers.Real) and not isinstance(number, bool):
            changes[name] = checks.float_of(number)
    changes["dropout_seed"] = seed_tensor(problem.dropout_seed, query.device) if problem.dropout_p else None
    return problem._replace(**changes)


def seed_tensor(seed: int | Tensor | None, device: torch.device) -> Any:
    """(1,) int64 on ``device``; drawn from torch's generator when None."""
    if seed is None:
        return torch.randint(0, 2**63 - 1, (1,), device=device)
    if isinstance(seed, int) and not isinstance(seed, bool):
        return torch.full((1,), (seed + 2**63) % 2**64 - 2**63, dtype=torch.int64, device=device)
    return seed.reshape(-1) if isinstance(seed, Tensor) else seed
