"""Counter-based dropout: the same mask on every backend, whatever the order in which it is computed.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with

* key: the 64-bit seed, (low word, high word);
* counter: (query row, key slot // 4, head, 0), each 32 bits;
* the weight of key slot s takes output word s % 4 and is kept iff ``(word >> 8) * 2**-24 >= p`` in float32.

A query row is its row in ``query``; a key slot is its place among its sequence's slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def _multiply(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a product of two 32-bit words, without leaving int64's range."""
    low = constant * (word & 0xFFFF)
    high = constant * (word >> 16)
    low = low + ((high & 0xFFFF) << 16)
    return (high >> 16) + (low >> 32), low & _WORD


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four 32-bit words (in int64 tensors) per counter; the arguments broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def keep_mask(rows: Tensor, slots: Tensor, heads: int, p: float, seed: Tensor) -> Tensor:
    """Which attention weights stay: (heads, rows, slots) boolean.

    Args:
        rows: (n,) rows in ``query``.
        slots: (m,) key slots.
        heads: number of query heads.
        p: probability of dropping a weight.
        seed: (1,) int64.
    """
    seed = seed.reshape(())
    head = torch.arange(heads, device=rows.device)
    row, slot = rows.long() & _WORD, slots.long()
    counter = (row[None, :, None], (slot >> 2)[None, None, :], head[:, None, None], torch.zeros_like(seed))
    words = torch.stack(torch.broadcast_tensors(*philox(counter, (seed & _WORD, (seed >> 32) & _WORD))))
    word = words.gather(0, (slot & 3).expand(words.shape[1:])[None])[0]
    uniform = (word >> 8).to(torch.float32) * 2.0**-24
    return uniform >= torch.tensor(p, dtype=torch.float32, device=rows.device)
