"""Templates of captions, and names as words."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.caption_template import EXAMPLE, NAMES, check, fill, name_fields
from trainer.errors import ConfigError

FIELDS = {"genre": "techno", "title": "A, (b) {key}", "key": "A minor", "comment": " \n "}


@pytest.mark.parametrize(
    ("template", "caption"),
    [
        ("{genre}, {bpm} bpm, in {key}", "techno, in A minor"),
        ("{title} by {artist}", "A, (b) {key}"),
        ("({bpm}) {genre}", "techno"),
        ("{genre} ({bpm} bpm, {mood})", "techno"),
        ("{genre} ({key}, {mood})", "techno (A minor)"),
        ("a {mood} {genre} track in {key} at {bpm} bpm", "techno track in A minor"),
        ("{artist} - {genre} - {album}", "techno"),
        ("{artist} - {album}, {genre}.", "techno."),
        ("{genre}. {mood}. {key}.", "techno. A minor."),
        ("mood: {mood}; genre: {genre}; live", "genre: techno; live"),
        ("[{mood}, ({bpm})] {genre} / {folder}", "techno"),
        ("{comment}, {genre}", "techno"),
        ("live, {bpm}, {artist}", ""),
        ("{bpm}", ""),
    ],
)
def test_missing_fields_leave_nothing_stray(template: str, caption: str) -> None:
    check(template)
    assert fill(template, FIELDS) == caption


@pytest.mark.parametrize(
    ("template", "parts"),
    [
        ("{gendre}", ["{gendre}", "genre, bpm", EXAMPLE]),
        ("{genre!r}", ["without format or index"]),
        ("{genre:>9999999999}", ["without format or index"]),
        ("{genre.__class__}", ["without format or index"]),
        ("{genre[0]}", ["without format or index"]),
        ("{}", ["{}", "the names are"]),
        ("{{genre}}", ["a brace without its partner"]),
        ("{genre", ["a brace without its partner"]),
        ("my music", ["has no {name} in it", "--default_caption"]),
        ("", ["has no {name} in it"]),
        ("{genre}\x00", ["control characters"]),
        ("{genre}\udcff", ["no text"]),
    ],
)
def test_a_template_with_anything_but_known_names_is_refused(template: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        check(template)
    assert all(part in str(refused.value) for part in parts), str(refused.value)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("Dub/03_slow-river.wav", {"name": "slow river", "folder": "Dub", "path": "Dub"}),
        ("My Band/2 Step/A1. Song.wav", {"name": "A1 Song", "folder": "2 Step", "path": "My Band, 2 Step"}),
        ("01 - Slow_River (final) v1.2.flac", {"name": "Slow River (final) v1.2"}),
        ("lo-fi_beat_90bpm.ogg", {"name": "lo-fi beat 90bpm"}),
        ("808_kick.wav", {"name": "808 kick"}),
        ("120bpm_loop.wav", {"name": "120bpm loop"}),
        ("01.Intro.wav", {"name": "Intro"}),
        ("Track 07.mp3", {}),
        ("a/12.wav", {"folder": "a", "path": "a"}),
        ("deadbeef12345678deadbeef.mp3", {}),
        ("\udcff\udcfeabc_x.wav", {"name": "abc x"}),
        ("夜/春の海.wav", {"name": "春の海", "folder": "夜", "path": "夜"}),
    ],
)
def test_names_become_words_without_track_numbers(name: str, fields: dict[str, str]) -> None:
    assert name_fields(name) == fields


PIECES = st.lists(st.sampled_from([*(f"{{{name}}}" for name in NAMES[:4]), *",;.|()[]-/", " ", " - ", "by", "bpm"]))
VALUES = st.dictionaries(st.sampled_from(NAMES[:4]), st.text(max_size=12))


def one_template(pieces: list[str], hostile: str, values: dict[str, str]) -> None:
    """A template of known names gives one line, with every value that is there, and without it nothing stray."""
    for template in ("".join(pieces), hostile, "".join(pieces) + hostile):
        try:
            check(template)
        except ConfigError:
            continue
        caption = fill(template, values)
        assert caption == " ".join(caption.split()) and "\x00" not in caption
        letters = fill(template, {name: "x" for name, value in values.items() if value.strip()})
        assert not re.search(r"\(\s*\)|\[\s*\]|,\s*,|^\s*,|,\s*$|\(\s*,|,\s*\)", letters), (template, letters)
        assert fill(template, {}) == ""


@settings(max_examples=300, derandomize=True, deadline=None)
@given(PIECES, st.text(max_size=30), VALUES)
def test_no_template_gives_a_traceback_or_a_stray_comma(
    pieces: list[str], hostile: str, values: dict[str, str]
) -> None:
    one_template(pieces, hostile, values)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.text(alphabet=st.characters(), max_size=40))
def test_any_name_gives_single_lines(name: str) -> None:
    for value in name_fields(name).values():
        assert value and value == " ".join(value.split())
        assert value.replace("\u200c", "").replace("\u200d", "").isprintable()


@pytest.mark.full
@settings(max_examples=20_000, derandomize=False, deadline=None)
@given(PIECES, st.text(max_size=60), VALUES)
def test_no_template_gives_a_traceback_for_long(pieces: list[str], hostile: str, values: dict[str, str]) -> None:
    one_template(pieces, hostile, values)
