"""Registered strategies: where they are found, what they are given, and what of them is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastxattn
from fastxattn.nn import TokenPruner
from fastxattn.ops.pruning import STRATEGIES, Budget, Selection, Strategy, register_strategy, select_tokens
from fastxattn.testing import offsets
from tests.test_pruning_models import encoder, llava, llava_inputs

TWO = Budget.count(2)


@pytest.fixture(autouse=True)
def table() -> Iterator[None]:
    """Whatever a test registers goes with it."""
    before = dict(STRATEGIES)
    yield
    STRATEGIES.clear()
    STRATEGIES.update(before)


def brightest(tokens: Tensor, cu_seqlens: Tensor, budget: Budget, **options: Any) -> Selection:
    return select_tokens(tokens.float().mean(1), cu_seqlens, budget, **options)


def forgetful(tokens: Tensor, cu_seqlens: Tensor, budget: Budget, **options: Any) -> Selection:
    """Takes `protected` and ignores it."""
    return select_tokens(tokens.float().mean(1), cu_seqlens, budget)


def test_a_registered_strategy_is_found_everywhere(tmp_path: Any) -> None:
    fastxattn.register_strategy("brightest", brightest)
    x = torch.randn(2, 10, 8)
    fewer, kept = TokenPruner(0.5, strategy="brightest", protected=1)(x)
    assert fewer.lengths.tolist() == [5, 5] and {0, 10} <= set(kept.keep_index.tolist())
    with torch.no_grad():
        model = encoder("clip")
        with fastxattn.prune_model(model, keep=0.5, strategy="brightest", at=2) as pruning:
            assert model(torch.randn(2, 3, 32, 32)).last_hidden_state.shape[1] == 9
        assert {0, 17} <= set(pruning.last.keep_index.tolist())
        for at in (0, 2):
            with fastxattn.prune_model(llava(), keep=0.5, strategy="brightest", at=at):
                pass
    selection = STRATEGIES["brightest"](x.flatten(0, 1), offsets([10, 10]), TWO)
    assert selection.cu_seqlens.tolist() == [0, 2, 4]


def test_the_command_line_finds_registered_strategies(tmp_path: Any) -> None:
    image, runner = pytest.importorskip("PIL.Image"), pytest.importorskip("typer.testing").CliRunner()
    pytest.importorskip("matplotlib")
    from fastxattn.cli import app

    register_strategy("brightest", brightest)
    image.new("RGB", (56, 42), (200, 30, 30)).save(tmp_path / "photo.png")
    arguments = ["prune", str(tmp_path / "photo.png"), "--out", str(tmp_path / "kept.png"), "--strategy"]
    done = runner.invoke(app, [*arguments, "brightest"])
    assert done.exit_code == 0 and "brightest: " in done.output, done.output
    assert runner.invoke(app, [*arguments, "darkest"]).exit_code != 0


def test_strategies_get_what_they_need() -> None:
    seen: dict[str, Any] = {}

    def mine(tokens: Tensor, cu_seqlens: Tensor, budget: Budget, *, attention: Tensor, **options: Any) -> Selection:
        seen.update(options, attention=attention, total=tokens.shape[0])
        return STRATEGIES["attention"](tokens, cu_seqlens, budget, attention=attention, protected=options["protected"])

    register_strategy("mine", mine, needs=("attention", "columns", "sizes"))
    model, pixels = encoder("clip"), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found = []
        for name in ("attention", "mine"):
            with fastxattn.prune_model(model, keep=0.25, strategy=name, at=2) as pruning:
                model(pixels)
            found.append(pruning.last.keep_index)
        assert torch.equal(*found)
        assert seen["attention"].shape == (seen["total"],) == (34,)
        assert seen["columns"] == 4 and seen["sizes"] is None and seen["max_seqlen"] == 17
        assert seen["protected"].nonzero().flatten().tolist() == [0, 17]
        for at in (0, 2):
            llm = llava()
            with fastxattn.prune_model(llm, keep=0.5, strategy="mine", at=at) as pruning:
                llm(**llava_inputs())
            assert seen["attention"].shape == (32,) and seen["columns"] is None and pruning.last.rows == 16
    with pytest.raises(ValueError, match="at must lie in"):
        fastxattn.prune_model(model, keep=0.5, strategy="mine", at=0)
    with pytest.raises(TypeError, match="strategy mine needs attention"):
        TokenPruner(0.5, strategy="mine")(torch.randn(1, 8, 4))
    TokenPruner(0.5, strategy="mine")(torch.randn(1, 8, 4), attention=torch.rand(8))


def required(tokens: Tensor, cu_seqlens: Tensor, budget: Budget, *, attention: Tensor, **options: Any) -> Selection:
    return select_tokens(attention, cu_seqlens, budget, **options)


def unusual(tokens: Tensor, cu_seqlens: Tensor, budget: Budget, *, text: Tensor, **options: Any) -> Selection:
    return select_tokens(text, cu_seqlens, budget, **options)


def narrow(tokens: Tensor, cu_seqlens: Tensor, budget: Budget) -> Selection:
    return select_tokens(tokens[:, 0], cu_seqlens, budget)


def blind(tokens: Tensor, cu_seqlens: Tensor, budget: Budget, protected: Tensor, max_seqlen: int) -> Selection:
    return select_tokens(tokens[:, 0], cu_seqlens, budget, protected=protected)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        (("norm", brightest), {}, ValueError, r"registered already \(or pass replace=True\); got 'norm'"),
        ((3, brightest), {}, TypeError, "name must be a str; got int"),
        (("mine", 3), {}, TypeError, "function of strategy mine must be callable; got int"),
        (("mine", brightest), {"needs": ("depth",)}, ValueError, "needs of strategy mine must be of .*; got 'depth'"),
        (("mine", required), {}, ValueError, "strategy mine has the required argument attention: needs must name it"),
        (("mine", unusual), {}, ValueError, "strategy mine has the required argument text: give it a default"),
        (("mine", narrow), {}, ValueError, r"strategy mine must take protected, or \*\*options"),
        (("mine", blind), {"needs": "columns"}, ValueError, r"strategy mine must take columns, or \*\*options"),
    ],
)
def test_what_cannot_work_is_not_registered(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        register_strategy(*arguments, **options)
    assert "mine" not in STRATEGIES


def test_names_are_replaced_on_request_only() -> None:
    register_strategy("mine", blind)
    with pytest.raises(ValueError, match="got 'mine'"):
        register_strategy("mine", brightest)
    register_strategy("mine", brightest, replace=True)
    register_strategy("norm", brightest, replace=True)
    assert STRATEGIES["norm"].function is STRATEGIES["mine"].function is brightest
    with pytest.raises(TypeError, match=r"STRATEGIES is filled by fastxattn\.register_strategy"):
        STRATEGIES["norm"] = brightest  # type: ignore[assignment]


def test_unknown_strategies_are_named() -> None:
    for wrong in ("magic", None, 3):
        with pytest.raises(ValueError, match=rf"strategy must be one of attention, evit, .*; got {wrong!r}"):
            TokenPruner(0.5, strategy=wrong)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=rf"strategy must be one of attention, evit, .*; got {wrong!r}"):
            fastxattn.prune_model(encoder("vit"), keep=0.5, strategy=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="register_strategy gives a function a name"):
        fastxattn.prune_model(encoder("vit"), keep=0.5, strategy=brightest)  # type: ignore[arg-type]


def test_models_refuse_a_strategy_that_drops_cls_tokens() -> None:
    register_strategy("forgetful", forgetful)
    model = encoder("clip")
    words = "strategy forgetful must keep protected tokens; it dropped 1 of sequence"
    pruned = fastxattn.prune_model(model, keep=0.25, strategy="forgetful", at=2)
    with torch.no_grad(), pruned, pytest.raises(ValueError, match=words):
        model(torch.randn(32, 3, 32, 32))


KEPT = select_tokens(torch.arange(8.0), offsets([4, 4]), TWO)  # rows 2 3 6 7
WRONG = {
    "must return a Selection; got int": 3,
    "must select among the 8 tokens of 2 sequences that it got; its selection is of 8 tokens of 1": select_tokens(
        torch.arange(8.0), offsets([8]), TWO
    ),
    "must select within the sequences that it got": select_tokens(torch.arange(8.0), offsets([3, 5]), TWO),
    "in ascending order; keep_index has 2 at place 1, of sequence 0": replace(
        KEPT, keep_index=torch.tensor([3, 2, 6, 7], dtype=torch.int32)
    ),
    "in ascending order; keep_index has 2 at place 1": replace(
        KEPT, keep_index=torch.tensor([2, 2, 6, 7], dtype=torch.int32)
    ),
    "keep_index has 4 at place 1, of sequence 0": replace(
        KEPT, keep_index=torch.tensor([2, 4, 6, 7], dtype=torch.int32)
    ),
    "keep_index has -1 at place 3, of sequence 1": replace(
        KEPT, keep_index=torch.tensor([2, 3, 6, -1], dtype=torch.int32)
    ),
    "cu_seqlens of the selection of strategy wrong must end within the 4 kept rows; got 5": replace(
        KEPT, cu_seqlens=torch.tensor([0, 2, 5], dtype=torch.int32)
    ),
    "must keep no more than the budget; it kept 3 of sequence 1, where the budget is 2": select_tokens(
        torch.arange(8.0), offsets([4, 4]), torch.tensor([2, 3], dtype=torch.int32)
    ),
}


@pytest.mark.parametrize("words", WRONG)
def test_results_are_checked_by_the_name_of_the_strategy(words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"strategy wrong .*{words}|{words}"):
        Strategy("wrong", lambda *arguments, **options: WRONG[words])(torch.zeros(8, 3), offsets([4, 4]), TWO)  # type: ignore[arg-type, return-value]


def test_a_merging_strategy_may_keep_more_than_the_budget() -> None:
    """ToMe merges half of the tokens at most."""
    kept = STRATEGIES["tome"](torch.randn(8, 3), offsets([8]), Budget.count(1))
    assert kept.rows == 4


def test_an_encoder_of_equal_lengths_names_the_strategy_that_keeps_unequal_numbers() -> None:
    def uneven(tokens: Tensor, cu_seqlens: Tensor, budget: Budget, **options: Any) -> Selection:
        counts = torch.arange(1, cu_seqlens.shape[0], dtype=torch.int32)
        return select_tokens(tokens[:, 0], cu_seqlens, counts, **options)

    register_strategy("uneven", uneven)
    model = encoder("siglip")
    pruned = fastxattn.prune_model(model, keep=0.5, strategy="uneven", at=1)
    with torch.no_grad(), pruned, pytest.raises(RuntimeError, match="strategy uneven must keep equal numbers"):
        model(torch.randn(2, 3, 32, 32))
