"""Pruning of tokens between any two layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastxattn.nn.packing import Tokens
from fastxattn.ops.pruning import Budget, Selection
from fastxattn.ops.pruning.strategies import STRATEGIES, Strategy, find_strategy
from fastxattn.packed import PackedTokens


class TokenPruner(nn.Module):
    """Keep a budget of tokens of each sequence, by any strategy.

    Gradients flow through gathered and merged rows. With ``learned=True`` a linear layer scores the tokens, the best
    are kept, and the straight-through trick lets the kept rows train it: forward multiplies them by exactly 1,
    backward as if by ``sigmoid(score)``.

    Args:
        budget: a :class:`fastxattn.Budget`, or a float for ``Budget.ratio``.
        strategy: a name of ``fastxattn.ops.pruning.STRATEGIES`` (:func:`fastxattn.register_strategy` adds to it), or a
            function like registered ones. Its selection is checked: one that drops protected tokens for others, that
            exceeds the budget, or whose rows are out of order is refused.
        protected: the first so many tokens of each sequence (CLS, registers) are kept before all others.
        learned: score with a trained linear layer instead of the strategy; needs ``width``.
        width: channels of the tokens, for ``learned``.

    Raises:
        TypeError: ``protected`` is not an int; in ``forward``, no ``attention`` for a strategy that needs it.
        ValueError: an unknown strategy, a negative ``protected``, or ``learned`` without ``width``; in ``forward``, a
            selection that is refused.

    Example:
        >>> pruner = TokenPruner(0.25, strategy="divprune", protected=1)
        >>> fewer, kept = pruner(torch.randn(2, 197, 768))
        >>> fewer.cu_seqlens.tolist()
        [0, 50, 100]
    """

    def __init__(
        self,
        budget: Budget | float,
        strategy: str | Callable[..., Selection] = "norm",
        *,
        protected: int = 0,
        learned: bool = False,
        width: int | None = None,
    ) -> None:
        super().__init__()
        if not callable(strategy):
            find_strategy(strategy)
        if not isinstance(protected, int) or isinstance(protected, bool):
            raise TypeError(f"protected must be an int; got {type(protected).__name__}")
        if protected < 0:
            raise ValueError(f"protected must not be negative; got {protected}")
        if learned and width is None:
            raise ValueError("width must be given for learned=True; got None")
        self.budget = budget if isinstance(budget, Budget) else Budget.ratio(budget)
        self.strategy = strategy
        self.protected = protected
        self.scorer = nn.Linear(width, 1) if learned and width is not None else None

    def forward(self, tokens: Tokens, **needs: Tensor) -> tuple[PackedTokens, Selection]:
        """Prune.

        Args:
            tokens: (batch, length, channels), or PackedTokens with values (total, channels).
            **needs: what the strategy needs, in packed rows: ``attention`` (total,), ``relevance``, ``sizes``, or the
                ``columns`` of the grid of patches.

        Returns:
            The kept tokens, packed, and the selection (for positions, sizes and the way back).
        """
        packed = tokens if isinstance(tokens, PackedTokens) else PackedTokens.from_padded(tokens)
        values, offsets = packed.values, packed.cu_seqlens
        if values.ndim < 2:
            shape = tuple((tokens if isinstance(tokens, Tensor) else values).shape)
            raise ValueError(
                f"tokens must be (batch, length, channels), or packed (total, channels); got shape {shape}"
            )
        if self.scorer is not None and needs:
            raise TypeError(f"needs must be empty for a learned pruner, which scores the tokens itself; got {[*needs]}")
        protected = None
        if self.protected:
            protected = packed.positions() < self.protected
        if self.scorer is not None:
            scores = self.scorer(values).squeeze(-1)
            selection = STRATEGIES["attention"](
                values, offsets, self.budget, attention=scores, protected=protected, max_seqlen=packed.max_seqlen
            )
            gate = torch.sigmoid(scores)
            rows = selection.gather(values * (gate - gate.detach() + 1).unsqueeze(-1))
        else:
            selection = self._found()(
                values, offsets, self.budget, protected=protected, max_seqlen=packed.max_seqlen, **needs
            )
            rows = selection.reduce(values)
        return PackedTokens(rows, selection.cu_seqlens, selection.max_seqlen), selection

    def extra_repr(self) -> str:
        """Budget, strategy and protected tokens, for ``repr``."""
        name = "learned" if self.scorer is not None else self._name()
        return f"{self.budget.kind}={self.budget.value}, strategy={name}, protected={self.protected}"

    def _found(self) -> Strategy:
        if isinstance(self.strategy, str):
            return find_strategy(self.strategy)
        return self.strategy if isinstance(self.strategy, Strategy) else Strategy(self._name(), self.strategy)

    def _name(self) -> str:
        return self.strategy if isinstance(self.strategy, str) else getattr(self.strategy, "__name__", "custom")
