"""dataset.html escapes what it is given, says what dataset.json says, asks for nothing, and is written when needed."""

from __future__ import annotations

import json
import math
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.report.pages import folder_of, written
from trainer.data.fates import Fate
from trainer.data.inventory import ScannedFolder
from trainer.data.treatment import Treatment
from trainer.report import report
from trainer.report.mending import mend_first
from trainer.report.rows import Row
from trainer.report.settings import ReportSettings

PROGRAM = (Path(report.__file__).parent / "page.js").read_text(encoding="utf-8")
OUR_TAGS = {
    *("html", "head", "meta", "title", "style", "body", "header", "main", "section", "footer", "nav", "h1", "h2", "h3"),
    *("p", "dl", "div", "dt", "dd", "data", "small", "span", "bdi", "strong", "ol", "ul", "li", "details", "summary"),
    *("table", "thead", "tbody", "tr", "th", "td", "form", "label", "input", "select", "option", "optgroup"),
    *("output", "noscript", "button", "audio", "script"),
    *("svg", "defs", "g", "path", "text", "use", "rect", "clippath"),  # of the plots
}
HOSTILE = [
    "</script><script>alert(1)</script>", "<!--<script>", "\"'><img src=x onerror=alert(1)>", "a\u2028b\u2029c", "a\0b",
    "\u202egnp.exe", "{{ 7 * 7 }}{% raw %}", "javascript:alert(1)//", "%3Cscript%3E", "\\u003cscript>", "]]>", "שלום",
    "\x1b[31mred\x07", "&lt;b&gt;",
]  # fmt: skip


def names_as_files(texts: list[str]) -> dict[str, str | None]:
    """Each text as a caption, and as the name of a file as far as a file can have it."""
    return {text.replace("/", "|").replace("\0", "0") + f" {n}.wav": text for n, text in enumerate(texts)}


def check_harmless(texts: list[str]) -> None:
    """The page of files with these names and captions has our elements and scripts alone, and shows their text."""
    files = names_as_files(texts)
    with tempfile.TemporaryDirectory() as folder:
        page = written([folder_of(files)], Path(folder))
    assert set(page.tags) <= OUR_TAGS and page.tags.count("style") == 1 + page.tags.count("svg")
    assert page.scripts[1:] == [PROGRAM] and not page.handlers and not page.links
    assert "\u2028" not in page.scripts[0] and "<" not in page.scripts[0]
    assert [row["caption"] for row in page.rows] == list(files.values())
    for row, name in zip(page.rows, files, strict=True):
        assert unquote_to_bytes(row["link"]).decode("utf-8", "surrogateescape").endswith("/music/" + name)
        assert re.fullmatch(r"[\w.~%/-]+", row["link"], re.ASCII), row["link"]
        assert row["path"].isprintable()


def test_hostile_names_and_captions_are_shown_as_text() -> None:
    check_harmless(HOSTILE)


texts = st.lists(st.text(max_size=60), min_size=1, max_size=40)


@settings(max_examples=5, derandomize=True, deadline=None)
@given(texts)
def test_any_name_and_caption_is_shown_as_text(some: list[str]) -> None:
    check_harmless([text.encode("utf-8", "replace").decode() for text in some])


@pytest.mark.full
@settings(max_examples=400, derandomize=False, deadline=None)
@given(texts)
def test_any_of_many_names_and_captions_is_shown_as_text(some: list[str]) -> None:
    check_harmless([text.encode("utf-8", "replace").decode() for text in some])


def value_at(figures: Any, path: str) -> Any:
    """The value at keys that are joined by slashes; the last one is a name, which may hold slashes itself."""
    key, _, rest = path.partition("/")
    return figures[path] if path in figures else value_at(figures[key], rest)


def test_every_figure_of_the_page_is_that_of_the_json(tmp_path: Path) -> None:
    folder = folder_of({f"{n}.wav": None if n % 5 == 0 else f"a song {n % 7}" for n in range(30)})
    folder = replace(folder, fates=(*folder.fates, Fate(path="x.wav", fate="no caption", detail="write x.txt")))
    page = written([folder], tmp_path, ReportSettings(validation_share=0.3))
    figures = json.loads((tmp_path / report.FIGURES).read_bytes())["figures"]
    assert len(page.figures) >= 15
    for path, shown in page.figures.items():
        assert float(shown) == value_at(figures, path), path
    assert figures["clips"] == 30 and figures["files"] == 31 and figures["captions"]["without"] == 6
    assert figures["hours"] == pytest.approx(sum(2.0 + n for n in range(30)) / 3600, abs=1e-6)
    assert figures["training"]["clips"] + figures["validation"]["clips"] == 30 and figures["validation"]["clips"] > 0
    assert figures["fates"] == {"used": 30, "no caption": 1}
    assert figures["captions"]["with_unknown_words"] is None and "not looked at" in page.text


def test_a_page_asks_no_network_for_anything(tmp_path: Path) -> None:
    page = written([folder_of({f"{n}.wav": "a song" for n in range(9)})], tmp_path)
    assert page.text.count("<svg") >= 1
    assert not re.search(r"https?:", page.text) and not page.links
    assert "default-src 'none'" in page.text


def test_links_lead_from_the_page_to_the_files_wherever_both_stand(tmp_path: Path) -> None:
    (tmp_path / "my music/a b").mkdir(parents=True)
    sound = tmp_path / "my music/a b/50% #1?.wav"
    sound.write_bytes(b"")
    folder = folder_of({"a b/50% #1?.wav": None}, str(tmp_path / "my music"))
    link = written([folder], tmp_path / "reports/one").rows[0]["link"]
    assert link == "../../my%20music/a%20b/50%25%20%231%3F.wav"
    assert (tmp_path / "reports/one" / unquote_to_bytes(link).decode()).resolve() == sound


def test_an_unchanged_dataset_is_not_described_again(tmp_path: Path) -> None:
    folder, options = folder_of({"a.wav": "one", "b.wav": "two"}), ReportSettings()
    assert report.write([folder], options, tmp_path, load_tokenizer=None) is not None
    before = (tmp_path / report.PAGE).stat().st_mtime_ns
    assert report.write([folder], options, tmp_path, load_tokenizer=None) is None
    assert (tmp_path / report.PAGE).stat().st_mtime_ns == before
    changed = folder_of({"a.wav": "one", "b.wav": "three"})
    assert report.write([changed], options, tmp_path, load_tokenizer=None) is not None
    (tmp_path / report.PAGE).unlink()
    assert report.write([changed], options, tmp_path, load_tokenizer=None) is not None


def test_equal_pages_are_made_of_equal_folders(tmp_path: Path) -> None:
    folder = folder_of({f"{n}.wav": f"song {n}" for n in range(5)})
    assert written([folder], tmp_path / "a").text == written([folder], tmp_path / "b").text


def test_equal_sound_in_training_and_validation_is_named_first(tmp_path: Path) -> None:
    train = folder_of({"a.wav": "one", "b.wav": "two"}, "/music")
    validate = folder_of({"c.wav": "three"}, "/held out")  # the sound of a.wav
    written([train, validate], tmp_path)
    values = json.loads((tmp_path / report.FIGURES).read_bytes())
    group = [{"path": "a.wav", "use": "training"}, {"path": "/held out/c.wav", "use": "validation"}]
    assert values["figures"]["leakage"] == {"groups": 1, "clips": 2, "first": [group]}
    assert values["mend_first"][0]["key"] == "leak"


def test_what_loses_music_comes_before_what_harms_and_that_before_what_may_be_meant_so() -> None:
    used = Row(path="a.wav", fate="used", detail="", use="training", caption="rock", words=1)
    rows = [
        used, replace(used, sample_rate_hz=8_000), replace(used, clipped_share=0.1), replace(used, clipped_share=0.2),
        Row(path="b.wav", fate="truncated", detail="copy it again"),
    ]  # fmt: skip
    found = mend_first(rows, no_label=False)
    assert [one.key for one in found] == ["fate:truncated", "clipped", "rate", "brief"]
    assert [one.clips for one in found] == [1, 2, 1, 4]
    assert mend_first([replace(used, words=5)], no_label=False) == []


def test_a_folder_without_a_clip_has_a_page(tmp_path: Path) -> None:
    folder = replace(folder_of({}), fates=(Fate(path="a.wav", fate="empty", detail="export it again"),))
    written([folder], tmp_path)
    first = json.loads((tmp_path / report.FIGURES).read_bytes())["mend_first"][0]
    assert first["title"] == "No clip can be trained on"


def test_loudness_is_that_of_the_files_and_beside_it_what_the_flag_makes_of_it(tmp_path: Path) -> None:
    folder = folder_of({"quiet.wav": "one", "peaking.wav": "two", "brief.wav": "three"})
    levels = [
        replace(folder.inspected[0].facts.levels, peak=0.1, loudness_lufs=-40.0),
        replace(folder.inspected[1].facts.levels, peak=0.5, loudness_lufs=-20.0),  # 6 dB below full scale
        replace(folder.inspected[2].facts.levels, loudness_lufs=None),
    ]
    files = zip(folder.inspected, levels, strict=True)
    inspected = tuple(replace(one, facts=replace(one.facts, levels=found)) for one, found in files)
    folder = replace(folder, inspected=inspected)
    page = written([folder], tmp_path)
    assert {row["treated_lufs"] for row in page.rows} == {None} and "--loudness" not in page.text.split("<script>")[0]
    assert "quiet" in page.rows[0]["marks"]
    page = written([folder], tmp_path, ReportSettings(treatment=Treatment(loudness_lufs=-30.0)))
    assert [row["loudness_lufs"] for row in page.rows] == [-40.0, -20.0, None]
    assert page.rows[0]["treated_lufs"] == pytest.approx(-30.0, abs=1e-4) and page.rows[2]["treated_lufs"] is None
    assert "quiet" not in page.rows[0]["marks"] and "median loudness before --loudness" in page.text
    assert float(page.figures["treated_lufs/median"]) == pytest.approx(-30.0, abs=1e-3)
    page = written([folder], tmp_path, ReportSettings(treatment=Treatment(loudness_lufs=-6.0)))
    assert page.rows[1]["treated_lufs"] == pytest.approx(-20 + 20 * math.log10(2), abs=1e-4)  # no further than the peak


def test_lengths_are_those_that_are_left_and_captions_have_what_is_merged_into_them(tmp_path: Path) -> None:
    folder = folder_of({"a.wav": "slow rock", "b.wav": None})
    first, second = folder.inspected
    levels = replace(first.facts.levels, lead_seconds=0.5, tail_seconds=0.25)
    first = replace(first, facts=replace(first.facts, levels=levels))
    plain = replace(folder, inspected=(first, second))
    merged = replace(folder, inspected=(first, replace(second, caption_fields='[["bpm", "90.0"], ["genre", "dub"]]')))

    def rows(of: ScannedFolder, settings: ReportSettings) -> list[tuple[float, str | None]]:
        found = report.write([of], settings, tmp_path, load_tokenizer=None)
        assert found is not None  # what changed is on the page
        return [(row["seconds"], row["caption"]) for row in found["files"]]

    assert rows(plain, ReportSettings()) == [(2.0, "slow rock"), (3.0, None)]
    trimmed = ReportSettings(treatment=Treatment(trim_silence=True))
    assert rows(plain, trimmed) == [(1.25, "slow rock"), (3.0, None)]
    assert rows(merged, trimmed) == [(1.25, "slow rock"), (3.0, "bpm: 90.0. genre: dub")]
