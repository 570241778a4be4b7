"""scripts/check_dataset.py: its flags, what it writes and says, and its exit codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import check_dataset
import huggingface_hub.constants as constants
import pytest

from tests.data.hub_server import asked_by_this_process
from tests.data.table_files import rows_of, write_parquet
from tests.report.pages import Page
from trainer.errors import EXIT_DATA, EXIT_DONE, EXIT_FAILED, EXIT_STORAGE, EXIT_USAGE

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def music(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "no models"))
    folder = tmp_path / "music"
    folder.mkdir()
    for name in ("arcade_meadow.wav", "arcade_meadow.txt"):
        shutil.copy(EXAMPLES / name, folder)
    return folder


def test_a_folder_in_order_gives_three_files_and_exit_code_0(music: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_dataset.main([str(music), "--strict"]) == EXIT_DONE
    folder = music.parent / "dataset_report"
    assert {path.name for path in folder.iterdir()} == {"dataset.csv", "dataset.json", "dataset.html"}
    assert (folder / "dataset.csv").read_bytes() == b"path,fate,detail\r\narcade_meadow.wav,used,\r\n"
    values = json.loads((folder / "dataset.json").read_bytes())
    assert (values["version"], values["figures"]["clips"]) == (1, 1)
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "the page with all of it: dataset_report/dataset.html" and len(said) < 25
    assert any("not looked at" in line for line in said)  # no tokenizer is here


def test_a_file_left_out_is_a_failure_with_strict_alone(music: Path) -> None:
    (music / "cut.wav").write_bytes((music / "arcade_meadow.wav").read_bytes()[:9_000])
    (music / "cut.txt").write_text("a song")
    (music / "cover.jpg").write_bytes(b"")  # ignored, and no failure
    assert check_dataset.main([str(music)]) == EXIT_DONE
    assert check_dataset.main([str(music), "--strict"]) == EXIT_FAILED
    (music / "cut.wav").unlink()
    (music / "cut.txt").unlink()
    assert check_dataset.main([str(music), "--strict"]) == EXIT_DONE


def test_a_folder_without_a_clip_has_exit_code_3_and_a_page(music: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (music / "arcade_meadow.txt").unlink()
    for number in range(12):
        shutil.copy(music / "arcade_meadow.wav", music / f"{number}.wav")
    assert check_dataset.main([str(music), "--report", "elsewhere"]) == EXIT_DATA
    said = capsys.readouterr().err
    findings = json.loads((music.parent / "elsewhere/dataset.json").read_bytes())["mend_first"]
    assert ["scripts/caption.py" in one["advice"] for one in findings if one["key"] == "fate:no caption"] == [True]
    assert "and 3 more\n" in said and "elsewhere/dataset.html" in said and "python scripts/caption.py" in said
    assert "No clip can be trained on" in (music.parent / "elsewhere/dataset.html").read_text()
    assert check_dataset.main([str(music), "--no_label", "1"]) == EXIT_DONE


@pytest.mark.parametrize(
    "flags,said",
    [
        (["--lr", "1"], "--lr has no effect here"),
        (["--output_dir", "x"], "use --report FOLDER"),
        (["--report", "music/report"], "would count as data"),
        (["--report"], "--report has no value"),
        (["--sterict"], "--sterict is no flag"),
        (["--validation", "music"], "overlap"),
    ],
)
def test_flags_that_cannot_work_are_refused(
    music: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    assert check_dataset.main([str(music), *flags]) == EXIT_USAGE
    assert said in capsys.readouterr().err


def test_a_report_that_cannot_be_written_has_exit_code_4(music: Path) -> None:
    (music.parent / "taken").write_text("")
    assert check_dataset.main([str(music), "--report", "taken"]) == EXIT_STORAGE


def test_the_file_of_flags_of_a_run_is_understood(music: Path) -> None:
    (music.parent / "run.yaml").write_text(f"dataset_path: {music}\nlr: 1e-4\nno_label: 1\n")
    (music / "arcade_meadow.txt").unlink()
    assert check_dataset.main(["--config", "run.yaml"]) == EXIT_DONE


def test_rows_of_a_table_are_on_the_page_without_links_and_play_from_excerpts(music: Path) -> None:
    write_parquet(music / "rows/x.parquet", rows_of(range(3)))
    assert check_dataset.main([str(music / "rows"), "--embed"]) == EXIT_DONE
    values = json.loads((music.parent / "dataset_report/dataset.json").read_bytes())
    rows = values["files"]
    assert [row["path"] for row in rows] == ["0.wav", "1.wav", "2.wav"]
    assert [row["link"] for row in rows] == [""] * 3 and values["figures"]["captions"]["sources"] == {"x.parquet": 3}
    page = Page((music.parent / "dataset_report/dataset.html").read_text())
    assert set(page.data["excerpts"]) == {"0.wav", "1.wav", "2.wav"}


def test_help_fits_a_terminal_and_names_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_dataset.main(["--help"]) == EXIT_DONE
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 120 and "--caption_template" in said and "dataset_path" not in said


def test_a_data_set_of_the_hub_is_looked_at_as_the_same_files_in_a_folder_are(
    music: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_parquet(music / "rows/data/train-00000-of-00001.parquet", rows_of(range(3)))
    write_parquet(music / "rows/data/test-00000-of-00001.parquet", rows_of([7]))
    assert check_dataset.main([str(music / "rows"), "--report", "local"]) == EXIT_DONE
    with asked_by_this_process(music.parent / "hub_cache", monkeypatch) as hub:
        hub.add("user/name", music / "rows", "a" * 40, branch="v1")
        typed = ["user/name", "--dataset_revision", "v1", "--report", "of_hub"]
        assert check_dataset.main(typed) == EXIT_DONE
        assert check_dataset.main([*typed[:-1], "other", "--dataset_split", "test"]) == EXIT_DONE
    assert f"data set user/name of the hub, commit {'a' * 40}: 1 file(s)" in capsys.readouterr().out
    names = ("local", "of_hub", "other")
    local, of_hub, other = (json.loads(Path(name, "dataset.json").read_bytes()) for name in names)
    of_split = {"fates", "files"}  # the table of the other split is not fetched, and in the folder it is ignored
    figures = [{name: of[name] for name in of.keys() - of_split} for of in (local["figures"], of_hub["figures"])]
    assert figures[0] == figures[1] and figures[0]["clips"] == 3
    used = [{row["path"]: row["caption"] for row in one["files"] if row["fate"] == "used"} for one in (local, of_hub)]
    assert used[0] == used[1] and len(used[0]) == 3
    assert [row["path"] for row in other["files"]] == ["7.wav"]


def test_what_is_neither_here_nor_on_the_hub_is_refused_with_both_readings(
    music: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with asked_by_this_process(music.parent / "hub_cache", monkeypatch):
        assert check_dataset.main(["user/name"]) == EXIT_DATA
    said = capsys.readouterr().err
    assert f"there is no folder user/name in {music.parent}; and the hub has no data set of this name" in said
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert check_dataset.main(["user/name"]) == EXIT_DATA
    assert f"there is no folder user/name in {music.parent}; and HF_HUB_OFFLINE is set" in capsys.readouterr().err
    assert check_dataset.main([str(music), "--dataset_revision", "v1"]) == EXIT_USAGE
    assert "--dataset_revision v1 has no effect" in capsys.readouterr().err


def test_a_prepared_folder_has_no_sounds_to_look_at(
    music: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("prepared.json", "clips.parquet", "codes/part-00000.arrow"):
        (music / name).parent.mkdir(exist_ok=True)
        (music / name).write_text("{}")
    assert check_dataset.main([str(music)]) == EXIT_USAGE
    assert f"{music} is a prepared folder, which holds no sounds to look at" in capsys.readouterr().err
