"""Validation: a message names the argument, the rule and the value got, before any memory is touched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from fastxattn.ops.checks import check_count
from fastxattn.ops.contrastive.checks import choice, features, same_device

if TYPE_CHECKING:
    import numpy

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float64)


def check_arguments(
    queries: torch.Tensor,
    corpus: torch.Tensor | numpy.memmap,
    k: int,
    metric: str,
    corpus_scale: torch.Tensor | None,
) -> None:
    """Refuse what does not fit together."""
    features("queries", queries)
    choice("metric", metric, ("inner", "cosine"))
    check_count("k", k)
    if not hasattr(corpus, "shape"):
        raise TypeError(f"corpus must be a tensor or a numpy.memmap; got {type(corpus).__name__}")
    shape = tuple(corpus.shape)
    if len(shape) != 2 or shape[1] != queries.shape[1] or shape[1] == 0:
        raise ValueError(f"corpus must have shape (rows, {queries.shape[1]}) with at least 1 feature; got {shape}")
    if corpus_scale is not None and not isinstance(corpus_scale, torch.Tensor):
        raise TypeError(f"corpus_scale must be a tensor; got {type(corpus_scale).__name__}")
    if corpus_scale is not None and corpus_scale.shape != (shape[0],):
        raise ValueError(f"corpus_scale must have shape ({shape[0]},); got {tuple(corpus_scale.shape)}")
    if corpus_scale is not None:
        same_device("corpus_scale", corpus_scale, queries.device)


def check_rows(corpus: torch.Tensor, queries: torch.Tensor) -> None:
    """Refuse corpus rows, all or a chunk of them, of a dtype or on a device that cannot be searched."""
    if corpus.dtype not in DTYPES:
        raise TypeError(f"corpus must be float32, bfloat16, float16, int8 or float64; got {corpus.dtype}")
    if corpus.device != queries.device:
        raise ValueError(f"corpus must be on {queries.device} as the queries; got {corpus.device}")


def check_pairs(a: torch.Tensor, b: torch.Tensor, ks: Sequence[int]) -> None:
    """Refuse sides that are no pairs, and a recall at nothing."""
    features("b", b, features("a", a))
    if a.shape[0] != b.shape[0]:
        raise ValueError(f"b must have as many rows as a ({a.shape[0]}); got {b.shape[0]}")
    if len(ks) == 0:
        raise ValueError("ks must name at least one k; got none")
    for k in ks:
        check_count("each of ks", k)
