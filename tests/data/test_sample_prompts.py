"""Which prompts a run plays, and what the model reads of each."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scripts import prepare_dataset
from tests.audio_files import write_clip
from tests.data.test_shared_scan import on_each_rank
from tests.synthetic import RandomMelodies
from trainer.data import cache, dataset, prompt_states
from trainer.data.dataset import DataSettings
from trainer.data.prompt_states import SamplePrompts, prepare_prompts
from trainer.data.sample_prompts import (
    MOST_PROMPTS,
    UNKNOWN,
    SamplePrompt,
    all_captions,
    chosen,
    clip_to_continue,
    read_prompts,
)
from trainer.data.text_states import text_states
from trainer.errors import ConfigError, DataError
from trainer.flags.config import Config
from trainer.model.language_model import load_language_model
from trainer.model.new_word import TextEmbedding, extended_tokenizer, first_token, with_embedding
from trainer.model.new_word_model import TextTunedModel
from trainer.model.source import Source, load_text_encoder, open_model
from trainer.wiring import data_settings

CPU = torch.device("cpu")
NAMES = [f"{letter}.wav" for letter in "abcdef"]
CAPTIONS = ["rock", "jazz", "rock", "techno", None, "folk"]


def test_given_prompts_are_played_as_they_are_and_equal_ones_with_seeds_of_their_own() -> None:
    prompts = chosen(["rock", "polka", "rock", "rock"], CAPTIONS, NAMES, 7)
    assert [(one.text, one.seed) for one in prompts] == [("rock", 7), ("polka", 7), ("rock", 8), ("rock", 9)]
    assert (prompts[1].origin, prompts[1].clip) == ("given", None)


def test_a_given_prompt_that_is_a_caption_names_the_first_clip_that_has_it() -> None:
    prompts = chosen(["techno", "rock", "tech"], CAPTIONS, NAMES, 0)
    assert [(one.origin, one.clip) for one in prompts] == [("caption", "d.wav"), ("caption", "a.wav"), ("given", None)]


def test_all_captions_are_each_text_once_in_the_order_of_the_clips_and_not_too_many() -> None:
    assert all_captions(CAPTIONS) == ["rock", "jazz", "techno", "folk"]
    with pytest.raises(ConfigError, match="no clip has a caption"):
        all_captions([None, "", " "])
    with pytest.raises(ConfigError, match=f"101 prompts.*{MOST_PROMPTS} at most"):
        all_captions([str(number) for number in range(101)])


@pytest.mark.parametrize("seed", range(20))
def test_without_prompts_three_captions_are_drawn_and_one_text_that_no_clip_has(seed: int) -> None:
    *of_captions, unknown = chosen(None, CAPTIONS, NAMES, seed)
    assert len({one.text for one in of_captions}) == 3 and {one.origin for one in of_captions} == {"caption"}
    for one in of_captions:
        assert one.clip is not None and CAPTIONS[NAMES.index(one.clip)] == one.text and one.seed == seed
    assert unknown.text in UNKNOWN and (unknown.origin, unknown.clip, unknown.seed) == ("unknown", None, seed)
    assert chosen(None, CAPTIONS, NAMES, seed) == [*of_captions, unknown]


def test_every_caption_and_every_unknown_text_is_drawn_by_some_seed() -> None:
    drawn = [chosen(None, CAPTIONS, NAMES, seed) for seed in range(40)]
    assert {one.text for prompts in drawn for one in prompts[:-1]} == {"rock", "jazz", "techno", "folk"}
    assert {prompts[-1].text for prompts in drawn} == set(UNKNOWN)


def test_fewer_captions_give_fewer_prompts_and_a_text_that_a_clip_has_is_not_called_unknown() -> None:
    captions = [UNKNOWN[0].upper(), UNKNOWN[1]]
    texts = [one.text for one in chosen(None, captions, ["a", "b"], 0)]
    assert sorted(texts[:2]) == sorted(captions) and texts[2:] == [UNKNOWN[2]]
    assert [one.origin for one in chosen(None, UNKNOWN, NAMES, 0)] == ["caption"] * 3, "no text is new to this data set"


@pytest.mark.parametrize("captions", [[None] * 3, ["", None, " "]])
def test_without_captions_no_prompt_is_played_with_four_seeds(captions: list[str | None]) -> None:
    assert [(one.text, one.seed) for one in chosen(None, captions, NAMES[:3], 5)] == [
        ("", seed) for seed in range(5, 9)
    ]


def test_a_continuation_comes_last_and_shares_no_seed_with_its_own_caption() -> None:
    one_more = SamplePrompt(text="rock", seed=7, origin="continuation", clip="a.wav")
    *_, last = chosen(["rock"], CAPTIONS, NAMES, 7, continuation=one_more)
    assert (last.text, last.seed, last.origin, last.clip) == ("rock", 8, "continuation", "a.wav")


def test_a_clip_to_continue_is_longer_than_what_is_given_of_it() -> None:
    frames = np.array([50, 51, 10, 80, 50])
    assert {clip_to_continue(frames, 50, seed) for seed in range(30)} == {1, 3}
    assert clip_to_continue(frames, 80, 0) is None


def test_prompts_are_read_from_a_file_or_a_list(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeffslow  rock\r\n\n  Café jazz | live\n", encoding="utf-8")
    assert read_prompts(str(file)) == ["slow rock", "Café jazz | live"]
    plain = tmp_path / "prompts"
    plain.write_text("techno")
    assert read_prompts(str(plain)) == ["techno"]
    assert read_prompts(" slow rock |techno| | 80s/90s pop.") == ["slow rock", "techno", "80s/90s pop."]
    assert read_prompts("slow 80s/90s rock") == ["slow 80s/90s rock"]


def test_prompts_that_cannot_be_read_are_refused_with_what_would_work(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    cases: list[tuple[str, type[Exception], str]] = [
        ("", ConfigError, "holds no prompt"),
        (" | |", ConfigError, "holds no prompt"),
        ("promts.txt", ConfigError, r"promts.txt cannot be read.*with \| between"),
        ("lists/prompts", ConfigError, "lists/prompts cannot be read"),
        (str(tmp_path), ConfigError, "cannot be read"),
        ("~nobody-of-this-name/prompts.txt", ConfigError, "cannot be read"),
        (str(tmp_path / "latin.txt"), ConfigError, "UTF-8"),
        (str(tmp_path / "empty.txt"), DataError, "empty.txt is empty: write one prompt a line"),
        ("caf\udce9 jazz", ConfigError, "is no UTF-8"),  # as Python has an argument in Latin-1
        ("|".join(map(str, range(MOST_PROMPTS + 1))), ConfigError, "101 prompts.*100 at most"),
    ]
    for text, error, words in cases:
        with pytest.raises(error, match=words):
            read_prompts(text)


# With a real data set and T5.
@functools.cache
def source() -> Source:
    return open_model("debug")


def settings_of(folder: Path, **flags: Any) -> DataSettings:
    flags = {"code_views": 2, "model_id": "debug", "cache_dir": str(folder / "cache")} | flags
    return data_settings(Config(dataset_path=str(folder / "data"), **flags))


@pytest.fixture(scope="module")
def music(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five clips of 0.6 s and one of 1.2 s; its cache holds their codes."""
    folder = tmp_path_factory.mktemp("music")
    for seed in range(5):
        write_clip(folder / "data" / f"{seed}.wav", f"slow rock number {seed}", seed=seed, seconds=0.6)
    write_clip(folder / "data" / "long.wav", "a long one", seed=5, seconds=1.2)
    return folder


def prepared(folder: Path, given: str | None = None, continued: float | None = None, **flags: Any) -> SamplePrompts:
    settings = settings_of(folder, **flags)
    data = dataset.prepare(settings, source(), CPU)
    return prepare_prompts(settings, source(), CPU, data, given=given, continue_seconds=continued, frames=100)


@pytest.mark.numbers
def test_states_are_those_of_a_prompt_that_is_encoded_alone_and_captions_keep_theirs(music: Path) -> None:
    settings = settings_of(music)
    data = dataset.prepare(settings, source(), CPU)
    before = {text: data.train.text.states(text) for text in data.train.all_texts()}
    prompts = prepare_prompts(settings, source(), CPU, data, given=None, continue_seconds=None, frames=100)
    encoder, tokenizer = load_text_encoder(source()), source().load_tokenizer()
    for prompt in prompts.prompts:
        states = prompts.states(prompt)
        assert states is not None and states.dtype == torch.float32
        assert torch.equal(states, text_states(encoder, tokenizer, prompt.text))
    after = dataset.prepare(settings, source(), CPU).train.text
    assert all(np.array_equal(after.states(text), states) for text, states in before.items())


def test_a_prompt_that_is_a_caption_brings_the_codes_of_its_clip_as_far_as_the_sound_goes(music: Path) -> None:
    settings = settings_of(music)
    data = dataset.prepare(settings, source(), CPU)
    found = prepare_prompts(settings, source(), CPU, data, given="captions", continue_seconds=None, frames=40)
    assert [one.text for one in found.prompts] == list(data.train.captions)
    for clip, prompt in enumerate(found.prompts):
        length = int(data.train.codes.frames[clip, 0])
        whole = torch.from_numpy(data.train.codes.crop(clip, 0, 0, length).astype("int64"))
        assert prompt.clip_KT is not None and torch.equal(prompt.clip_KT, whole[:, :40])
    assert {one.clip_KT.shape[1] for one in found.prompts if one.clip_KT is not None} == {30, 40}


def test_a_clips_prompt_is_played_with_the_notes_of_its_first_segment_and_others_without(music: Path) -> None:
    settings = settings_of(music)
    data = dataset.prepare(settings, source(), CPU)
    melodies = RandomMelodies(3)
    train = replace(data.train, melodies=melodies, segment_frames=40)
    given = "slow rock number 0|a long one|techno"
    found = prepare_prompts(
        settings, source(), CPU, replace(data, train=train), given=given, continue_seconds=0.8, frames=30
    )
    by_text = {one.text: one for one in found.prompts if one.origin != "continuation"}
    clips = list(data.train.names)
    for text, name, frames in (("slow rock number 0", "0.wav", 30), ("a long one", "long.wav", 40)):
        notes = melodies.crop(clips.index(name), 0, 0, frames)
        assert by_text[text].melody_C is not None and by_text[text].melody_C.shape == (235,)
        assert by_text[text].melody_C[: len(notes)].tolist() == notes.tolist()
    assert by_text["techno"].melody_C is None and found.prompts[-1].melody_C is not None
    no_melodies = prepare_prompts(settings, source(), CPU, data, given=given, continue_seconds=0.8, frames=30)
    assert [one.melody_C for one in no_melodies.prompts] == [None] * 4


def test_captions_that_were_played_are_no_captions_to_the_cache(music: Path, tmp_path: Path) -> None:
    """Their states may differ in the last bits, and training must read those that it reads without samples."""
    prepared(music, given="slow rock number 0", cache_dir=str(tmp_path))
    store = cache.text_store(tmp_path, source().text_identity())
    [key], [alone] = cache.text_keys(["slow rock number 0"]), cache.text_keys(["slow rock number 0"], alone=True)
    assert key != alone and {key, alone} <= store.keys()


def test_t5_is_loaded_only_where_a_prompt_is_new(music: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared(music, given="techno | fast metal")
    loaded = []
    monkeypatch.setattr(prompt_states, "load_text_encoder", lambda of: loaded.append(of.name) or load_text_encoder(of))
    prompts = prepared(music, given="fast metal|techno|techno")
    assert not loaded and [one.seed for one in prompts.prompts] == [0, 0, 1]
    prepared(music, given="fast metal|a new one")
    assert len(loaded) == 1


def test_no_label_plays_the_null_condition_and_needs_no_t5(music: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_states, "load_text_encoder", None)
    prompts = prepared(music, no_label=True, seed=3)
    assert [(one.text, one.seed) for one in prompts.prompts] == [("", seed) for seed in range(3, 7)]
    assert [prompts.states(one) for one in prompts.prompts] == [None] * 4


def test_a_trigger_stands_in_each_prompt_that_lacks_it(music: Path) -> None:
    prompts = prepared(music, given="techno|In My-Style, rock", trigger="in my-style")
    assert [one.text for one in prompts.prompts] == ["in my-style, techno", "In My-Style, rock"]
    *of_captions, unknown = prepared(music, trigger="in my-style").prompts
    assert all(one.text.startswith("in my-style, ") for one in (*of_captions, unknown))
    assert unknown.text.removeprefix("in my-style, ") in UNKNOWN


def test_a_clip_is_continued_from_its_own_cached_codes(music: Path) -> None:
    prompts = prepared(music, given="techno", continued=0.8)
    last = prompts.prompts[-1]
    assert (last.text, last.origin, last.clip) == ("a long one", "continuation", "long.wav")
    data = dataset.prepare(settings_of(music), source(), CPU).train
    codes = data.codes.crop(list(data.names).index("long.wav"), 0, 0, 40).astype(np.int64)
    assert last.prefix_KT is not None and last.prefix_KT.dtype == torch.int64
    assert np.array_equal(last.prefix_KT.numpy(), codes) and prompts.states(last) is not None


def test_no_clip_that_is_long_enough_is_refused_with_what_would_work(music: Path) -> None:
    with pytest.raises(ConfigError, match=r"--sample_continue 1\.2 .*the longest has 1\.20 s\. Give fewer seconds"):
        prepared(music, continued=1.2)


def test_each_rank_gets_the_same_prompts_and_only_the_first_reads_the_file_and_loads_t5(
    music: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(music, cache_dir=str(tmp_path / "cache"))
    data = dataset.prepare(settings, source(), CPU)
    file = tmp_path / "prompts.txt"
    file.write_text("techno\nfast metal\n")
    loaded, read = [], []
    monkeypatch.setattr(prompt_states, "load_text_encoder", lambda of: loaded.append(of.name) or load_text_encoder(of))
    monkeypatch.setattr(prompt_states, "read_prompts", lambda text: read.append(text) or read_prompts(text))
    first, second = on_each_rank(
        lambda rank, peers: prepare_prompts(
            settings, source(), CPU, data, given=str(file), continue_seconds=0.4, frames=100, peers=peers
        ),
        2,
    )
    assert first.prompts == second.prompts and len(first.prompts) == 3 and len(loaded) == len(read) == 1
    for prompt, same in zip(first.prompts, second.prompts, strict=True):
        assert torch.equal(first.states(prompt), second.states(same))


def test_a_prepared_folder_plays_what_its_sounds_played(music: Path, tmp_path: Path) -> None:
    command = [str(music / "data"), "--output", str(tmp_path / "data"), "--model_id", "debug", "--code_views", "2"]
    assert prepare_dataset.main([*command, "--cache_dir", str(music / "cache")]) == 0
    sounds, folder = prepared(music, continued=0.4), prepared(tmp_path, continued=0.4)
    assert sounds.prompts == folder.prompts
    for prompt, same in zip(sounds.prompts, folder.prompts, strict=True):
        assert torch.equal(sounds.states(prompt), folder.states(same))


@pytest.mark.numbers
def test_with_a_learned_word_states_come_from_the_model_as_it_is_and_are_those_of_its_export(music: Path) -> None:
    flags = {"tune_text": True, "placeholder": "<my-style>", "placeholder_vectors": 2}
    prompts = prepared(music, given="techno|rock in <my-style>", **flags)
    assert [one.text for one in prompts.prompts] == ["<my-style> techno", "rock in <my-style>"]
    placeholder = settings_of(music, **flags).placeholder
    assert placeholder is not None
    first = first_token(extended_tokenizer(source().load_tokenizer(), placeholder), placeholder)
    model = TextTunedModel(load_language_model(source()), load_text_encoder(source()), first, 2)
    for seed in range(2):
        rows = torch.randn(2, 512, generator=torch.Generator().manual_seed(seed))
        model.text_rows.data.copy_(rows)
        embedding = TextEmbedding(
            placeholder=placeholder, rows_ND=rows, base_model="debug", text_encoder=source().text_identity()
        )
        exported = with_embedding(source(), embedding)
        encoder, tokenizer = load_text_encoder(exported), exported.load_tokenizer()
        for prompt in prompts.prompts:
            states = prompts.states(prompt, model)
            assert states is not None and not states.requires_grad
            assert torch.equal(states, text_states(encoder, tokenizer, prompt.text))
