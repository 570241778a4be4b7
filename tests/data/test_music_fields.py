"""What a .json file or a row says beside the caption, merged into it as audiocraft does."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.interop.audiocraft_modules import require_audiocraft
from trainer.data.captions import texts_of
from trainer.data.music_fields import MergeRates, as_text, drawn, fields_of, merged, merged_variant, of_text

VALUES: dict[str, Any] = {
    "description": "A slow song.", "key": "C Minor", "bpm": "90", "genre": " Hip Hop ", "moods": ["Sad", "calm"],
    "keywords": "bright, wide", "instrument": "Mix", "title": "x", "artist": "y", "name": "z",
}  # fmt: skip
RATES = MergeRates(merge=0.5, drop_caption=0.5, drop_field=0.5)


class Scripted:
    """In place of audiocraft's module `random`: gives back what was drawn for one of our variants."""

    def __init__(self, draws: list[float], order: list[int]):
        self.draws, self.order = draws, order

    def uniform(self, least: float, most: float) -> float:
        return self.draws.pop(0)

    def shuffle(self, pairs: list[str]) -> None:
        pairs[:] = [pairs[place] for place in self.order]


@pytest.mark.parametrize("description", ["A slow song", "A slow song.", "Slow...", None])
def test_variants_are_what_audiocraft_joins_of_the_same_fields_and_decisions(
    description: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_audiocraft()
    from audiocraft.data import music_dataset

    of_music = [one.name for one in music_dataset.fields(music_dataset.MusicInfo)]
    meta = {name: None for name in ("meta", "seek_time", "n_frames", "total_frames", "sample_rate", "channels")}
    info = music_dataset.MusicInfo.from_dict({**VALUES, "description": description, **meta})
    ours = fields_of(VALUES)
    assert [name for name, _ in ours] == [name for name in of_music if name in dict(ours)] and len(ours) == 6
    kinds = set()
    for variant in range(64):
        decisions = drawn(description, ours, RATES, 7, variant)
        draws, order = [1.0], []
        if decisions is not None:
            kept = dict(zip((name for name, _ in ours), decisions.kept, strict=True))
            # is_valid_field draws for every field of MusicInfo, of a caption's fields or not; kept where < drop_other_p
            draws = [0.0, *(0.0 if kept.get(name, True) else 1.0 for name in of_music)]
            draws.append(0.0 if decisions.drop_caption else 1.0)
            order = list(decisions.order)
        scripted = Scripted(draws, order)
        monkeypatch.setattr(music_dataset, "random", scripted)
        theirs = music_dataset.augment_music_info_description(info, 0.5, 0.5, 0.5).description
        text = merged_variant(description, ours, RATES, 7, variant)
        assert text == theirs and not scripted.draws
        kinds.add((decisions is None, decisions is not None and decisions.drop_caption, text is None))
    assert len(kinds) >= 3


def test_fields_are_read_as_audiocraft_reads_them() -> None:
    assert dict(fields_of(VALUES)) == {
        "key": "c minor", "bpm": "90.0", "genre": "hip hop", "moods": "sad, calm", "keywords": "bright, wide",
        "instrument": "mix",
    }  # fmt: skip
    empty = {"key": "", "bpm": "", "genre": "None", "moods": [], "keywords": ",", "instrument": None}
    assert fields_of(empty) == () == fields_of({"key": "C,D", "bpm": "fast", "genre": 3, "moods": {}, "KEYS": "c"})
    assert fields_of({"BPM": 90, "bpm2": 1, "instrument": ["Piano", 3, "Bass"]}) == (
        ("bpm", "90.0"), ("instrument", "piano, bass"),
    )  # fmt: skip
    hostile: list[Any] = [float("inf"), float("nan"), True, 10**400, -1, "\ud800", "a\0b", "x" * 600, [[]], {"a": 1}]
    assert not any(fields_of({"bpm": value, "genre": value}) for value in hostile)


def test_the_rates_are_kept_on_average_and_each_variant_is_the_same_again() -> None:
    fields = fields_of(VALUES)
    rates = MergeRates(merge=0.25, drop_caption=0.5, drop_field=0.25)
    found = [drawn("song", fields, rates, 0, variant) for variant in range(4000)]
    assert found == [drawn("song", fields, rates, 0, variant) for variant in range(4000)]
    assert found != [drawn("song", fields, rates, 1, variant) for variant in range(4000)]
    merging = [one for one in found if one is not None]
    # Within 5 standard deviations of a binomial draw: sqrt(p (1 - p) / n).
    assert abs(len(merging) / 4000 - 0.25) < 5 * (0.25 * 0.75 / 4000) ** 0.5
    assert abs(sum(one.drop_caption for one in merging) / len(merging) - 0.5) < 5 * (0.25 / len(merging)) ** 0.5
    kept = [keep for one in merging for keep in one.kept]
    assert abs(sum(kept) / len(kept) - 0.75) < 5 * (0.25 * 0.75 / len(kept)) ** 0.5
    assert all(sorted(one.order) == list(range(sum(one.kept))) for one in merging)


def test_texts_of_a_clip_are_as_before_where_nothing_is_merged() -> None:
    fields = fields_of(VALUES)
    plain: dict[str, Any] = {"word_dropout": 0.5, "variants": 3, "seed": 1}
    assert texts_of("a b c", **plain, fields=fields, merge=MergeRates()) == texts_of("a b c", **plain)
    assert texts_of("a b c", **plain, fields=(), merge=RATES) == texts_of("a b c", **plain)
    assert texts_of(None, **plain, fields=(), merge=RATES) == (None,)


def test_of_a_clip_with_fields_each_line_has_variants_and_words_are_left_out_afterwards() -> None:
    fields = fields_of(VALUES)
    always = MergeRates(merge=1.0)
    texts = texts_of("one\ntwo", word_dropout=0, variants=2, seed=1, fields=fields, merge=always)
    assert [text[:4] for text in texts if text] == ["one.", "one.", "two.", "two."]
    assert all(f"{name}: {value}" in str(text) for text in texts for name, value in fields)
    thinner = texts_of("one\ntwo", word_dropout=0.5, variants=2, seed=1, fields=fields, merge=always)
    assert all(set(str(few).split()) < set(str(all_).split()) for few, all_ in zip(thinner, texts, strict=True))
    assert merged(None, fields, None) is None
    assert of_text(as_text(fields)) == fields and as_text(()) == "" and of_text("") == ()
    json.loads(as_text(fields))
