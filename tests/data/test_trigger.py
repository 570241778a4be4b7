"""A trigger in the captions of a run: trained on, validated with, kept when words are dropped, part of the identity."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.runs import few_clips, launch_here
from trainer.data.dataset import Dataset, prepare
from trainer.flags.config import Config
from trainer.model.source import open_model
from trainer.wiring import data_settings, identity_of

TRIGGER = "in my-style"


def config_of(folder: Path, **values: object) -> Config:
    """A run on three clips: one with a caption, one whose caption holds the trigger, one whose caption is empty."""
    if not (folder / "data").exists():
        few_clips(folder / "data")
        few_clips(folder / "held")
        (folder / "data" / "rock_feelings.txt").write_text("rock, In My-Style")
        (folder / "data" / "metal_madness.txt").write_text("")
    paths = {"dataset_path": str(folder / "data"), "validation": str(folder / "held"), "cache_dir": str(folder / "c")}
    return Config(**paths, model_id="debug", code_views=1, **values)  # type: ignore[arg-type]


def prepared(config: Config) -> Dataset:
    return prepare(data_settings(config), open_model("debug"), torch.device("cpu"))


def test_every_clip_is_trained_on_and_validated_with_the_trigger_once(tmp_path: Path) -> None:
    data = prepared(config_of(tmp_path, trigger="in  my-style", trigger_place="after"))
    captions = dict(zip((Path(name).stem for name in data.train.names), data.train.captions, strict=True))
    own = (tmp_path / "data" / "arcade_return_home.txt").read_text().strip()
    assert captions == {
        "arcade_return_home": f"{own.rstrip('.')}, {TRIGGER}" if not own.endswith(".") else f"{own} {TRIGGER}",
        "rock_feelings": "rock, In My-Style",
        "metal_madness": TRIGGER,
    }
    assert data.validation is not None
    assert all(str(caption).lower().count(TRIGGER) == 1 for caption in data.validation.captions)
    assert all(len(data.train.text.states(str(caption))) > 0 for caption in data.train.captions)
    assert f'"{TRIGGER}" stands once in every caption' in data.describe()


def test_the_trigger_survives_dropped_words_whole_and_once(tmp_path: Path) -> None:
    plain = prepared(config_of(tmp_path, word_dropout=0.6, caption_variants=20))
    data = prepared(config_of(tmp_path, trigger=TRIGGER, word_dropout=0.6, caption_variants=20))
    assert data.train.texts is not None and plain.train.texts is not None
    for name, texts, without in zip(data.train.names, data.train.texts, plain.train.texts, strict=True):
        assert all(str(text).lower().count(TRIGGER) == 1 for text in texts)
        assert all("my-style" not in str(text).replace(TRIGGER, "") for text in texts), "half of it is left"
        if "arcade" in name:  # the draws are those of the caption without a trigger
            assert texts == tuple(TRIGGER if text is None else f"{TRIGGER}, {text}" for text in without)
    assert prepared(config_of(tmp_path, trigger=TRIGGER)).digest == prepared(config_of(tmp_path)).digest


def test_without_labels_the_trigger_is_the_caption_of_all(tmp_path: Path) -> None:
    data = prepared(config_of(tmp_path, trigger=TRIGGER, no_label=True))
    assert data.validation is not None
    assert {*data.train.captions, *data.validation.captions} == {TRIGGER}
    row = next(iter(_rows(data)))
    assert data.train.batch([replace(row, drop_caption=False)]).text_mask_BS.sum() > 0
    assert data.train.batch([replace(row, drop_caption=True)]).text_mask_BS.sum() == 0, "dropped with the caption"


def _rows(data: Dataset) -> list:
    from trainer.data.order import Order, rows_of_step

    frames = data.train.codes.frames
    order = Order(
        seed=0, epochs=1, global_batch=1, segment_frames=data.train.segment_frames, codebooks=4, caption_drop_rate=0.5,
        frames=frames, texts=None, max_steps=None,
    )  # fmt: skip
    return rows_of_step(order, 0)


def test_the_trigger_is_part_of_the_identity_when_on_and_absent_when_off(tmp_path: Path) -> None:
    source, off = open_model("debug"), config_of(tmp_path)
    data = prepared(off)
    identities = [identity_of(config, source, data) for config in (
        off,
        config_of(tmp_path, trigger=TRIGGER),
        config_of(tmp_path, trigger=TRIGGER, trigger_place="after"),
        config_of(tmp_path, trigger="x"),
    )]
    assert not any("trigger" in name for name in identities[0])
    assert len({str(identity) for identity in identities}) == 4
    assert all({name: identity[name] for name in identities[0]} == identities[0] for identity in identities)


@pytest.mark.full
def test_a_run_with_a_trigger_says_what_to_write_and_refuses_another(tmp_path: Path) -> None:
    flags = ("--trigger", TRIGGER, "--max_steps", "1", "--warmup_steps", "0", "--lr_schedule", "constant")
    said = launch_here(tmp_path, *flags, "--output_dir", "models")
    assert f'"{TRIGGER}" stands once in every caption' in said and f'--prompt "{TRIGGER}, ..."' in said
    card = (tmp_path / "models" / "huggingface" / "README.md").read_text()
    assert f"the phrase `{TRIGGER}`" in card and f'("{TRIGGER}, ...")' in card
    said = launch_here(tmp_path, *flags[2:3], "2", *flags[4:], "--output_dir", "models", expect=1)
    assert "--trigger" in said and "None now" in said
