"""The listening page in a real browser, from file://: it plays, judges, keeps, saves, loads and reveals."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import report

from tests.report.browser import CHROMIUM, Tab, open_page
from tests.report.runs_with_samples import PROMPTS, sample, sound, write_run, write_step
from trainer.errors import EXIT_DONE
from trainer.report.blind_score import fixed, read_saved, score, table

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here to show the page in"),
]
HOSTILE = "</script><script>document.title=666</script><img src=x onerror='document.title=666'>"
COUNT = 'document.getElementById("count").textContent'
SAID = 'document.getElementById("said").textContent'
CHOICE = '[...document.querySelectorAll("#choice input")].find((one) => one.checked)?.value ?? ""'
MARKS = '[...document.querySelectorAll(".marks input:checked")].map((one) => one.name + one.value).join(" ")'
RESULT = '[...document.querySelectorAll("#{} tbody tr")].map((row) => [...row.children].map((one) => one.textContent))'


def page_of(tmp_path: Path, *flags: str, prompts: tuple[str, ...] = PROMPTS) -> Path:
    run = write_run(tmp_path / "models", (0, 60), prompts)
    goal = tmp_path / "blind.html"
    assert report.main([str(run), "--blind", "--output", str(goal), *flags]) == EXIT_DONE
    return goal


@pytest.fixture
def tab(tmp_path: Path) -> Iterator[Tab]:
    with open_page(page_of(tmp_path, "--seed", "3"), tmp_path / "profile") as opened:
        yield opened
        assert opened.errors == []
        assert all(url.startswith(("file:", "data:", "blob:")) for url in opened.requests), opened.requests


def click(tab: Tab, element: str) -> None:
    tab.run(f"document.querySelector({json.dumps(element)}).click()")


def saved_file(tab: Tab, folder: Path) -> Path:
    """What the button saves."""
    folder.mkdir()
    tab.downloads_to(folder)
    click(tab, "#save")
    while not (found := list(folder.glob("*.json"))):
        tab.run("new Promise((done) => setTimeout(done, 50))")
    return found[0]


def wait_until_said(tab: Tab, text: str) -> None:
    tab.run(f"new Promise((done) => {{ const ask = () => {SAID}.includes({json.dumps(text)}) ? done()"
            " : setTimeout(ask, 20); ask(); })")  # fmt: skip


def played(tab: Tab, key: str) -> float:
    """Seconds of the sound that a key starts."""
    tab.run(
        "window.started = new Promise((done) => { const audio = document.querySelector('audio');"
        "audio.addEventListener('playing', () => done(audio.duration), { once: true });"
        "audio.addEventListener('error', () => done(-1), { once: true }); }); 0"
    )
    tab.key(key)
    return tab.run("window.started")


def test_every_sound_plays_one_at_a_time_by_its_key(tab: Tab) -> None:
    for _ in PROMPTS:
        for key, letter in (("a", "A"), ("b", "B")):
            assert played(tab, key) == pytest.approx(1.5, abs=0.05)
            playing = tab.run('[...document.querySelectorAll(".sound.now")].map((one) => one.ariaLabel)')
            assert playing == [f"Sound {letter}"]
        tab.key("b")
        assert tab.run("document.querySelector('audio').paused")
        tab.key("n")
    assert tab.run('document.querySelectorAll("audio").length') == 1


def test_what_is_judged_stays_over_a_reload_and_is_saved_loaded_and_revealed(tab: Tab, tmp_path: Path) -> None:
    assert tab.run(COUNT) == f"0 of {len(PROMPTS)} judged"
    played(tab, "a")
    tab.key("2")
    played(tab, "b")
    tab.key("5")
    assert tab.run(MARKS) == "markA2 markB5" and tab.run(COUNT).startswith("0 of")  # without a choice
    tab.key("B", shift=True)
    assert tab.run(CHOICE) == "1"
    tab.run('document.getElementById("note").focus()')
    for sign in "an a, 1":  # in a note, keys are text
        tab.key(sign)
    tab.run("document.activeElement.blur()")
    for key, shift in (("n", False), ("A", True), ("n", False), ("0", False), ("n", False)):
        tab.key(key, shift=shift)
    assert tab.run(COUNT) == "3 of 4 judged"
    tab.reload()
    assert tab.run(COUNT) == "3 of 4 judged"
    assert (tab.run(CHOICE), tab.run(MARKS)) == ("1", "markA2 markB5")
    assert tab.run('document.getElementById("note").value') == "an a, 1"

    file = saved_file(tab, tmp_path / "first")
    values: dict[str, Any] = json.loads(file.read_bytes())
    assert [side["name"] for side in values["sides"]] == ["models, step 0 (before training)", "models, step 60"]
    judgements = values["judgements"]
    shown_as_b = judgements[0]["sounds"][1]
    assert judgements[0]["choice"] == shown_as_b["side"] and (shown_as_b["shown"], shown_as_b["mark"]) == ("B", 5)
    assert judgements[1]["choice"] == judgements[1]["sounds"][0]["side"]
    assert [one["choice"] for one in judgements[2:]] == ["no difference", None]
    assert shown_as_b["file"] == "01_sound.flac" and shown_as_b["step"] == int("60" in shown_as_b["side"]) * 60
    assert [one["prompt"] for one in judgements] == list(PROMPTS)

    click(tab, "#restart")
    click(tab, "#restart")
    assert tab.run(COUNT) == "0 of 4 judged"
    tab.choose_file("#load", file)
    wait_until_said(tab, "Loaded")
    assert (tab.run(COUNT), tab.run(CHOICE), tab.run(MARKS)) == ("3 of 4 judged", "1", "markA2 markB5")

    click(tab, "#reveal")
    assert "Press again" in tab.run(SAID) and tab.run('document.getElementById("results").hidden')
    click(tab, "#reveal")
    assert not tab.run('document.getElementById("results").hidden')
    outcome = score([read_saved(file)])
    for row, side in zip(tab.run(RESULT.format("marks")), outcome.sides, strict=True):
        assert row[:3] == [side.side, str(side.chosen), str(len(side.marks))]
    [pair], [row] = outcome.pairs, tab.run(RESULT.format("pairs"))
    assert row[1:] == [str(pair.first_better), str(pair.second_better), str(pair.ties), fixed(pair.p, 3)]
    assert tab.run('document.querySelector(".which").textContent').startswith("A is models, step")
    marks, judged = tab.run(MARKS), tab.run("localStorage.getItem(localStorage.key(0))")
    for key, shift in (("A", True), ("1", False), ("0", False)):  # after that, nothing changes any more
        tab.key(key, shift=shift)
    assert (tab.run(CHOICE), tab.run(MARKS)) == ("1", marks)
    assert tab.run('[...document.querySelectorAll("fieldset input")].every((input) => input.disabled)')
    assert tab.run('document.getElementById("note").readOnly && document.getElementById("listener").readOnly')
    assert tab.run("localStorage.getItem(localStorage.key(0))") == judged


def test_a_file_of_another_page_or_of_no_page_is_refused(tab: Tab, tmp_path: Path) -> None:
    for name, content, said in (
        ("other.json", {"format": "musicgen-trainer listening", "version": 1, "page": "x"}, "another listening page"),
        ("none.json", {"page": "x"}, "no file that this page has saved"),
    ):
        (tmp_path / name).write_text(json.dumps(content))
        tab.choose_file("#load", tmp_path / name)
        wait_until_said(tab, said)
    assert tab.run(COUNT) == "0 of 4 judged"


def test_the_page_computes_what_the_script_computes(tmp_path: Path) -> None:
    names = ("one", "two", "three")
    for number, name in enumerate(names):
        samples = [sample("x", seed=seed) for seed in range(7)]
        write_step(tmp_path / name, 60, [sound(9 * number + n, seconds=0.5) for n in range(7)], samples)
    goal = tmp_path / "blind.html"
    runs = [str(tmp_path / name) for name in names]
    assert report.main([*runs, "--blind", "--seed", "5", "--output", str(goal)]) == EXIT_DONE
    with open_page(goal, tmp_path / "profile") as tab:
        judged = (("A", "351"), ("A", "441"), ("C", "254"), ("0", "333"), ("B", ""), ("", "215"), ("A", "1"))
        for choice, marks in judged:
            for place, mark in enumerate(marks):
                tab.key("abc"[place])
                tab.key(mark)
            tab.key(choice or "n", shift=choice in ("A", "B", "C"))
            if choice:
                tab.key("n")
        outcome = score([read_saved(saved_file(tab, tmp_path / "saved"))])
        click(tab, "#reveal")
        click(tab, "#reveal")
        rows = tab.run(RESULT.format("pairs"))
        assert [row[0] for row in rows] == [f"{one.first} against {one.second}" for one in outcome.pairs]
        for row, pair in zip(rows, outcome.pairs, strict=True):
            p = "none" if pair.p is None else fixed(pair.p, 3)
            assert row[1:] == [str(pair.first_better), str(pair.second_better), str(pair.ties), p]
        assert sum(len(side.marks) for side in outcome.sides) == 16
        for row in tab.run(RESULT.format("marks")):
            assert " ".join(row).replace("±", "+-").split() in [line.split() for line in table(outcome).splitlines()]
        assert tab.errors == []


def test_with_rating_a_prompt_is_judged_by_its_marks(tmp_path: Path) -> None:
    with open_page(page_of(tmp_path, "--rating"), tmp_path / "profile") as tab:
        assert tab.run('document.querySelectorAll("#choice").length') == 0
        for place, mark in (("a", "4"), ("b", "1")):
            tab.key(place)
            tab.key(mark)
        tab.key("A", shift=True)
        assert tab.run(COUNT) == "1 of 4 judged"
        click(tab, "#reveal")
        click(tab, "#reveal")
        assert sorted(tab.run(RESULT.format("pairs"))[0][1:4]) == ["0", "0", "1"]
        assert tab.errors == []


def test_nothing_hostile_runs(tmp_path: Path) -> None:
    page = page_of(tmp_path, prompts=(HOSTILE, "x"))
    with open_page(page, tmp_path / "profile") as tab:
        assert tab.run('document.getElementById("text").textContent') == HOSTILE
        click(tab, "#reveal")
        click(tab, "#reveal")
        assert tab.run("document.title") == "Blind listening"
        assert tab.run("document.images.length") == 0 and tab.errors == []


def test_where_the_browser_keeps_nothing_the_page_says_so_and_judges_all_the_same(tmp_path: Path) -> None:
    with open_page(page_of(tmp_path), tmp_path / "profile") as tab:
        tab.run('Storage.prototype.setItem = () => { throw new DOMException("no", "SecurityError"); }')
        tab.key("A", shift=True)
        assert tab.run(COUNT) == "1 of 4 judged"
        assert "keeps nothing" in tab.run('document.getElementById("warning").textContent')


@pytest.mark.parametrize("width", [360, 400, 1300])
def test_nothing_is_wider_than_the_window(tmp_path: Path, width: int) -> None:
    prompts = ("a very long prompt " * 30, "unbroken" * 60)
    with open_page(page_of(tmp_path, prompts=prompts), tmp_path / "profile") as tab:
        tab.resize(width, 900)
        for _ in prompts:
            click(tab, "#reveal")
            assert tab.run("document.documentElement.scrollWidth") <= width
            tab.key("n")
