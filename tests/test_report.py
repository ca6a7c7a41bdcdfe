"""The report: drawn from whatever CSVs there are, in one file that needs no other, and shown by a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks.common import RESULTS
from benchmarks.harness.page import write_page
from benchmarks.harness.sections import SECTIONS, Table, kind, read_tables

pytest.importorskip("matplotlib")
CSVS = {
    "speed": "op,case,direction,provider,rival,dtype,threads,median_ms,ratio,gflops,gate,device,versions,git_sha\n"
    "attention,<ragged>,forward,fastxattn cpu,sdpa,float32,2,1.5,2.000,50,ok,a machine,fastxattn 0.1.0,abc\n"
    "attention,<ragged>,forward,sdpa,sdpa,float32,2,3.0,1.000,25,rival,a machine,fastxattn 0.1.0,abc\n"
    "attention,missed,forward,fastxattn cpu,sdpa,float32,2,nan,nan,nan,out: error,a machine,fastxattn 0.1.0,abc\n",
    "memory": "op,n,provider,peak_bytes\ninfonce,1024,fastxattn cpu,5e6\ninfonce,4096,fastxattn cpu,2e7\n"
    "infonce,1024,eager,1.5e7\ninfonce,4096,eager,2.5e8\n",
    "accuracy": "task,measure,strategy,keep,mean,ci95\ndigits,accuracy,unpruned,1.0,0.95,0.01\n"
    "digits,accuracy,evit,0.5,0.90,0.02\ndigits,accuracy,evit,0.25,0.80,0.02\ndigits,accuracy,tome,0.5,0.9,0.02\n",
    "errors": "op,backend,dtype,case,max_error,budget\nattention,cpu,float32,a,1e-6,2e-6\n"
    "attention,cpu,float32,b,3e-6,2e-6\n",
    "other": "kernel,registers\nforward,213\n",
}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    folder.mkdir()
    for name, text in CSVS.items():
        (folder / f"{name}_of_something.csv").write_text(text)
    return folder


def test_a_csv_is_recognised_by_its_columns(results: Path) -> None:
    assert [kind(t) for t in read_tables(results)] == sorted(CSVS)
    assert kind(Table("x", ())) == "other"


def test_the_results_of_this_checkout_are_recognised() -> None:
    kinds = {t.name: kind(t) for t in read_tables(RESULTS)}
    assert set(SECTIONS) == set(kinds.values())
    assert [name for name, found in kinds.items() if found == "other" and not name.endswith("offline")] == []


def test_the_page_shows_every_result_and_needs_no_other_file(results: Path, tmp_path: Path) -> None:
    page = write_page(results, tmp_path / "report.html")
    assert (page.tables, page.missing) == (5, ())
    text = page.path.read_text()
    assert text.count("<svg") == 4
    assert "&lt;ragged&gt;, forward" in text.replace("\n", "")
    assert "1 of 2 rows have no speed" in text
    assert "1 of 2 results are outside their budget" in text
    assert "Measured on a machine · fastxattn 0.1.0 · abc" in text
    assert "nan" not in re.sub(r"<svg.*?</svg>", "", text, flags=re.S)
    loaded = re.findall(r'(?:src|href)="(?!#)([^"]+)"|url\((?!#)([^)]+)\)|<script', text)
    assert loaded == []


def test_sections_without_results_say_how_to_get_them(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    page = write_page(tmp_path / "none", tmp_path / "report.html")
    assert page.missing == (
        "Speed against rivals",
        "Memory against N",
        "Accuracy against kept tokens",
        "Error against budget",
    )
    assert page.path.read_text().count("Not measured yet") == 4


def test_a_browser_shows_it(results: Path, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium or Chrome on PATH")
    page = write_page(results, tmp_path / "report.html").path
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
    done = subprocess.run(
        [
            browser,
            *flags,
            f"--user-data-dir={tmp_path}/browser",
            f"--screenshot={tmp_path}/page.png",
            "--window-size=1200,3000",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    from PIL import Image

    with Image.open(tmp_path / "page.png") as picture:
        shown = picture.convert("RGB")
    assert shown.size == (1200, 3000)
    assert len(shown.getcolors(1 << 20) or ()) > 50  # text and charts, not a blank page
