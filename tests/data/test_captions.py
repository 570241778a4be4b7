"""Captions that vary: lines, and variants with words left out, drawn by (seed, epoch, clip)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.test_order import LENGTHS, order_of
from tests.runs import assert_bit_equal, few_clips, final_state, launch_here, metrics
from tests.synthetic import random_examples
from trainer.data.caption_files import read_caption
from trainer.data.captions import first_caption, texts_of, thinned
from trainer.data.dataset import prepare
from trainer.data.order import draw, rows_of_step
from trainer.errors import ConfigError
from trainer.flags.config import Config, parse
from trainer.model.source import open_model
from trainer.wiring import data_settings

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


@pytest.mark.parametrize(
    ("words", "part"),
    [
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
