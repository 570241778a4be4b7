"""A run says beforehand how long it takes and what disk it needs, and a resumed one what is left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.runs import launch_here, metrics
from trainer.plan.disk import bytes_of

EXPORTS = ("lm_final.pt", "huggingface", "audiocraft")


def forecast(folder: Path) -> dict:
    return json.loads((folder / "models/run.json").read_text())["forecast"]


def test_a_run_tells_its_time_and_the_disk_that_it_then_takes(tmp_path: Path) -> None:
    told = launch_here(tmp_path, "--max_steps", "2")
    lines = told.splitlines()
    [expected] = [line for line in lines if line.startswith("expected (how long a step takes is measured")]
    [measured] = [line for line in lines if line.startswith("measured: ")]
    [disk] = [line for line in lines if line.startswith("disk: checkpoints 3 x 32 MB")]
    [heard] = [line for line in lines if line.startswith("each ")]
    assert lines.index(expected) < lines.index(heard) < lines.index(disk) < lines.index(measured)
    assert "2 steps to do" in expected and "2 steps to do" in measured and "for a full step" in measured
    # Three clips of 5 to 6 s, 4 s a crop: 16 crops are more than five of each, and 2 steps of 8.
    assert heard.endswith(" on average: 5.33 epochs of 3 crops of 3 clips, 2 steps of 8")
    start = json.loads((tmp_path / "models/run.json").read_text())
    assert start["times_heard"] == pytest.approx(16 * 4 / (3600 * start["hours"]), rel=0.01)
    # What it foretold lies there. The cache keeps a little more: the tables of its parts.
    found = forecast(tmp_path)
    assert sum(bytes_of(str(tmp_path / "models" / name)) for name in EXPORTS) == pytest.approx(
        found["export_bytes"], rel=0.01
    )
    assert bytes_of(str(tmp_path / "models/checkpoints")) == pytest.approx(found["checkpoint_bytes"], rel=0.01)
    cache = sum(bytes_of(str(tmp_path / "cache" / name)) for name in ("codes", "text"))
    assert cache == pytest.approx(found["cache_bytes"], rel=0.05)
    left = metrics(tmp_path, "seconds_left")
    assert left[1] > 0 and left[2] == 0
    assert found["steps_left"] == 2 and found["seconds_left"] == pytest.approx(2 * found["step_seconds"])


@pytest.mark.full
def test_a_resumed_run_tells_what_is_left(tmp_path: Path) -> None:
    launch_here(tmp_path, "--max_steps", "2")
    again = launch_here(tmp_path, "--max_steps", "5")
    assert "5 steps of 8 (2 steps are done)" in again
    assert "3 steps to do" in again and "5 steps to do" not in again
    assert forecast(tmp_path)["steps_left"] == 3
