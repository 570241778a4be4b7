"""Captions and what is none, told apart by content."""

from __future__ import annotations

import json
import re

import pytest

from trainer.data.text_content import TEXT_KINDS, WHY_NO_CAPTION, kind_of, why_no_caption, why_no_sound

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 132\n"
PAGE = "<html>\n<head><title>404</title></head>"

TEXTS = {
    LFS: "git-lfs pointer",
    LFS.replace("\n", "\r\n"): "git-lfs pointer",
    "/annex/objects/SHA256E-s31--4d7a.txt\n": "git-annex pointer",
    "../../.git/annex/objects/f8/8J/SHA256E-s1--ab.txt": "git-annex pointer",
    "{\\rtf1\\ansi\\ansicpg1252 slow rock}": "rich text",
    "%PDF-1.7\n1 0 obj": "PDF",
    json.dumps({"caption": "slow rock"}): "JSON",
    json.dumps([{"caption": "slow rock"}, {}], indent=2): "JSON",
    json.dumps(["slow", "rock"]): "JSON",
    '{"a": 1}\n{"b": 2}\n': "JSON",
    '{"caption": "cut o': "JSON",
    "{'caption': 'slow rock'}": "JSON",
    "<!DOCTYPE html>\n<p>slow": "web page",
    "\n <!-- saved --> <!doctype HTML PUBLIC>": "web page",
    PAGE: "web page",
    "slow <BODY class='x'> rock </BODY>": "web page",
    '<?xml version="1.0"?><html><body/></html>': "web page",
    '<?xml version="1.0"?><caption>slow</caption>': "XML",
}
CAPTIONS = [
    "slow rock", "", "<my-style> slow rock", "<body> slow rock", "<html> slow rock, <html> and more", "a < b > c",
    '"slow rock"', "[intro] slow rock", "{slow} rock", "<CAPTION>slow rock</CAPTION><LYRICS>la</LYRICS>", "[", "{",
    "caption: slow rock\nbpm: 90", "version 2 of https://git-lfs.github.com/spec/v1", "the <b>loud</b> part", "120",
    "made with annex/objects and more", "head > body", "<i>PDF-like</i> %PDF-", "<header>", "null",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: re.sub(r"\W+", "-", text)[:30])
def test_each_kind_is_told_by_its_content(text: str) -> None:
    assert kind_of(text) == TEXTS[text]


@pytest.mark.parametrize("text", CAPTIONS)
def test_brackets_quotes_and_tags_as_such_leave_a_caption_a_caption(text: str) -> None:
    assert kind_of(text) == "caption" and why_no_caption(text.encode(), text) is None


def test_each_kind_but_a_caption_has_advice_of_its_own() -> None:
    assert set(WHY_NO_CAPTION) == set(TEXT_KINDS) - {"caption"}
    assert len(set(WHY_NO_CAPTION.values())) == len(WHY_NO_CAPTION)


def test_documents_are_told_by_their_first_bytes() -> None:
    assert "office program" in str(why_no_caption(b"PK\x03\x04\x14\0", "PK\x03\x04\x14\0"))
    assert "PDF" in str(why_no_caption(b"%PDF-1.7\n\x81", None))
    assert why_no_caption(b"\x81\x82", None) is None


def test_text_in_a_sound_file_is_named_and_sound_is_not_taken_for_text() -> None:
    assert "git lfs pull" in str(why_no_sound(LFS.encode()))
    assert "download it again" in str(why_no_sound(PAGE.encode()))
    assert why_no_sound(b"RIFF\xff\xff\xff\xffWAVEfmt ") is None and why_no_sound(bytes(4096)) is None


def test_a_megabyte_of_open_tags_is_judged_in_one_pass() -> None:
    assert kind_of("<body" * 200_000) == kind_of("<!--" * 200_000) == kind_of("{" * 1_000_000) == "caption"
