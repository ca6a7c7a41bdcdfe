"""Selection, Report and the handle of prune: moving, saving, and what a notebook shows."""

import copy
import io
import pickle
import re

import pytest
import torch
from torch import nn

import fastxattn
from fastxattn import Budget, Selection
from fastxattn.integrations import Left, Report, Swap, Verification
from fastxattn.integrations.pruning import Pruning
from fastxattn.runtime import html

OFFSETS = torch.tensor([0, 4, 4, 10], dtype=torch.int32)


def selection(merging=False):
    kept = fastxattn.select_tokens(torch.arange(10.0).roll(3), OFFSETS, Budget.count(2))
    return kept.merged(torch.zeros(10, dtype=torch.int32), torch.ones(10)) if merging else kept


def fields(kept):
    return {name: t for name, t in vars(kept).items() if isinstance(t, torch.Tensor)}


@pytest.mark.parametrize("merging", [False, True])
def test_moving_a_selection(merging):
    kept = selection(merging)
    assert len(kept) == 3
    assert kept.device == torch.device("cpu")
    assert kept.to("cpu") is kept
    assert kept.cpu() is kept
    assert kept.to(torch.zeros(1, dtype=torch.float16)) is kept  # its device alone
    assert kept.detach().max_seqlen == kept.max_seqlen
    moved = kept.to("meta", non_blocking=True)
    assert {t.device.type for t in fields(moved).values()} == {"meta"}
    assert {n: t.dtype for n, t in fields(moved).items()} == {n: t.dtype for n, t in fields(kept).items()}
    assert (moved.weight is None) is not merging
    copied = kept.to("cpu", copy=True)
    assert all(t.data_ptr() != fields(kept)[n].data_ptr() for n, t in fields(copied).items())
    for act in (lambda: kept.to(torch.float16), kept.half, lambda: kept.to("cpu", torch.int64)):
        with pytest.raises(TypeError, match="a Selection moves to a device and keeps its dtypes; got torch"):
            act()


def test_pinning_a_selection(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: t + 0)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda t: True)
    kept = selection(merging=True)
    pinned = kept.pin_memory()
    assert pinned.is_pinned()
    assert all(t is not fields(kept)[n] and torch.equal(t, fields(kept)[n]) for n, t in fields(pinned).items())


@pytest.mark.parametrize("merging", [False, True])
def test_saving_a_selection(merging):
    kept = selection(merging)
    file = io.BytesIO()
    torch.save(kept, file)
    file.seek(0)
    for again in (torch.load(file, weights_only=True), pickle.loads(pickle.dumps(kept)), copy.deepcopy(kept)):
        assert type(again) is Selection
        assert again.max_seqlen == kept.max_seqlen
        assert all(torch.equal(t, fields(kept)[n]) for n, t in fields(again).items())
        assert fields(again).keys() == fields(kept).keys()


def test_what_a_selection_prints():
    kept = selection()
    words = "3 sequences of 0 to 2 rows kept of 10 tokens"
    assert repr(kept) == f"Selection({words}, max_seqlen={kept.max_seqlen}, device=cpu)"
    assert f"{words}, merging" in repr(selection(merging=True))
    assert repr(kept.to("meta")).startswith("Selection(3 sequences kept of 10 tokens")
    page = kept._repr_html_()
    counts = [re.findall(r">(\d+)</td>", row) for row in page.split("<tr>")[2:]]
    assert counts == [["0", "4", "2"], ["1", "0", "0"], ["2", "6", "2"]]
    first, empty, last = re.findall(r"<svg.*?</svg>", page)
    for strip, start, end in ((first, 0, 4), (empty, 4, 4), (last, 4, 10)):
        cells = re.findall(r'x="(\d+)" width="(\d+)" height="1" fill="#1f6f8b"', strip)
        shown = {start + int(x) + i for x, width in cells for i in range(int(width))}
        assert shown == {i for i in kept.keep_index.tolist() if start <= i < end}
    assert "#a8d0db" not in page
    assert "#a8d0db" in selection(merging=True)._repr_html_()
    assert "<svg" not in kept.to("meta")._repr_html_()


HOSTILE = "<img src=x onerror=alert(1)>"


def test_what_a_report_prints():
    report = Report(
        [Swap(f"layer{i}", "a.b.Attention", "c.Adapter", "one kernel") for i in range(40)],
        [Left(HOSTILE, "a.b.Other", "a hook & more")],
        {HOSTILE: 3},
        Verification(1e-6, 1e-6, 2e-6, 1.5, (1.4, 1.6), 3.0, True),
    )
    assert repr(report) == "Report(40 swapped, 1 unchanged, 1 unknown classes, 1.50x, kept)"
    assert repr(Report(dry_run=True)) == "Report(0 swapped, 0 unchanged, 0 unknown classes, dry run)"
    page = report._repr_html_()
    assert "<img" not in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    assert "a hook &amp; more" in page
    assert page.count("<tr>") == 1 + 40 + 1 + 1 + 1
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    assert repr(fastxattn.accelerate(model)).startswith("Report(1 swapped")
    assert repr(fastxattn.status(model)).startswith("Report(1 swapped")
    assert "MultiheadAttention" in fastxattn.status(model)._repr_html_()


def test_reports_and_handles_are_saved_without_the_live_model():
    handle = Pruning()
    handle.at_restore(lambda: None)
    report = Report([Swap("x", "a", "b", "c")], pruning=handle)
    assert "pruning" in repr(report)
    again = pickle.loads(pickle.dumps(report))
    assert again.swapped == report.swapped
    assert again.pruning is None
    assert report.pruning is handle


def test_what_a_pruning_handle_prints():
    handle = Pruning()
    handle.at_restore(lambda: None)
    assert repr(handle) == "Pruning(active, last=None)"
    assert "active" in handle._repr_html_()
    handle.last = selection()
    assert repr(handle) == f"Pruning(active, last={handle.last!r})"
    assert handle.last._repr_html_() in handle._repr_html_()
    handle.restore()
    assert repr(handle).startswith("Pruning(restored")


def test_tables_escape_all_but_markup():
    page = html.table("<b>", ("<i>",), [("<u>", html.Markup("<svg/>"))])
    assert not {"<b>", "<i>", "<u>"} & set(re.findall(r"<.*?>", page))
    assert "<svg/>" in page
    assert html.strip([]).count("<rect") == 0
