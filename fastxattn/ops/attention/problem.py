"""The attention problem: the only list of the operation's arguments, and what each of them means.

Sequence b owns the query *slots* ``cu_seqlens_q[b]`` up to ``cu_seqlens_q[b + 1]`` and the key slots
``cu_seqlens_k[b]`` up to ``[b + 1]``. A slot stands for a row of the tensors: for the row of its own number, or for the
one that an index names. The padded layout is the same with one range of slots per sample.
"""

from __future__ import annotations

from torch import Tensor

from fastxattn.ops.arguments import Arguments, differentiable, number, problem


@problem
class Problem(Arguments):
    """Arguments of one attention call, in the operator's order."""

    query: Tensor = differentiable()
    """(rows_q, heads, head_dim) float32, bfloat16, float16 or float64."""
    key: Tensor = differentiable()
    """(rows_k, kv_heads, head_dim) in the dtype of query; kv_heads divides heads."""
    value: Tensor = differentiable()
    """(rows_k, kv_heads, value_dim) in the dtype of query."""
    cu_seqlens_q: Tensor
    """(batch + 1,) int32, where each sequence's query slots start."""
    cu_seqlens_k: Tensor
    """(batch + 1,) int32, where its key slots start."""
    seqused_q: Tensor | None = None
    """(batch,) int32: only the first so many query slots of each sequence are in use."""
    seqused_k: Tensor | None = None
    """(batch,) int32, the same for key slots."""
    query_index: Tensor | None = None
    """(query slots,) int32, the row of query that a slot stands for; a row at most once."""
    key_index: Tensor | None = None
    """(key slots,) int32, the row of key and value that a slot stands for."""
    kv_range: Tensor | None = None
    """(rows_q, 2) int32: a query row sees the key slots [start, end) of its sequence. Outside of that it is refused
    (cpu) or clamped (triton, cuda)."""
    key_bias: Tensor | None = differentiable(default=None)
    """(rows_k,) or (rows_k, heads) float32, added to the scaled, capped score of a key row."""
    bias: Tensor | None = differentiable(default=None)
    """(batch or 1, heads or 1, queries or 1, keys or 1) float32 or the dtype of query, added to the score; indexed by
    the row's place in its sequence, ``row - cu_seqlens[b]``."""
    scale: float = number(default=1.0)
    """Multiplies the product of query and key."""
    softcap: float = number(low=0.0, default=0.0)
    """Scores become ``softcap * tanh(score / softcap)``; 0 is off."""
    dropout_p: float = number(low=0.0, below=1.0, default=0.0)
    """Probability of dropping an attention weight."""
    dropout_seed: Tensor | None = None
    """(1,) int64; with a positive ``dropout_p``."""

    @property
    def batch(self) -> int:
        """Sequences."""
        return self.cu_seqlens_q.shape[0] - 1

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def slots_q(self) -> int:
        """Query slots."""
        return self.query.shape[0] if self.query_index is None else self.query_index.shape[0]

    @property
    def slots_k(self) -> int:
        """Key slots."""
        return self.key.shape[0] if self.key_index is None else self.key_index.shape[0]

    @property
    def rich(self) -> bool:
        """Whether kernels load more than tokens and offsets for a tile, so that it takes more registers."""
        extras = (self.kv_range, self.key_bias, self.bias, self.dropout_seed)
        return any(t is not None for t in extras)
