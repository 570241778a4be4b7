"""A run leaves its page and what the page needs to know, and a resumed one goes on with both."""

from __future__ import annotations

import json
from pathlib import Path

import demo_model
import pytest

from tests.report.pages import Page
from tests.runs import assert_bit_equal, few_clips, final_state, launch_here, metrics
from trainer.report import reporter

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


def test_the_page_of_a_demo_says_what_its_codec_knows(tmp_path: Path) -> None:
    clips = few_clips(tmp_path / "data")
    assert demo_model.main(["--dataset", str(clips), "--output", str(tmp_path / "demo")]) == 0
    launch_here(tmp_path, "--model_id", "demo", "--max_steps", "1")
    said = "fitted to the 3 clips it was made from and knows no other music"
    assert said in page_of(tmp_path).text
    # The exported model has the same codec.
    launch_here(tmp_path, "--model_id", "models/huggingface", "--max_steps", "1", "--output_dir", "again")
    assert json.loads((tmp_path / "again/run.json").read_bytes())["codec_fitted_clips"] == 3


def test_weights_and_losses_are_those_of_a_run_without_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--max_steps", "6", "--validation", "0.34", "--sample_every", "3", "--sample_seconds", "0.2")
    pages, whole = list[Path](), reporter.write_whole

    def counted(path: Path, content: bytes) -> None:
        pages.append(path)
        whole(path, content)

    monkeypatch.setattr(reporter, "write_whole", counted)
    monkeypatch.setattr(reporter, "LOOK_SECONDS", 0.001)
    monkeypatch.setattr(reporter.Reporter, "pause_seconds", lambda self, took: 0.0)  # one page after the other
    launch_here(tmp_path / "with", *flags)
    assert len(pages) > 2
    monkeypatch.setattr(reporter.Reporter, "_work", lambda self: None)
    launch_here(tmp_path / "without", *flags)
    assert not (tmp_path / "without/models/report.html").exists()
    assert_bit_equal(final_state(tmp_path / "with"), final_state(tmp_path / "without"))
    assert metrics(tmp_path / "with") == metrics(tmp_path / "without")
