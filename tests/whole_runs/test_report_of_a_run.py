"""A run leaves its page and what the page needs to know, and a resumed one goes on with both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.report.pages import Page
from tests.runs import launch_here, metrics

pytestmark = pytest.mark.full


def page_of(folder: Path) -> Page:
    return Page((folder / "models/report.html").read_text(encoding="utf-8"))


def test_a_run_and_its_resumption_leave_a_page_with_all_steps_and_where_it_went_on(tmp_path: Path) -> None:
    output = launch_here(tmp_path, "--max_steps", "2")
    assert output.count("models/report.html") == 2 and "warning: report.html" not in output
    start = json.loads((tmp_path / "models/run.json").read_bytes())
    assert (start["steps"], start["start_step"], start["clips"], start["device"]) == (2, 0, 3, "CPU")
    page = page_of(tmp_path)
    assert "finished</span>" in page.text and float(page.figures["step"]) == 2
    assert float(page.figures["loss"]) == metrics(tmp_path)[2]

    launch_here(tmp_path, "--max_steps", "4")
    start = json.loads((tmp_path / "models/run.json").read_bytes())
    assert start["steps"] == 4 and [one["start_step"] for one in start["starts"]] == [0, 2]
    page = page_of(tmp_path)
    charts = page.data["charts"]
    assert charts[1]["marks"] == [[2, "resumed"]] and charts[0]["series"][0]["x"] == [1, 2, 3, 4]
    assert "--max_steps 4" in page.text and page.links == ["dataset.html"]
