"""A run that its dataset ends before it begins leaves the page, names it, and counts the reasons."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from tests.audio_files import write_clip
from tests.report.pages import Page
from tests.runs import launch_here
from trainer.data import dataset
from trainer.data.fates import Fate, reasons
from trainer.data.inventory import UnusableDataError, fates_of
from trainer.errors import EXIT_DATA
from trainer.flags.config import parse
from trainer.model.source import open_model
from trainer.report import report
from trainer.wiring import data_settings, report_settings


def _clips(count: int, caption: str | None, seconds: float) -> Callable[[Path], object]:
    return lambda data: [write_clip(data / f"{seed}.wav", caption, seconds, seed) for seed in range(count)]


def _cut(data: Path) -> None:
    os.truncate(write_clip(data / "a.wav", "x", seconds=3), 9_000)


NO_TRAINING, NO_VALIDATION = "No clip can be trained on", "No clip to validate on"
ENDINGS: dict[str, tuple[Callable[[Path], object], Sequence[str], dict[str, int], str]] = {
    "no captions": (_clips(3, None, 1), (), {"no caption": 3}, NO_TRAINING),
    "all too short": (_clips(2, "x", 0.1), (), {"too short": 2}, NO_TRAINING),
    "less than a frame of the codec": (_clips(1, "x", 0.015), ("--min_seconds=0.001",), {"too short": 1}, NO_TRAINING),
    "all damaged": (_cut, (), {"truncated": 1}, NO_TRAINING),
    "nothing there": (Path.mkdir, (), {}, NO_TRAINING),
    "all validate": (_clips(1, "x", 1), ("--validation=0.9999",), {"used": 1}, NO_TRAINING),
    "none validates": (_clips(1, "x", 1), ("--validation=0.0001",), {"used": 1}, NO_VALIDATION),
}


def ended(folder: Path, *flags: str) -> UnusableDataError:
    """What a run on folder/data fails with; the page of it is then in folder/report."""
    config, _ = parse([f"--dataset={folder / 'data'}", f"--cache_dir={folder / 'cache'}", "--model_id=debug", *flags])
    with pytest.raises(UnusableDataError) as caught:
        dataset.prepare(data_settings(config), open_model("debug"), torch.device("cpu"))
    report.write(caught.value.folders, report_settings(config), folder / "report", load_tokenizer=None)
    return caught.value


QUICK = ("less than a frame of the codec", "none validates")


@pytest.mark.parametrize("ending", [
    pytest.param(one, marks=() if one in QUICK else pytest.mark.full) for one in ENDINGS
])
def test_what_ends_a_run_stands_first_on_the_page(tmp_path: Path, ending: str) -> None:
    make, flags, counts, title = ENDINGS[ending]
    make(tmp_path / "data")
    error = ended(tmp_path, *flags)
    values = json.loads((tmp_path / "report" / report.FIGURES).read_bytes())
    assert values["figures"]["fates"] == counts and values["mend_first"][0]["title"] == title
    page = Page((tmp_path / "report" / report.PAGE).read_text(encoding="utf-8"))
    assert len(page.rows) == sum(counts.values()) and title in page.text
    for fate, count in counts.items():
        assert fate == "used" or f"{count}  {fate}" in str(error)


def test_a_folder_to_validate_on_without_a_clip_is_shown_behind_the_one_to_train_on(tmp_path: Path) -> None:
    write_clip(tmp_path / "data/a.wav", "x")
    write_clip(tmp_path / "held out/a.wav")
    error = ended(tmp_path, f"--validation={tmp_path / 'held out'}")
    assert str(error).startswith("no clip to validate on: ") and "1  no caption" in str(error)
    values = json.loads((tmp_path / "report" / report.FIGURES).read_bytes())
    assert [(row["path"], row["use"]) for row in values["files"]] == [
        ("a.wav", "training"), (f"{tmp_path}/held out/a.wav", ""),
    ]  # fmt: skip
    assert values["mend_first"][0]["title"] == NO_VALIDATION
    assert [fate.path for fate in fates_of(error.folders)] == ["a.wav", f"{tmp_path}/held out/a.wav"]


def test_a_run_without_a_clip_leaves_its_page_and_names_it(tmp_path: Path) -> None:
    write_clip(tmp_path / "data/a.wav")
    output = launch_here(tmp_path, expect=EXIT_DATA)
    last = output.rstrip().splitlines()[-1]
    assert last == "What became of every file, and what to do: models/dataset.html"
    assert "1  no caption" in output and "write a.txt beside it" in output
    assert (tmp_path / "models/dataset.csv").read_text().splitlines()[1].startswith("a.wav,no caption,")
    assert NO_TRAINING in (tmp_path / "models/dataset.html").read_text(encoding="utf-8")


@pytest.mark.full
def test_the_report_of_what_a_checkpoint_was_trained_on_outlives_a_start_without_a_clip(tmp_path: Path) -> None:
    write_clip(tmp_path / "data/a.wav", "x")
    flags = ("--segment_seconds", "1", "--max_steps")
    launch_here(tmp_path, *flags, "1")
    before = (tmp_path / "models/dataset.csv").read_bytes()
    os.rename(tmp_path / "data/a.txt", tmp_path / "elsewhere.txt")
    assert "models/dataset.html" in launch_here(tmp_path, *flags, "2", expect=EXIT_DATA)
    assert (tmp_path / "models/dataset.csv").read_bytes() == before
    os.rename(tmp_path / "elsewhere.txt", tmp_path / "data/a.txt")
    launch_here(tmp_path, *flags, "2")
    assert NO_TRAINING not in (tmp_path / "models/dataset.html").read_text(encoding="utf-8")


def test_reasons_are_counted_the_most_frequent_first_each_with_what_to_do() -> None:
    fates = [Fate(path=f"short {n}.wav", fate="too short", detail="use a longer take") for n in range(3)]
    fates += [Fate(path=f"song {n}.wav", fate="no caption", detail=f"write song {n}.txt") for n in range(500)]
    fates += [Fate(path=f"{n}.jpg", fate="ignored", detail="no sound") for n in range(900)]
    lines = reasons(fates).splitlines()
    counted = [line.split()[1:] for line in lines if line[8:9].isdecimal()]
    assert [" ".join(words) for words in counted] == ["no caption", "too short", "ignored"]
    below = Counter(line.split(":")[-1].strip() for line in lines if ".wav" in line or ".jpg" in line)
    assert below.total() == 10 and below["use a longer take"] == 3
    assert "and 496 more" in reasons(fates) and "and 897 more" in reasons(fates)
    assert reasons([Fate(path="a.wav", fate="used")]) == "" and "no files" in reasons([])
