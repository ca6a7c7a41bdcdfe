"""The statistics behind what is said about accuracy under pruning."""

from __future__ import annotations

import pytest
import torch

from benchmarks.pruning_retention import interval

stats = pytest.importorskip("scipy.stats")


def test_intervals_are_students_and_copies_of_an_image_add_nothing() -> None:
    torch.manual_seed(0)
    values = torch.rand(40)
    want = float(values.double().std()) / 40**0.5 * stats.t.ppf(0.975, 39)
    assert interval(values, torch.arange(40)) == pytest.approx(want)
    copies = values.repeat_interleave(5)
    assert interval(copies, torch.arange(40).repeat_interleave(5)) == pytest.approx(want)
    assert interval(copies, torch.arange(200)) < 0.5 * want  # what ignoring the copies would claim
    assert interval(values, torch.arange(40), comparisons=30) > 1.4 * want
