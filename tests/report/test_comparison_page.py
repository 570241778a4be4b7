"""The page of compared models holds each sound in its place, escapes what it is given, and needs no other file."""

from __future__ import annotations

import base64
import io
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.audio_files import noise
from tests.report.browser import CHROMIUM, open_page
from tests.report.pages import Page
from tests.report.test_report import HOSTILE
from tests.report.test_run_page import OUR_TAGS
from tests.report.test_run_page_browser import ARROWS, FOCUS, HEARD, PLAYING
from trainer.report import run_sounds, template
from trainer.report.comparison_page import NOT_MADE, PROGRAMS, ComparedModel, write_comparison

PROGRAM = "".join((template.HERE / name).read_text(encoding="utf-8") for name in PROGRAMS)
RATE_HZ = 32_000
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here to show the page in")


def sounds_of(folder: Path, name: str, count: int, *, seconds: float, kind: str = "wav") -> list[Path | None]:
    """Sounds of different loudness, by which they are told apart after mp3."""
    folder.mkdir(exist_ok=True)
    made: list[Path | None] = []
    for number in range(count):
        file = folder / f"{name}_{number}.{kind}"
        gain = 0.5 ** (len(name) + 2 * number)
        soundfile.write(file, gain * noise(seconds, RATE_HZ, seed=number), RATE_HZ)
        made.append(file)
    return made


def compared(folder: Path, prompts: list[str], *, seconds: float = 0.3, kind: str = "wav") -> list[ComparedModel]:
    titles = {"a": "base model", "bb": "tuned"}
    return [
        ComparedModel(title=title, remark="", sounds=sounds_of(folder, name, len(prompts), seconds=seconds, kind=kind))
        for name, title in titles.items()
    ]


def loudness(sound: np.ndarray) -> float:
    return float(np.sqrt(np.square(sound).mean()))


@pytest.mark.parametrize("kind", ["wav", "flac", "mp3"])
def test_each_cell_plays_the_sound_of_its_model_and_prompt(tmp_path: Path, kind: str) -> None:
    prompts = ["slow rock", "fast metal", "slow rock"]  # the same prompt twice: two rows
    columns = compared(tmp_path / "sounds", prompts, kind=kind)
    write_comparison(tmp_path / "page.html", columns, prompts, {"seed": "7", "guidance": "3"})
    shutil.rmtree(tmp_path / "sounds")
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    cells = re.findall(r'data-sound="(\d+)"><button[^>]* aria-label="Play (.*?): (.*?)"', page.text)
    assert [(model, prompt) for _, model, prompt in cells] == [
        (model, prompt) for prompt in prompts for model in ("base model", "tuned")
    ]
    heard = [base64.b64decode(page.data["sounds"][int(number)]["mp3"]) for number, _, _ in cells]
    levels = [loudness(soundfile.read(io.BytesIO(one))[0]) for one in heard]
    assert [round(float(np.log2(levels[0] / one))) for one in levels] == [0, 1, 2, 3, 4, 5]
    for name, value in (("seed", "7"), ("guidance", "3")):
        assert f'<th scope="row"><bdi>{name}</bdi></th><td><bdi>{value}</bdi></td>' in page.text


def test_a_sound_that_is_missing_is_told_in_its_place(tmp_path: Path) -> None:
    base, tuned = compared(tmp_path, ["one", "two"])
    (tmp_path / "a_1.wav").write_bytes(b"RIFF and no more")
    tuned = ComparedModel(title="tuned", remark="step 20", sounds=[None, tuned.sounds[1]])
    write_comparison(tmp_path / "page.html", [base, tuned], ["one", "two"], {})
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert len(page.data["sounds"]) == 2 and NOT_MADE in page.text and "no sound" in page.text
    assert "Settings of all sounds" not in page.text and '<span class="remark">step 20</span>' in page.text


def test_hostile_texts_are_shown_as_text_and_the_page_asks_for_nothing(tmp_path: Path) -> None:
    texts = [*HOSTILE, "</script><img src=x onerror=alert(1)>", "", "\ud800", "two\nlines"]
    columns = [
        ComparedModel(title=title, remark=title, sounds=sounds_of(tmp_path, "a", len(texts), seconds=0.05))
        for title in (HOSTILE[0], HOSTILE[2], "\udcff")
    ]
    write_comparison(tmp_path / "page.html", columns, texts, {text: text for text in texts})
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert set(page.tags) <= OUR_TAGS and page.tags.count("script") == 2 and page.scripts[1:] == [PROGRAM]
    assert not page.handlers and not page.links and "<" not in page.scripts[0]
    assert not re.search(r"https?:", page.text) and "default-src 'none'" in page.text
    assert len(page.data["sounds"]) == 3 * len(texts) and all("mp3" in one for one in page.data["sounds"])


def test_sounds_that_do_not_fit_are_cut_and_then_left_to_their_files_from_the_last_prompt_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_sounds, "SHORTEST_SECONDS", 0.5)
    prompts = [f"prompt {number}" for number in range(4)]
    columns = compared(tmp_path, prompts, seconds=2.0)
    limits = {120_000: [True] * 8, 40_000: [True] * 6 + [False] * 2}
    for most, inside in limits.items():
        monkeypatch.setattr(run_sounds, "MOST_BYTES", most)
        write_comparison(tmp_path / "page.html", columns, prompts, {})
        page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
        kept = [one["mp3"] for one in page.data["sounds"] if "mp3" in one]
        assert ["mp3" in one for one in page.data["sounds"]] == inside and sum(map(len, kept)) <= most
        assert ("play as long as the page lies where it was written" in page.text) == (not all(inside))
        assert {(tmp_path / one["link"]).is_file() for one in page.data["sounds"] if "link" in one} <= {True}


def test_columns_that_cannot_be_told_apart_or_lack_sounds_are_refused(tmp_path: Path) -> None:
    base, tuned = compared(tmp_path, ["one", "two"])
    with pytest.raises(ValueError, match="base model has 2 sounds for 3 prompts"):
        write_comparison(tmp_path / "page.html", [base, tuned], ["one", "two", "three"], {})
    with pytest.raises(ValueError, match="same title: base model, base model"):
        write_comparison(tmp_path / "page.html", [base, base], ["one", "two"], {})
    assert not (tmp_path / "page.html").exists()


@pytest.mark.full
@in_browser
def test_the_page_plays_one_sound_at_a_time_by_click_and_by_keys_alone_on_another_machine(tmp_path: Path) -> None:
    prompts = ["slow rock", "</script><img src=x onerror=\"document.title='x'\">"]
    columns = compared(tmp_path / "sounds", prompts, seconds=4.0)
    half = ComparedModel(title="tuned, strength 0.5", remark="models", sounds=columns[1].sounds)
    write_comparison(tmp_path / "page.html", [columns[0], half, columns[1]], prompts, {"seed": "0"})
    shutil.rmtree(tmp_path / "sounds")
    with open_page(tmp_path / "page.html", tmp_path / "profile") as tab:
        count = tab.run("document.querySelectorAll('.play').length")
        assert count == 6
        for at in range(count):
            click = f"document.querySelectorAll('.play')[{at}].click()"
            assert tab.run(HEARD % (0, click)) == pytest.approx(4, abs=0.2)
            assert len(tab.run(PLAYING)) == 1
        tab.run("document.querySelector('audio').pause(); document.querySelector('.play').focus()")
        for key in ("ArrowRight", "ArrowDown"):
            tab.key(key, code=ARROWS[key])
        assert tab.run(FOCUS) == f"Play tuned, strength 0.5: {prompts[1]}"
        tab.key(" ", code=32)
        assert tab.run(HEARD % (0, "0")) > 0 and tab.run(PLAYING) == [f"Play tuned, strength 0.5: {prompts[1]}"]
        assert tab.run("document.title") == "Compared: base model, tuned, strength 0.5, tuned"
        for width in (400, 1200):
            tab.resize(width, 800)
            assert tab.run("document.documentElement.scrollWidth") <= width
        assert tab.errors == [] and all(url.startswith(("file:", "data:")) for url in tab.requests)
