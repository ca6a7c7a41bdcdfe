"""Comparing two sets of results: regressions fail, noise does not, and a broken check is a regression."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks.compare import main
from benchmarks.harness import Record, write_csv
from benchmarks.harness.roofline import Peak, memory_gbytes


def results(
    folder: Path, mine: float, *, gate: str = "ok", padded: float = 0.5, case: str = "a", device: str = "m"
) -> str:
    def row(provider: str, ratio: float, gate: str) -> Record:
        return Record(
            "attention", case, "forward", provider, "sdpa", "float32", 2, 1.0, ratio, 1.0, gate, device, "v", "s"
        )

    rivals = row("sdpa", 1.0, "rival"), row("padded", padded, "rival")
    write_csv(folder / "attention.csv", [row("fastxattn cpu", mine, gate), *rivals])
    (folder / "other.csv").write_text("kernel,registers\nforward,3\n")
    return str(folder)


@pytest.mark.parametrize(
    ("new", "code", "said"),
    [
        ({"mine": 2.0}, 0, "0 worse, 0 better"),
        ({"mine": 1.98}, 0, "0 worse, 0 better"),
        ({"mine": 1.5}, 1, "2.00x -> 1.50x (-25.0%)"),
        ({"mine": 3.0}, 0, "1 better"),
        ({"mine": 1.5, "padded": 0.9}, 0, "noise 80.0%"),  # a rival changed more than fastxattn
        ({"mine": math.nan, "gate": "out: max error 1"}, 1, "out: max error 1"),
        ({"mine": 1.0, "case": "b"}, 0, "0 cases in both"),
        ({"mine": 1.0, "device": "n"}, 0, "0 cases in both"),  # ratios of two machines say nothing of the code
    ],
)
def test_what_counts_as_a_regression(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], new: dict[str, float], code: int, said: str
) -> None:
    old = results(tmp_path / "old", 2.0)
    assert main([old, results(tmp_path / "new", **new)]) == code  # type: ignore[arg-type]
    assert said in capsys.readouterr().out


def test_commits_can_be_compared() -> None:
    assert main(["HEAD", "HEAD"]) == 0
    with pytest.raises(SystemExit, match="neither a folder nor a commit"):
        main(["no-such-commit", "HEAD"])


def test_roofline_share_is_of_the_tighter_bound() -> None:
    peak = Peak(gflops=100.0, gbytes=10.0)
    assert peak.share(50e9, 0, 1.0) == (pytest.approx(0.5), "compute")
    assert peak.share(50e9, 9e9, 1.0) == (pytest.approx(0.9), "memory")
    assert math.isnan(peak.share(0, 0, 1.0)[0])
    assert math.isnan(Peak(math.nan, math.nan).share(1e9, 0, 1.0)[0])
    assert 0.1 < memory_gbytes() < 10_000
