"""dataset.html in a real browser, from file://: it sorts, filters, plays, and runs nothing but its own program."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import check_dataset
import pytest
import soundfile

from tests.report.browser import CHROMIUM, open_page
from tests.report.pages import folder_of
from trainer.errors import EXIT_DONE
from trainer.report import report
from trainer.report.settings import ReportSettings

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here to show the page in"),
]
NAMES = '[...document.querySelectorAll("#table tbody .path bdi")].map((cell) => cell.textContent)'
HOSTILE = "</script><script>document.title=666<"  # with a slash it is a folder and a file


def music(folder: Path) -> Path:
    """Three clips of the examples, one as mp3, and one with a hostile name, caption and folder."""
    folder.mkdir()
    for name in ("arcade_meadow", "rock_feelings"):
        shutil.copy(EXAMPLES / f"{name}.wav", folder)
        shutil.copy(EXAMPLES / f"{name}.txt", folder)
    samples, rate_hz = soundfile.read(EXAMPLES / "metal_madness.wav")
    soundfile.write(folder / "metal 100%.mp3", samples, rate_hz, format="MP3")
    os.rename(folder / "metal 100%.mp3", folder / "metal 100%.wav")  # browsers look at the content, as libsndfile does
    (folder / "metal 100%.txt").write_text("<img src=x onerror='document.title=666'>")
    hostile = folder / f"{HOSTILE}.wav"
    hostile.parent.mkdir()
    shutil.copy(EXAMPLES / "arcade_meadow.wav", hostile)
    hostile.with_suffix(".txt").write_text("</script><script>document.title = 666</script>")
    (folder / "lost.txt").write_text("no sound")
    return folder


def checked(tmp_path: Path, *flags: str) -> Path:
    folder, goal = music(tmp_path / "music"), tmp_path / "report"
    arguments = ["--cache_dir", str(tmp_path / "cache"), "--report", str(goal), "--model_id", "debug", *flags]
    assert check_dataset.main([str(folder), *arguments]) == EXIT_DONE
    return goal / report.PAGE


def test_the_page_sorts_filters_and_shows_what_to_mend(tmp_path: Path) -> None:
    with open_page(checked(tmp_path), tmp_path / "profile") as tab:
        assert len(tab.run(NAMES)) == 5
        tab.run('document.querySelector("th[data-name=seconds] button").click()')
        lengths = 'document.querySelectorAll("#table tbody .seconds bdi")'
        values = f"[...{lengths}].map((cell) => parseFloat(cell.textContent))"
        assert tab.run(values) == sorted(tab.run(values)) and len(tab.run(values)) == 4
        tab.run('document.querySelector("th[data-name=seconds] button").click()')
        assert tab.run(values) == sorted(tab.run(values), reverse=True)
        assert tab.run('document.querySelector("th[data-name=seconds]").getAttribute("aria-sort")') == "descending"
        assert tab.run(NAMES)[-1] == "lost.txt"  # whose length is not known
        tab.run('search.value = "ROCK"; search.dispatchEvent(new Event("input"))')
        assert "rock_feelings.wav" in tab.run(NAMES) and "lost.txt" not in tab.run(NAMES)
        tab.run('document.querySelector("button[data-show=\'fate:no audio\']").click()')
        assert tab.run(NAMES) == ["lost.txt"]
        assert tab.run('document.getElementById("count").textContent') == "1 of 5 files"


@pytest.mark.parametrize("flags", [(), ("--embed",)], ids=["linked", "embedded"])
def test_each_sound_plays_through_the_one_player_and_nothing_hostile_runs(tmp_path: Path, flags: list[str]) -> None:
    page = checked(tmp_path, *flags)
    if flags:
        shutil.rmtree(tmp_path / "music")  # the page alone, as on another machine
    with open_page(page, tmp_path / "profile") as tab:
        title = tab.run("document.title")
        assert title.startswith("Dataset: ")
        names = [name for name in tab.run(NAMES) if name != "lost.txt"]
        assert len(names) == 4 and f"{HOSTILE}.wav" in names
        for at in range(4):
            seconds = tab.run(
                "new Promise((done) => { const audio = document.querySelector('audio');"
                "audio.addEventListener('canplaythrough', () => done(audio.duration), { once: true });"
                "audio.addEventListener('error', () => done(-1), { once: true });"
                f"document.querySelectorAll('#table .play')[{at}].click(); }})"
            )
            assert 4 <= seconds < 12, names[at]
            assert names[at] in tab.run('document.getElementById("playing").textContent')
        assert tab.run('document.querySelectorAll("audio").length') == 1
        tab.run('document.getElementById("last").click()')
        assert names[-2] in tab.run('document.getElementById("playing").textContent')
        assert tab.run('document.querySelectorAll("#table img, #table script, #table b").length') == 0
        assert tab.run("document.title") == title
        assert all(url.startswith(("file:", "data:")) for url in tab.requests), tab.requests


def test_a_page_of_20_000_files_draws_50_rows_and_answers_at_once(tmp_path: Path) -> None:
    folder = folder_of({f"song {n:05d}.wav": f"a song of {n % 977}" for n in range(20_000)})
    folder = replace(folder, inspected=tuple(replace(one, caption_source="") for one in folder.inspected))
    report.write([folder], ReportSettings(), tmp_path, load_tokenizer=None)
    with open_page(tmp_path / report.PAGE, tmp_path / "profile") as tab:
        assert len(tab.run(NAMES)) == 50
        tab.run('document.querySelector("th[data-name=path] button").click()')
        tab.run('document.querySelector("th[data-name=path] button").click()')
        assert tab.run(NAMES)[0] == "song 19999.wav"
        tab.run('document.getElementById("after").click()')
        assert tab.run(NAMES)[0] == "song 19949.wav"
        tab.run('search.value = "song 123"; search.dispatchEvent(new Event("input"))')
        found = sum("123" in f"{n:05d}" or "123" in str(n % 977) for n in range(20_000))
        assert tab.run('document.getElementById("count").textContent') == f"{found} of 20,000 files"
