"""Which part of a text is its caption: texts of other programs, ordinary captions with colons in them, and lyrics."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.caption_dialects import Part, caption_part
from trainer.data.caption_files import LIKE_LYRICS, CaptionFault, caption_of

SIDE_STEP = "caption: Slow piano: sad,\n  and wide\ngenre: ambient\nbpm: 90\nlyrics:\n[Verse]\nla la\n\n[Chorus]\nlo lo"
AI_TOOLKIT = "<CAPTION>\nslow piano\n</CAPTION>\n<LYRICS>\n[Verse]\nla\n[Chorus]\nlo\n</LYRICS>\n<BPM>90</BPM>"
SONG = "[Verse 1]\nI walk alone\n\n[Chorus]\nAlone, alone\n"

# Sentences of people's captions, in which a colon or bracket separates nothing.
ORDINARY = [
    "Genre: rock",
    "Genre: rock\nBPM: 120\nKey: C minor",
    "Mood: dark. Instruments: piano, strings",
    "A duet: piano and flute, 3:4 time, recorded at 12:30",
    "style of: Bach\nkey: unknown",
    "Bridge: a slow build with strings",
    "[intro] slow rock [verse] builds up [chorus] loud guitars",
    "[Verse]",
    "Verse: quiet. Chorus: loud",
    "Lyrics about love, sung softly",
    "A song with lyrics: none, vocals: none",
    "<my-style> slow rock", "<caption> slow rock", "<lyrics> slow rock", "<BPM> 90 </BPM> slow rock",
    "slow rock\n- tempo: 90\n- mood: sad",
    "The title: caption: of the song",
    "a [00:30] mark in the middle",
]  # fmt: skip


@pytest.mark.parametrize("text", ORDINARY)
def test_an_ordinary_caption_stays_whole(text: str) -> None:
    assert caption_part(text) == Part(text=text)
    assert caption_of(text) == (" ".join(text.split()), "")


@pytest.mark.parametrize(
    ("text", "caption"),
    [
        (SIDE_STEP, "Slow piano: sad, and wide"),
        (SIDE_STEP.replace("\n", "\r\n"), "Slow piano: sad, and wide"),
        (SIDE_STEP.replace("caption", "Caption "), "Slow piano: sad, and wide"),
        ("lyrics: la la\nla\ncaption: slow", "slow"),
        ("caption: slow", "slow"),
        ("caption:\ngenre: ambient\nlyrics: la la", "ambient"),
        ("genre: ambient\nlyrics: la la", "ambient"),
        (AI_TOOLKIT, "slow piano"),
        (AI_TOOLKIT.lower(), "slow piano"),
        ("<LYRICS>la</LYRICS><CAPTION>slow</CAPTION>", "slow"),
        ("<CAPTION>slow piano<LYRICS>la la", "slow piano"),
        ("slow piano\nwith rain\n\nLyrics:\nla la\nlo lo", "slow piano with rain"),
    ],
)
def test_the_caption_part_of_another_programs_text_is_read_and_the_rest_left_out(text: str, caption: str) -> None:
    found, remark = caption_of(text)
    assert found == caption
    assert (remark == "") == (text == "caption: slow")  # where something was left out, it is said


@pytest.mark.parametrize(
    "text",
    [
        SONG, SONG.lower(), "Verse 1:\nla\n\nChorus:\nlo\n", "[00:12.34] la la\n[00:15.00] lo lo",
        "slow piano\n" + SONG, "lyrics:\nla la", "caption:\nlyrics: la la", "<LYRICS>la la</LYRICS>",
        "<CAPTION></CAPTION><LYRICS>la</LYRICS>", "<CAPTION>" + SONG + "</CAPTION>", "caption: x\n" + SONG,
    ],
)  # fmt: skip
def test_lyrics_alone_are_refused_with_what_to_do(text: str) -> None:
    with pytest.raises(CaptionFault, match=r"is lyrics and no caption.*\.caption\.txt") as caught:
        caption_of(text)
    assert caught.value.fate == "caption unreadable"


@pytest.mark.parametrize(
    ("text", "is_told"),
    [
        ("la la\nlo lo\n\nli li\nlu lu", True), ("la\nlo\nli", False), ("Genre: rock\nMood: dark\nBPM\nKey", False),
        ("- slow\n- dark\n- piano\n- rain", False), ("\n".join(["long " * 13] * 5), False),
    ],
)  # fmt: skip
def test_short_lines_of_words_are_told_as_a_song_s_and_still_used(text: str, is_told: bool) -> None:
    caption, remark = caption_of(text)
    assert caption == " ".join(text.split()) and (LIKE_LYRICS in remark) == is_told
    assert LIKE_LYRICS not in caption_of(text, lines=True)[1]


def test_each_line_of_the_caption_part_alone_is_a_caption() -> None:
    assert caption_of("caption: slow\nloud\nbpm: 90", lines=True)[0] == "slow\nloud"


PIECES = st.sampled_from([
    "caption:", "lyrics:", "genre: x", "bpm: 9", "[Verse]", "[Chorus]", "\n", "\r\n", "<CAPTION>", "</CAPTION>",
    "<LYRICS>", "</LYRICS>", "[00:12.3]", "SUNG", "slow", " ", "\x85", "\u2028", "\0", "\ud800", ":", "[", "<",
])  # fmt: skip


def any_text(text: str) -> None:
    """Every text has a caption or a fault; and nothing behind a line lyrics: or inside <LYRICS> is in the caption."""
    for lines in (False, True):
        try:
            caption, _ = caption_of(text, lines=lines)
        except CaptionFault as fault:
            assert fault.detail
            continue
        assert caption is None or (caption.strip() and caption.encode() and len(caption) <= 2_000 * 1_000)
        lyrics_last = text.startswith("caption:") and "\nlyrics:" in text and text.count("caption:") == 1
        if lyrics_last and "SUNG" not in text.split("\nlyrics:")[0]:
            assert "SUNG" not in (caption or "") or "genre: x" in text


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.lists(PIECES | st.text(max_size=5), max_size=12).map("".join))
def test_any_text_is_a_caption_or_has_a_fault(text: str) -> None:
    any_text(text)


@pytest.mark.full
@settings(max_examples=20_000, deadline=None)
@given(st.lists(PIECES | st.text(max_size=5), max_size=30).map("".join))
def test_very_many_texts_are_captions_or_have_a_fault(text: str) -> None:
    any_text(text)
