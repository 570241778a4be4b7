"""Captions that vary: lines, and variants with words left out, drawn by (seed, epoch, clip)."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.audio_files import write_clip
from tests.data.test_order import LENGTHS, order_of
from tests.runs import assert_bit_equal, few_clips, final_state, launch_here, metrics
from tests.synthetic import random_examples
from trainer.data.caption_files import read_caption
from trainer.data.captions import first_caption, texts_of, thinned
from trainer.data.dataset import Dataset, prepare
from trainer.data.music_fields import MergeRates
from trainer.data.order import draw, rows_of_step
from trainer.errors import ConfigError
from trainer.flags.config import Config, parse
from trainer.model.source import open_model
from trainer.wiring import data_settings, identity_of, identity_of_captions

WORDS = " ".join(f"word{number}" for number in range(40))


def kept(line: str, rate: float, seed: int = 0, variant: int = 0) -> list[str]:
    return (thinned(line, rate, seed, variant) or "").split()


def test_words_are_dropped_at_their_rate_and_keep_their_order() -> None:
    variants = [kept(WORDS, 0.3, variant=variant) for variant in range(500)]
    share = 1 - np.mean([len(words) for words in variants]) / 40
    assert abs(share - 0.3) < 4 * np.sqrt(0.3 * 0.7 / (500 * 40))
    order = {word: place for place, word in enumerate(WORDS.split())}
    assert all([order[word] for word in words] == sorted(order[word] for word in words) for words in variants)
    # word by word, not the same words each time
    dropped = np.array([[word not in words for word in order] for words in variants])
    assert (abs(dropped.mean(axis=0) - 0.3) < 5 * np.sqrt(0.3 * 0.7 / 500)).all()


def test_a_variant_depends_on_seed_line_and_number_alone() -> None:
    variants = {
        (seed, line, variant): tuple(word[4:] for word in kept(line, 0.5, seed, variant))
        for seed in range(3) for line in (WORDS, WORDS.replace("word", "Word")) for variant in range(3)
    }  # fmt: skip
    assert len(set(variants.values())) == len(variants)
    assert variants == {key: tuple(word[4:] for word in kept(key[1], 0.5, key[0], key[2])) for key in variants}
    assert set(kept(WORDS, 0.6)) < set(kept(WORDS, 0.3)) < set(WORDS.split())  # a larger rate drops those and more


def test_the_texts_of_a_caption_are_its_lines_times_the_variants() -> None:
    rules = {"variants": 3, "seed": 5}
    caption = f"slow piano\n{WORDS}"
    assert texts_of(caption, word_dropout=0.0, **rules) == ("slow piano", WORDS)
    texts = texts_of(caption, word_dropout=0.4, **rules)
    assert texts == tuple(thinned(line, 0.4, 5, v) for line in caption.split("\n") for v in range(3))
    assert texts_of(None, word_dropout=0.4, **rules) == (None,)
    assert None in texts_of("piano", word_dropout=0.9, **rules), "a variant without words is no text"
    assert first_caption(caption) == "slow piano" and first_caption(None) is None


def test_texts_are_drawn_evenly_and_move_no_other_draw() -> None:
    counts = np.array([1, 2, 3, 4, 5, 6, 7])
    order = order_of(texts=counts, epochs=2000)
    drawn = np.array([[draw(order, epoch, clip).text for clip in range(7)] for epoch in range(2000)])
    for clip, count in enumerate(counts):
        shares = np.bincount(drawn[:, clip], minlength=count) / 2000
        assert len(shares) == count and (abs(shares - 1 / count) < 5 * np.sqrt(1 / count / 2000)).all()
    # each clip draws by itself: clips with equally many texts do not move together
    twins = order_of(texts=np.full(7, 4), epochs=2000)
    pairs = np.array([[draw(twins, epoch, clip).text for clip in (0, 1)] for epoch in range(2000)])
    assert abs((pairs[:, 0] == pairs[:, 1]).mean() - 0.25) < 0.05

    def streams(global_batch: int, texts: np.ndarray | None) -> dict[tuple[int, int], object]:
        order = order_of(global_batch=global_batch, texts=texts)
        return {(row.epoch, row.clip): row for step in range(order.steps) for row in rows_of_step(order, step)}

    assert streams(2, counts) == streams(5, counts)
    without = {key: replace(row, text=0) for key, row in streams(2, counts).items()}  # type: ignore[type-var]
    assert without == streams(2, None)


def test_a_batch_holds_the_drawn_texts() -> None:
    examples = random_examples(LENGTHS, ["full caption here"] * 7)
    texts = [(f"one{clip}", f"two two{clip}", None) for clip in range(7)]
    varied = replace(examples, texts=texts)
    rows = [draw(order_of(texts=np.full(7, 3)), epoch, clip) for epoch in range(4) for clip in range(7)]
    rows = [replace(row, drop_caption=False) for row in rows]
    assert {row.text for row in rows} == {0, 1, 2}
    batch = varied.batch(rows)
    for index, row in enumerate(rows):
        text = texts[row.clip][row.text]
        states = np.zeros((0, 512)) if text is None else varied.text.states(text)
        assert batch.text_mask_BS[index].sum() == len(states)
        assert torch.equal(batch.text_BSD[index, : len(states)], torch.tensor(states, dtype=torch.float32))
    assert varied.batch([replace(rows[0], drop_caption=True)]).text_mask_BS.sum() == 0
    assert max(varied.all_texts(), key=len) == "full caption here"


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_the_lines_of_a_caption_file_are_one_caption_or_several(tmp_path: Path, newline: str) -> None:
    path = tmp_path / "song.txt"
    path.write_bytes(f"slow  piano{newline}{newline} \tsad ballad {newline}".encode())
    assert read_caption(str(path)) == ("slow piano sad ballad", "")
    assert read_caption(str(path), lines=True) == ("slow piano\nsad ballad", "")
    path.write_text("a" * 1500 + "\n" + "b" * 1500)
    assert read_caption(str(path), lines=True)[0] == "a" * 1500 + "\n" + "b" * 1500
    path.write_text(" \n\n")
    assert read_caption(str(path), lines=True)[0] is None


def test_validation_takes_the_first_line_whole_and_the_cache_holds_every_text(tmp_path: Path) -> None:
    for name in ("data", "held"):
        few_clips(tmp_path / name)
        for path in (tmp_path / name).glob("*.txt"):
            path.write_text(f"first of {path.stem}\nsecond of {path.stem}\n")
    config = Config(
        dataset_path=str(tmp_path / "data"),
        validation=str(tmp_path / "held"),
        cache_dir=str(tmp_path / "cache"),
        model_id="debug",
        code_views=1,
        caption_lines=True,
        word_dropout=0.5,
        caption_variants=3,
    )
    data = prepare(data_settings(config), open_model("debug"), torch.device("cpu"))
    assert data.validation is not None and data.validation.texts is None and data.train.texts is not None
    stems = {Path(name).stem for name in data.validation.names}
    assert set(data.validation.captions) == set(data.train.captions) == {f"first of {stem}" for stem in stems}
    assert all(len(data.validation.text.states(str(caption))) > 0 for caption in data.validation.captions)
    for caption, texts in zip(data.train.captions, data.train.texts, strict=True):
        both = f"{caption}\n{str(caption).replace('first', 'second')}"
        assert texts == texts_of(both, word_dropout=0.5, variants=3, seed=0)
        assert all(len(data.train.text.states(text)) > 0 for text in texts if text is not None)


def test_a_run_with_words_dropped_resumes_bit_equal_and_refuses_another_rate(tmp_path: Path) -> None:
    flags = ("--word_dropout", "0.5", "--caption_variants", "3", "--lr", "1e-3", "--warmup_steps", "1", "--epochs", "4")
    launch_here(tmp_path, *flags, "--output_dir", "models", "--max_steps", "1", "--lr_schedule", "constant")
    launch_here(tmp_path, *flags, "--output_dir", "models", "--max_steps", "2", "--lr_schedule", "constant")
    stopped, losses = final_state(tmp_path), metrics(tmp_path)
    (tmp_path / "models").rename(tmp_path / "stopped")
    launch_here(tmp_path, *flags, "--output_dir", "models", "--max_steps", "2", "--lr_schedule", "constant")
    assert_bit_equal(final_state(tmp_path), stopped)
    assert metrics(tmp_path) == losses
    said = launch_here(tmp_path, *flags[:3], "4", *flags[4:], "--max_steps", "3", expect=1)
    assert "0.5 in 3 variants then, 0.5 in 4 variants now" in said
    said = launch_here(tmp_path, *flags[4:], "--max_steps", "3", expect=1)
    assert "0.5 in 3 variants then, None now" in said


def config_for(folder: Path, **flags: Any) -> Config:
    values: dict[str, Any] = {"model_id": "debug", "code_views": 1, "cache_dir": str(folder.parent / "cache"), **flags}
    return Config(dataset_path=str(folder), **values)


def prepared(folder: Path, **flags: Any) -> tuple[Dataset, dict[str, object]]:
    """The data set of these flags, and the identity of a run with them."""
    config, source = config_for(folder, **flags), open_model("debug")
    data = prepare(data_settings(config), source, torch.device("cpu"))
    return data, identity_of(config, source, data)


def test_where_a_caption_stands_changes_no_identity_as_long_as_nothing_is_asked_for(tmp_path: Path) -> None:
    few_clips(tmp_path / "data")
    plain, identity = prepared(tmp_path / "data")
    texts = sorted((tmp_path / "data").glob("*.txt"))
    rows = [f'{path.stem}.wav,"{path.read_text()}",90' for path in texts]
    (tmp_path / "data/metadata.csv").write_text("\n".join(["file_name,text,bpm", *rows]))
    for path in texts:
        path.unlink()
    other, identity_then = prepared(tmp_path / "data")
    assert identity_then == identity and other.train.captions == plain.train.captions and other.train.texts is None
    assert not any("--captions" in name or "merge" in name for name in identity)


@pytest.mark.parametrize(
    "flags",
    [
        {"captions": "metadata,text"}, {"caption_template": "{name}"}, {"default_caption": "x"},
        {"caption": "x"}, {"captions": "metadata", "caption_column": "text"}, {"merge_metadata": 0.5},
        {"merge_metadata": 0.5, "merge_drop_caption": 0.5}, {"merge_metadata": 0.5, "merge_drop_field": 0.5},
        {"merge_metadata": 0.5, "caption_variants": 3},
    ],
    ids=lambda flags: "-".join(flags),
)  # fmt: skip
def test_flags_of_captions_are_in_the_identity_where_they_are_given(flags: dict[str, Any]) -> None:
    off, on = identity_of_captions(config_for(Path("music"))), identity_of_captions(config_for(Path("music"), **flags))
    assert off == {} and on
    assert all(any(f"--{name}" in entry for entry in on) for name in flags)
    others = [{**flags, name: 0.75} for name, value in flags.items() if value == 0.5]
    assert all(identity_of_captions(config_for(Path("music"), **other)) != on for other in others)


def test_fields_are_merged_into_texts_that_are_cached_and_the_digest_knows_them(tmp_path: Path) -> None:
    few_clips(tmp_path / "data")
    for path in (tmp_path / "data").glob("*.txt"):
        path.with_suffix(".json").write_text(json.dumps({"description": path.read_text(), "bpm": 90, "genre": "Dub"}))
        path.unlink()
    plain, identity = prepared(tmp_path / "data")
    rates: dict[str, Any] = {"merge_metadata": 0.5, "merge_drop_caption": 0.5, "caption_variants": 4}
    data, identity_on = prepared(tmp_path / "data", **rates)
    assert data.train.captions == plain.train.captions and plain.train.texts is None
    fields = (("bpm", "90.0"), ("genre", "dub"))
    merge = MergeRates(merge=0.5, drop_caption=0.5)
    assert data.train.texts == [
        texts_of(caption, word_dropout=0, variants=4, seed=0, fields=fields, merge=merge)
        for caption in data.train.captions
    ]
    for texts in data.train.texts:
        assert all(len(data.train.text.states(text)) > 0 for text in texts if text is not None)
    assert data.digest != plain.digest and len(identity_on) == len(identity) + 1
    again, _ = prepared(tmp_path / "data", **rates)
    assert again.train.texts == data.train.texts
    next((tmp_path / "data").glob("*.json")).write_text(json.dumps({"description": "x", "bpm": 91}))
    assert prepared(tmp_path / "data", **rates)[0].digest != data.digest


@pytest.mark.full
def test_every_source_of_captions_trains_and_another_merge_rate_is_refused(tmp_path: Path) -> None:
    for seed, name in enumerate(("text", "marked", "row", "described", "Dub/slow river", "7")):
        write_clip(tmp_path / "data" / f"{name}.wav", "plain" if name == "text" else None, seed=seed)
    (tmp_path / "data/marked.caption.txt").write_text("caption: marked\nlyrics:\nla la")
    (tmp_path / "data/metadata.csv").write_text("file_name,text,bpm\nrow.wav,of a row,90\n")
    (tmp_path / "data/described.json").write_text(json.dumps({"description": "described", "genre": "rock"}))
    flags = ["--caption_template", "{name}, {folder}", "--default_caption", "last", "--merge_metadata", "0.5"]
    run = [*flags, "--epochs", "4", "--lr_schedule", "constant", "--output_dir", "models"]
    launch_here(tmp_path, *run, "--max_steps", "1")
    with open(tmp_path / "models/dataset.csv", newline="", encoding="utf-8") as file:
        details = {row["path"]: row["detail"] for row in csv.DictReader(file) if row["fate"] == "used"}
    assert details["text.wav"] == "" and "caption from marked.caption.txt" in details["marked.wav"]
    assert "metadata.csv line 2" in details["row.wav"] and "described.json" in details["described.wav"]
    assert "--caption_template" in details["Dub/slow river.wav"] and "--default_caption" in details["7.wav"]
    run[5] = "0.25"
    assert "0.5, captions dropped 0.0" in launch_here(tmp_path, *run, "--max_steps", "2", expect=1)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("--captions text,tags", "tags is no source of captions"),
        ("--captions text,text", "names a source twice"),
        ("--captions text --caption_template {title}", "does not name template"),
        ("--captions text,template", "names template, which has no effect"),
        ("--captions text --caption_column x", "does not name metadata"),
        ("--captions text --merge_metadata 0.5", "names neither metadata nor json"),
        ("--merge_drop_field 0.5", "--merge_drop_field has no effect without --merge_metadata"),
        ("--merge_metadata 1.5", "--merge_metadata 1.5 cannot be used"),
        ("--caption x --default_caption y", "--default_caption cannot be used with --caption"),
        ("--caption x --captions text", "--captions has no effect with --caption"),
        ("--caption x --caption_lines 1", "--caption_lines cannot be used with --caption"),
        ("--no_label 1 --caption x", "--caption has no effect with --no_label 1"),
        ("--no_label 1 --caption_template {title}", "--caption_template has no effect with --no_label 1"),
        ("--caption_variants 4", "--caption_variants 4 has no effect without --word_dropout or"),
        ("--no_label 1 --word_dropout 0.2", "--word_dropout has no effect with --no_label 1"),
        ("--no_label 1 --caption_lines 1", "--caption_lines has no effect with --no_label 1"),
        ("--word_dropout 1", "--word_dropout 1 cannot be used"),
    ],
)
def test_flags_of_captions_act_or_are_refused(words: str, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(["--dataset", "music", *words.split()])
    assert part in str(caught.value)
