"""QFormer: BLIP-2's and InstructBLIP's querying transformer over image features of any lengths.

Hidden states live in one matrix, the queries of all sequences first and then all text tokens, so that projections and
norms run on existing tokens only. Self-attention reads a sequence's keys in place through an index; queries and text
are two calls. Cross-attention reads one packed copy of the features in every layer, its projections absorbed into the
queries where that is cheaper.

The functions below need nothing of the modules but their attribute names, which are Hugging Face's.

Source: Li et al., "BLIP-2: Bootstrapping language-image pre-training with frozen image encoders and large language
models", 2023; Dai et al., "InstructBLIP", 2023.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastxattn.nn.packing import Layout, Tokens, pack
from fastxattn.nn.projected import Absorb, ContextKV, KeyValueWeights, attend, cross_attend
from fastxattn.ops.attention import varlen_cross_attention
from fastxattn.packed import PackedTokens


@dataclass(frozen=True)
class _Rows:
    """Where the rows of the hidden matrix belong: batch * count queries, then the text."""

    queries: PackedTokens
    text: PackedTokens | None
    key_index: torch.Tensor | None
    """(rows,) int32: each sequence's queries and text; None without text."""
    cu_seqlens_k: torch.Tensor
    max_seqlen_k: int

    @property
    def query_rows(self) -> int:
        return self.queries.values.shape[0]


def _arrange(queries: torch.Tensor, text: PackedTokens | None) -> tuple[torch.Tensor, _Rows]:
    """Build the hidden matrix (rows, hidden) of queries (batch, count, hidden) and text, and its layout."""
    packed, _ = pack(queries)
    if text is None:
        return packed.values, _Rows(packed, None, None, packed.cu_seqlens, packed.max_seqlen)
    batch, count = queries.shape[:2]
    hidden = torch.cat([packed.values, text.values])
    if count == 0:
        return hidden, _Rows(packed, text, None, text.cu_seqlens, text.max_seqlen)
    # Sorting the rows by sequence, stably, puts each sequence's queries before its text.
    owners = torch.arange(batch, device=queries.device).repeat_interleave(count)
    order = torch.cat([owners, text.sequence_ids()]).sort(stable=True).indices
    return hidden, _Rows(
        packed, text, order.int(), packed.cu_seqlens + text.cu_seqlens, packed.max_seqlen + text.max_seqlen
    )


def _heads(states: torch.Tensor, linear: nn.Linear, heads: int) -> torch.Tensor:
    return linear(states).unflatten(-1, (heads, -1))


def _residual(block: Any, states: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    return block.LayerNorm(block.dropout(block.dense(states)) + residual)  # type: ignore[no-any-return]


def _self_attention(block: Any, hidden: torch.Tensor, rows: _Rows, dropout: float) -> torch.Tensor:
    inner = block.attention
    heads = inner.num_attention_heads
    query, key, value = (_heads(hidden, linear, heads) for linear in (inner.query, inner.key, inner.value))
    parts = [(query[: rows.query_rows], rows.queries)] if rows.query_rows else []
    if rows.text is not None:
        parts.append((query[rows.query_rows :], rows.text))
    outs = [
        varlen_cross_attention(
            part,
            key,
            value,
            tokens.cu_seqlens,
            rows.cu_seqlens_k,
            tokens.max_seqlen,
            rows.max_seqlen_k,
            key_index=rows.key_index,
            dropout_p=dropout,
        ).flatten(1)
        for part, tokens in parts
    ]
    return _residual(block.output, outs[0] if len(outs) == 1 else torch.cat(outs), hidden)


def _cross_attention(
    block: Any, hidden: torch.Tensor, rows: _Rows, context: PackedTokens | ContextKV, dropout: float, absorb: Absorb
) -> torch.Tensor:
    inner = block.attention
    heads = inner.num_attention_heads
    query = _heads(hidden, inner.query, heads)
    if isinstance(context, ContextKV):
        out = attend(query, rows.queries, context, dropout_p=dropout)
    else:
        weights = KeyValueWeights.of(inner.key, inner.value)
        out = cross_attend(query, rows.queries, context, weights, absorb=absorb, dropout_p=dropout)
    return _residual(block.output, out, hidden)


def _feed_forward(intermediate: Any, output: Any, hidden: torch.Tensor) -> torch.Tensor:
    return _residual(output, intermediate.intermediate_act_fn(intermediate.dense(hidden)), hidden)


def run_layer(
    layer: Any,
    hidden: torch.Tensor,
    rows: _Rows,
    context: PackedTokens | ContextKV | None,
    *,
    dropout: float = 0.0,
    absorb: Absorb = "auto",
) -> torch.Tensor:
    """One layer on the hidden matrix (rows, hidden)."""
    hidden = _self_attention(layer.attention, hidden, rows, dropout)
    count = rows.query_rows
    queries, text = (hidden, None) if rows.text is None else (hidden[:count], hidden[count:])
    done = []
    if count:
        if layer.has_cross_attention:
            if context is None:
                raise ValueError("context must be given for layers with cross-attention")
            queries = _cross_attention(layer.crossattention, queries, rows, context, dropout, absorb)
        done.append(_feed_forward(layer.intermediate_query, layer.output_query, queries))
    if text is not None:
        done.append(_feed_forward(layer.intermediate, layer.output, text))
    return done[0] if len(done) == 1 else torch.cat(done)


def encode(
    layers: Iterable[Any],
    queries: torch.Tensor,
    text: PackedTokens | None,
    context: PackedTokens | Sequence[ContextKV] | None,
    *,
    dropout: float = 0.0,
    absorb: Absorb = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """All layers.

    Args:
        layers: modules with the attributes of Hugging Face's Q-Former layers.
        queries: (batch, count, hidden), normalised; count may be 0 when there is text.
        text: packed text embeddings (total, hidden), normalised.
        context: packed features, or one ContextKV per layer with cross-attention.
        dropout: on attention weights.
        absorb: as in :class:`fastxattn.nn.MultiheadCrossAttention`.

    Returns:
        Final states of the queries (batch, count, hidden), and of the text rows (total, hidden) or None.
    """
    hidden, rows = _arrange(queries, text)
    ready = iter(context) if context is not None and not isinstance(context, PackedTokens) else None
    for layer in layers:
        source = context if isinstance(context, PackedTokens) else None
        if ready is not None and layer.has_cross_attention:
            kv = next(ready, None)
            if kv is None:
                raise ValueError("context_kv must hold one entry per layer with cross-attention")
            hidden = run_layer(layer, hidden, rows, kv, dropout=dropout)
        else:
            hidden = run_layer(layer, hidden, rows, source, dropout=dropout, absorb=absorb)
    states = hidden[: rows.query_rows].reshape(*queries.shape[:2], hidden.shape[1])
    return states, None if text is None else hidden[rows.query_rows :]


class _SelfOutput(nn.Module):
    def __init__(self, width_in: int, width_out: int, eps: float, dropout: float) -> None:
        super().__init__()
        self.dense = nn.Linear(width_in, width_out)
        self.LayerNorm = nn.LayerNorm(width_out, eps=eps)
        self.dropout = nn.Dropout(dropout)


class _Projections(nn.Module):
    def __init__(self, hidden: int, heads: int, context_width: int) -> None:
        super().__init__()
        self.num_attention_heads = heads
        self.query = nn.Linear(hidden, hidden)
        self.key = nn.Linear(context_width, hidden)
        self.value = nn.Linear(context_width, hidden)


class _Attention(nn.Module):
    def __init__(self, hidden: int, heads: int, context_width: int, eps: float, dropout: float) -> None:
        super().__init__()
        self.attention = _Projections(hidden, heads, context_width)
        self.output = _SelfOutput(hidden, hidden, eps, dropout)


class _Intermediate(nn.Module):
    def __init__(self, hidden: int, inner: int, activation: Any) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden, inner)
        self.intermediate_act_fn = activation


class QFormerLayer(nn.Module):
    """One layer: self-attention, cross-attention where it has one, and separate feed-forwards for queries and text.

    Parameters are those of ``Blip2QFormerLayer`` (which see :class:`QFormer` for the arguments).
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        context_width: int | None,
        *,
        text: bool = False,
        eps: float = 1e-12,
        dropout: float = 0.0,
        activation: Any = F.gelu,
    ) -> None:
        super().__init__()
        self.has_cross_attention = context_width is not None
        self.attention = _Attention(hidden_size, num_heads, hidden_size, eps, dropout)
        if context_width is not None:
            self.crossattention = _Attention(hidden_size, num_heads, context_width, eps, dropout)
        if text:
            self.intermediate = _Intermediate(hidden_size, intermediate_size, activation)
            self.output = _SelfOutput(intermediate_size, hidden_size, eps, dropout)
        self.intermediate_query = _Intermediate(hidden_size, intermediate_size, activation)
        self.output_query = _SelfOutput(intermediate_size, hidden_size, eps, dropout)


class _Encoder(nn.Module):
    def __init__(self, layers: Iterable[QFormerLayer]) -> None:
        super().__init__()
        self.layer = nn.ModuleList(layers)


class _Embeddings(nn.Module):
    """InstructBLIP's: token and position embeddings, and the norm that queries share."""

    def __init__(self, vocabulary: int, positions: int, hidden: int, eps: float, dropout: float) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocabulary, hidden)
        self.position_embeddings = nn.Embedding(positions, hidden)
        self.layernorm = nn.LayerNorm(hidden, eps=eps)
        self.dropout = nn.Dropout(dropout)


class QFormer(nn.Module):
    """The querying transformer: learned queries, and optionally text, attend to image features.

    Parameters and ``state_dict`` are those of Hugging Face's ``Blip2QFormerModel``, or with ``vocabulary`` those of
    ``InstructBlipQFormerModel``; :meth:`from_hf` shares either's.

    Args:
        hidden_size: width of queries and text.
        num_layers: layers.
        num_heads: attention heads.
        intermediate_size: width inside the feed-forwards.
        context_width: width of the image features.
        cross_attention_frequency: layers 0, n, 2n, ... have cross-attention.
        text: the layers have a feed-forward for text (implied by ``vocabulary``).
        vocabulary: token count: InstructBLIP's embeddings, for ``input_ids``.
        positions: position embeddings, with ``vocabulary``.
        eps: of the layer norms.
        dropout: on hidden states.
        attention_dropout: on attention weights (which keeps projections from being absorbed, in training).
        activation: of the feed-forwards.
        absorb: "auto", "on" or "off"; see :class:`fastxattn.nn.MultiheadCrossAttention`.
    """

    def __init__(
        self,
        hidden_size: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        intermediate_size: int = 3072,
        context_width: int = 1408,
        *,
        cross_attention_frequency: int = 2,
        text: bool = False,
        vocabulary: int | None = None,
        positions: int = 512,
        eps: float = 1e-12,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        activation: Any = F.gelu,
        absorb: Absorb = "auto",
    ) -> None:
        super().__init__()
        self.hidden_size, self.attention_dropout, self.absorb = hidden_size, attention_dropout, absorb
        if vocabulary is None:
            self.layernorm = nn.LayerNorm(hidden_size, eps=eps)
            self.dropout = nn.Dropout(dropout)
        else:
            self.embeddings = _Embeddings(vocabulary, positions, hidden_size, eps, dropout)
        self.encoder = _Encoder(
            QFormerLayer(
                hidden_size,
                num_heads,
                intermediate_size,
                context_width if i % cross_attention_frequency == 0 else None,
                text=text or vocabulary is not None,
                eps=eps,
                dropout=dropout,
                activation=activation,
            )
            for i in range(num_layers)
        )

    @classmethod
    def from_hf(cls, model: Any, absorb: Absorb = "auto") -> QFormer:
        """A QFormer that shares the parameters of a ``Blip2QFormerModel`` or ``InstructBlipQFormerModel``."""
        config = model.config
        embeddings = hasattr(model, "embeddings")
        with torch.device("meta"):
            new = cls(
                config.hidden_size,
                config.num_hidden_layers,
                config.num_attention_heads,
                config.intermediate_size,
                config.encoder_hidden_size,
                cross_attention_frequency=config.cross_attention_frequency,
                text=getattr(config, "use_qformer_text_input", True),
                vocabulary=config.vocab_size if embeddings else None,
                positions=config.max_position_embeddings,
                eps=config.layer_norm_eps,
                dropout=config.hidden_dropout_prob,
                attention_dropout=config.attention_probs_dropout_prob,
                activation=model.encoder.layer[0].intermediate_query.intermediate_act_fn,
                absorb=absorb,
            )
        new.load_state_dict(model.state_dict(keep_vars=True), assign=True)
        return new.train(model.training)

    def _normalise(self, states: torch.Tensor) -> torch.Tensor:
        holder: Any = self.embeddings if hasattr(self, "embeddings") else self
        return holder.dropout(holder.layernorm(states.to(holder.layernorm.weight.dtype)))  # type: ignore[no-any-return]

    def _embed(self, ids: torch.Tensor, mask: torch.Tensor | None) -> tuple[PackedTokens, Layout]:
        if not hasattr(self, "embeddings"):
            raise ValueError("input_ids must be None: this QFormer was made without a vocabulary; give text embeddings")
        packed, layout = pack(ids.unsqueeze(-1), mask, name="text")
        places = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        states = self.embeddings.word_embeddings(packed.values[:, 0])
        return packed.with_values(states + self.embeddings.position_embeddings(layout.pack_rows(places))), layout

    def precompute_kv(self, context: Tokens, *, context_mask: torch.Tensor | None = None) -> list[ContextKV]:
        """Keys and values of every layer with cross-attention, for ``context_kv=`` of any number of calls."""
        packed, _ = pack(context, context_mask, name="context")
        packed = packed.with_values(packed.values.to(next(self.parameters()).dtype))
        blocks: list[Any] = [layer.crossattention for layer in self._layers() if layer.has_cross_attention]
        return [
            KeyValueWeights.of(b.attention.key, b.attention.value).project(packed, b.attention.num_attention_heads)
            for b in blocks
        ]

    def _layers(self) -> list[Any]:
        return list(self.encoder.layer)

    def forward(
        self,
        queries: torch.Tensor | None,
        context: Tokens | None = None,
        *,
        context_mask: torch.Tensor | None = None,
        context_kv: Sequence[ContextKV] | None = None,
        text: Tokens | None = None,
        text_mask: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | None, Tokens | None]:
        """Run all layers.

        Args:
            queries: (batch, count, hidden_size) or (1, count, hidden_size), shared by all sequences; None: text alone.
            context: image features (batch, length, context_width) or PackedTokens.
            context_mask: (batch, length) boolean, True = valid feature.
            context_kv: result of :meth:`precompute_kv`, instead of ``context``.
            text: text embeddings (batch, length, hidden_size) or PackedTokens.
            text_mask: (batch, length) boolean.
            input_ids: (batch, length) token ids, instead of ``text`` (with a vocabulary).

        Returns:
            States of the queries (batch, count, hidden_size) or None, and of the text, in its own form, or None.
        """
        if text is not None and input_ids is not None:
            raise ValueError("give either text or input_ids")
        if context is not None and context_kv is not None:
            raise ValueError("give either context or context_kv")
        words: PackedTokens | None = None
        layout: Layout | None = None
        if input_ids is not None:
            words, layout = self._embed(input_ids, text_mask)
        elif text is not None:
            words, layout = pack(text, text_mask, name="text")
        if words is not None:
            words = words.with_values(self._normalise(words.values))
        features: PackedTokens | Sequence[ContextKV] | None = context_kv
        if context is not None:
            packed, _ = pack(context, context_mask, name="context")
            features = packed.with_values(packed.values.to(next(self.parameters()).dtype))
        states = self._query_states(queries, words, features)
        dropout = self.attention_dropout if self.training else 0.0
        out, text_rows = encode(self._layers(), states, words, features, dropout=dropout, absorb=self.absorb)
        done = None if layout is None or text_rows is None else layout.restore(text_rows)
        return (None if queries is None else out), done

    def _query_states(
        self,
        queries: torch.Tensor | None,
        words: PackedTokens | None,
        features: PackedTokens | Sequence[ContextKV] | None,
    ) -> torch.Tensor:
        """Normalised queries (batch, count, hidden_size), count 0 without any."""
        first = features[0] if isinstance(features, Sequence) and features else features
        tokens = words if words is not None else first
        if queries is None:
            if words is None:
                raise ValueError("queries must be given when there is no text")
            return words.values.new_zeros(words.batch_size, 0, self.hidden_size)
        if queries.ndim != 3 or queries.shape[2] != self.hidden_size:
            shape = tuple(queries.shape)
            raise ValueError(f"queries must be (batch, count, {self.hidden_size}); got shape {shape}")
        batch = queries.shape[0] if tokens is None else tokens.cu_seqlens.shape[0] - 1  # type: ignore[union-attr]
        if queries.shape[0] not in (1, batch):
            raise ValueError(f"queries must have batch size 1 or {batch}; got {queries.shape[0]}")
        states = self._normalise(queries)
        return states.expand(batch, -1, -1)
