"""scripts/report.py --blind and --score: the flags, what they write and say, and their exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import report

from tests.report.runs_with_samples import write_run
from trainer.errors import EXIT_DATA, EXIT_DONE, EXIT_STORAGE, EXIT_USAGE


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_run(tmp_path / "models", (0, 60), ["slow rock", "fast metal"], seconds=0.5)


def test_the_page_lies_in_the_run_and_what_is_said_names_the_sides_but_not_their_order(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for seed in range(6):
        assert report.main(["models", "--blind", "--seed", str(seed)]) == EXIT_DONE
        said.append(capsys.readouterr().out)
    first, second, last = said[0].splitlines()
    assert (first, second) == ("compared: models, step 0 (before training)", "compared: models, step 60")
    assert last.startswith("2 prompts to judge, 0.") and last.endswith("MB: models/blind.html")
    assert len(set(said)) == 1 and (run / "blind.html").is_file()


def test_without_a_seed_each_page_is_another_one(run: Path) -> None:
    pages = set()
    for _ in range(2):
        assert report.main(["models", "--blind", "--output", "to/it.html"]) == EXIT_DONE
        pages.add((run.parent / "to/it.html").read_text())
    assert len(pages) == 2


@pytest.mark.parametrize(
    "flags,said,code",
    [
        ([], "give the output_dir of a run", EXIT_USAGE),
        (["--blind"], "needs the output_dir of a run", EXIT_USAGE),
        (["models", "--rating"], "--rating has no effect without --blind", EXIT_USAGE),
        (["--score", "x.json", "--steps", "0"], "--steps has no effect without --blind", EXIT_USAGE),
        (["models", "--score", "x.json"], "leave out runs", EXIT_USAGE),
        (["models", "--blind", "--score", "x.json"], "leave out runs", EXIT_USAGE),
        (["models", "--blind", "--seed", "-1"], "a whole number from 0", EXIT_USAGE),
        (["models", "--blind", "--seed", "x"], "invalid int value", EXIT_USAGE),
        (["models", "--blind", "--step", "0"], "Did you mean --steps", EXIT_USAGE),
        (["models", "--blind", "--steps", "60"], "only one side", EXIT_USAGE),
        (["models", "--blind", "--steps", ""], "is no step", EXIT_USAGE),
        (["absent", "--blind"], "absent is no folder", EXIT_USAGE),
        (["models", "--blind", "--output", "file/page.html"], "give another --output", EXIT_STORAGE),
        (["--score", "x.json"], "no file that a listening page has saved", EXIT_DATA),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str, code: int
) -> None:
    (run.parent / "file").write_bytes(b"")
    assert report.main(flags) == code
    assert said in capsys.readouterr().err
    assert not (run / "blind.html").exists()


def test_saved_files_are_joined_into_one_table(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sides = ["models, step 0 (before training)", "models, step 60"]
    for name, choice in (("anna", sides[1]), ("ben", sides[0])):
        sounds = [{"side": side, "mark": mark} for side, mark in zip(sides, (2, 4), strict=True)]
        values = {
            "format": "musicgen-trainer listening", "version": 1, "page": "p", "session": name, "listener": name,
            "saved": 1.0, "sides": [{"name": side} for side in sides],
            "judgements": [{"choice": choice, "sounds": sounds}] * 3,
        }  # fmt: skip
        (run.parent / f"{name}.json").write_text(json.dumps(values))
    assert report.main(["--score", "anna.json", "ben.json"]) == EXIT_DONE
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "judgements: 6 (anna 3, ben 3)"
    assert lines[-1].split()[-4:] == ["3", "3", "0", "1.000"]
