"""report.html in a real browser, from file://: it plays one sound at a time, draws its curves, asks for nothing."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import report as report_script

from tests.report.browser import CHROMIUM, Tab, open_page
from tests.report.judged_runs import add_judgement
from tests.report.made_runs import add_sounds, made_run
from tests.report.test_report import HOSTILE
from trainer.report import run_sounds

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here to show the page in"),
]
ARROWS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
FOCUS = "document.activeElement.getAttribute('aria-label')"
PLAYING = "[...document.querySelectorAll('.sound.on .play')].map((button) => button.getAttribute('aria-label'))"
# Waits until no sound is shown as playing, which follows the player's event.
SILENT = """new Promise((done) => {
  const look = () => (document.querySelector(".sound.on") ? requestAnimationFrame(look) : done(true));
  look();
})"""
# Clicks, and waits until the sound is heard.
HEARD = """new Promise((done) => {
  const audio = document.querySelector("audio"), from = %s;
  audio.addEventListener("error", () => done(-1), { once: true });
  audio.addEventListener("timeupdate", function heard() {
    if (audio.paused || audio.currentTime <= from) return;
    audio.removeEventListener("timeupdate", heard);
    done(audio.duration);
  });
  %s;
})"""


GRID = "(({ left, right }) => [left, right])(document.getElementById('scroll').getBoundingClientRect())"
# Left and right edge of each line of each row's label.
LABELS = """[...document.querySelectorAll(".prompt th div")].flatMap((label) => {
  const text = document.createRange();
  text.selectNodeContents(label);
  return [...text.getClientRects()].map(({ left, right }) => [left, right]);
})"""


@contextmanager
def shown(tmp_path: Path, *runs: Path) -> Iterator[Tab]:
    """The page of runs, in the browser, which then told its console nothing and asked for nothing else."""
    page = tmp_path / "page.html"
    assert report_script.main([*map(str, runs), "--output", str(page)]) == 0
    with open_page(page, tmp_path / "profile") as tab:
        yield tab
        assert tab.errors == []
        assert all(url.startswith("data:") or url == page.as_uri() for url in tab.requests), tab.requests


def long_run(folder: Path) -> Path:
    run = made_run(folder, sounds=False)
    for step in (0, 20, 40, 60):
        add_sounds(run, step, ["slow rock", HOSTILE[0]], seconds=8.0, rate_hz=16_000)
    return run


def test_each_sound_plays_and_one_at_a_time(tmp_path: Path) -> None:
    run = long_run(tmp_path / "run")
    with shown(tmp_path, run) as tab:
        shutil.rmtree(run)  # what is inside plays wherever the page is
        count = tab.run("document.querySelectorAll('.sound .play').length")
        assert count == 8
        for at in range(count):
            click = f"document.querySelectorAll('.sound .play')[{at}].click()"
            assert tab.run(HEARD % (0, click)) == pytest.approx(8, abs=0.2)
            playing = tab.run(PLAYING)
            assert playing == [tab.run(f"document.querySelectorAll('.play')[{at}].getAttribute('aria-label')")]
        assert tab.run("document.querySelectorAll('audio').length") == 1
        assert tab.run("document.title") == "Run: run"
        assert tab.run("document.querySelectorAll('script').length") == 2


def test_a_click_on_a_waveform_plays_from_there(tmp_path: Path) -> None:
    with shown(tmp_path, long_run(tmp_path / "run")) as tab:
        box = "const wave = document.querySelectorAll('.wave')[2], box = wave.getBoundingClientRect();"
        click = box + "wave.dispatchEvent(new MouseEvent('click', { clientX: box.left + box.width * 0.75 }))"
        tab.run(HEARD % (6, click))
        assert 6 < tab.run("document.querySelector('audio').currentTime") < 8
        assert tab.run("parseFloat(document.querySelectorAll('.wave')[2].style.getPropertyValue('--at'))") >= 75


def test_arrows_move_through_the_grid_and_space_plays_and_pauses(tmp_path: Path) -> None:
    with shown(tmp_path, long_run(tmp_path / "run")) as tab:
        tab.run("document.querySelector('.play').focus()")
        seen = []
        for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp", "ArrowUp", "ArrowLeft"):
            tab.key(key, code=ARROWS[key])
            seen.append(tab.run(FOCUS).removeprefix("Play ").split(": ")[0])
        assert seen == ["step 20", "step 40", "step 40", "step 20", "step 20", "step 20", "base model"]
        tab.key("ArrowRight", code=39)
        tab.key(" ", code=32)
        assert tab.run(HEARD % (0, "0")) > 0 and tab.run(PLAYING) == ["Play step 20: slow rock"]
        tab.key(" ", code=32)
        assert tab.run("document.querySelector('audio').paused") and tab.run(SILENT)
        tab.run("document.activeElement.blur()")
        tab.key(" ", code=32)  # the page's own, where no button has the focus
        assert not tab.run("document.querySelector('audio').paused")


def test_curves_are_drawn_and_tell_their_values(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run")
    with shown(tmp_path, run) as tab:
        lengths = "[...document.querySelectorAll('#charts path')].map((path) => path.getTotalLength())"
        assert tab.run("document.querySelectorAll('#charts [data-chart]').length") == 6
        drawn = tab.run(lengths)
        assert len(drawn) == 12 and min(drawn) > 100
        assert "best" in tab.run("document.querySelector('#charts svg').textContent")
        tip = tab.run(
            "const svg = document.querySelector('#charts svg'), box = svg.getBoundingClientRect();"
            "svg.dispatchEvent(new PointerEvent('pointermove', { clientX: box.right - 10, clientY: box.top + 50 }));"
            "document.querySelector('.tip').textContent"
        )
        assert tip.startswith("step 60") and "validation 3.2" in tip
        before = tab.run("document.querySelector('#charts path').getAttribute('d')")
        tab.run("document.querySelector('#charts .log').click()")
        assert tab.run("document.querySelector('#charts path').getAttribute('d')") != before


@pytest.mark.parametrize("width", [400, 1300])
def test_nothing_but_the_grid_moves_sideways_and_the_base_model_stays_in_view(tmp_path: Path, width: int) -> None:
    run = made_run(tmp_path / "run", sounds=False)
    for step in range(0, 400, 20):
        add_sounds(run, step, ["slow rock", HOSTILE[0] * 5])
    with shown(tmp_path, run) as tab:
        tab._ask("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 500)
        assert tab.run("document.documentElement.scrollWidth") <= width
        tab.run("document.getElementById('scroll').scrollLeft = 500")
        left = "document.querySelector('td.fixed').getBoundingClientRect().left"
        edge = "document.getElementById('scroll').getBoundingClientRect().left"
        assert tab.run("document.getElementById('scroll').scrollLeft") == 500
        assert tab.run(left) - tab.run(edge) <= 2


@pytest.mark.parametrize("columns", [1, 4, 12])
def test_the_whole_prompt_of_each_row_stays_inside_of_the_grid(tmp_path: Path, columns: int) -> None:
    run = made_run(tmp_path / "run", sounds=False)
    prompts = ["drums, " * count for count in (1, 10, 12, 14, 16, 18, 20, 40)] + ["ü" * 300]
    for step in range(columns):
        add_sounds(run, step, prompts)
    with shown(tmp_path, run) as tab:
        for width, moved in itertools.product((360, 400, 800, 1300), (0, 60, 10_000)):
            tab.resize(width, 800)
            tab.run(f"document.getElementById('scroll').scrollLeft = {moved}")
            least, most = tab.run(GRID)
            for left, right in tab.run(LABELS):
                assert least + 4 < left and right < most - 4, (width, moved)


def test_a_linked_sound_plays_beside_the_run_and_says_why_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_sounds, "MOST_OTHERS", 0)
    run = long_run(tmp_path / "my #1 run?")
    page = run / "report.html"
    assert report_script.main([str(run)]) == 0
    click = "document.querySelector('.linked .play').click()"
    with open_page(page, tmp_path / "profile") as tab:
        assert tab.run(HEARD % (0, click)) == pytest.approx(8, abs=0.2)
        assert all(url.startswith(("data:", "file:")) for url in tab.requests), tab.requests
    shutil.copy(page, tmp_path / "moved.html")
    with open_page(tmp_path / "moved.html", tmp_path / "profile") as tab:
        assert tab.run(HEARD % (0, click)) == -1
        assert "cannot open it" in tab.run("document.getElementById('playing').textContent")


def test_several_runs_are_drawn_over_each_other_and_play_side_by_side(tmp_path: Path) -> None:
    runs = [long_run(tmp_path / name) for name in ("one", "two")]
    with shown(tmp_path, *runs) as tab:
        assert tab.run("document.querySelectorAll('[data-chart^=Validation] path').length") == 2
        titles = tab.run("[...document.querySelectorAll('#grid thead bdi')].map((title) => title.textContent)")
        assert titles == ["base model", "one", "one", "two", "two"]
        last = "[...document.querySelectorAll('.play')].pop().click()"
        assert tab.run(HEARD % (0, last)) == pytest.approx(8, abs=0.2)


def test_what_judges_a_run_is_drawn_and_readable_on_a_phone_too(tmp_path: Path) -> None:
    run = add_judgement(made_run(tmp_path / "run"))
    with shown(tmp_path, run) as tab:
        for width in (400, 1200):
            tab.resize(width, 800)
            assert tab.run("document.documentElement.scrollWidth") <= width
            box = "document.querySelector('svg.recall').getBoundingClientRect()"
            assert 250 < tab.run(f"{box}.width") <= width and tab.run(f"{box}.height") > 100
        lengths = "[...document.querySelectorAll('.recall .drawn')].map((path) => path.getTotalLength())"
        assert len(tab.run(lengths)) == 5 and min(tab.run(lengths)) > 100
        name = "(section) => section.getAttribute('aria-labelledby')"
        named = set(tab.run(f"[...document.querySelectorAll('section[aria-labelledby]')].map({name})"))
        assert {"fit", "heart", "score"} <= named
        assert all(tab.run(f"document.getElementById('{one}').tagName") == "H2" for one in named)
