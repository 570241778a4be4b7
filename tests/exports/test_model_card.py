"""The card of an exported model: what it must say, and what it must not."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from trainer.exports.model_card import CardFacts, adapter_base, adapter_card, model_card
from trainer.spec.trainable import selection_of
from trainer.spec.trigger import Place, Trigger


def test_the_card_names_base_licence_and_data_but_no_path() -> None:
    card = model_card(_facts(base_model="small", dataset="/home/ann/my | songs"))
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "facebook/musicgen-small" and front["license"] == "cc-by-nc-4.0"
    assert front["pipeline_tag"] == "text-to-audio"
    assert "/home" not in card and r"my \| songs" in card and "| lr | 1e-05 |" in card
    assert "12 clips" in card and "1.50 hours" in card and "2306.05284" in card
    assert 'scripts/generate.py --model models/huggingface --prompt "..."' in card


@pytest.mark.parametrize("base_model", ["debug", "/models/mine"])
def test_the_card_claims_no_licence_that_it_does_not_know(base_model: str) -> None:
    front = yaml.safe_load(model_card(_facts(base_model=base_model, dataset="songs")).split("---")[1])
    assert "license" not in front and "base_model" not in front


def test_the_card_of_a_learned_word_says_what_was_learned_and_names_only_what_is_there() -> None:
    card = model_card(_facts(base_model="small", dataset="songs", placeholder="<my-style>"))
    assert "`<my-style>`, for the music of 12 clips" in card and 'pipeline("text-to-audio"' in card
    assert '--prompt "<my-style> ..."' in card and '("<my-style> ...")' in card
    assert "lm_final" not in card and "audiocraft" not in card and "language model fine-tuned" not in card


@pytest.mark.parametrize(("place", "prompt"), [("before", '"A$AP \\"x\\", ..."'), ("after", '"... A$AP \\"x\\""')])
def test_the_card_of_a_run_with_a_trigger_says_what_to_write_in_a_prompt(place: Place, prompt: str) -> None:
    trigger = Trigger(text='A$AP "x"', place=place)
    facts = replace(_facts(base_model="small", dataset="songs"), trigger=trigger)
    assert f'pipeline("text-to-audio", model="models/huggingface")({prompt})' in model_card(facts)
    for card in (model_card(facts), adapter_card(facts)):
        assert 'the phrase `A$AP "x"`' in card and f"{place} the description" in card
    assert "phrase" not in model_card(_facts(base_model="small", dataset="songs"))


def test_the_card_names_the_weights_at_the_start_but_no_path() -> None:
    card = model_card(_facts(base_model="small", dataset="songs", started_from="/home/ann/first/lm_final.pt"))
    assert 'started from the language model of "lm_final.pt"' in card and "/home" not in card
    assert "licence of the weights at the start" in card
    assert "the start" not in model_card(_facts(base_model="small", dataset="songs"))


def _facts(
    *, base_model: str, dataset: str, started_from: str | None = None, placeholder: str | None = None
) -> CardFacts:
    return CardFacts(
        base_model=base_model,
        dataset=dataset,
        clips=12,
        hours=1.5,
        steps=40,
        hyperparameters={"lr": 1e-5},
        started_from=started_from,
        placeholder=placeholder,
    )


def test_the_cards_tell_the_validation_loss_of_the_exported_step_where_it_is_known() -> None:
    facts = replace(_facts(base_model="small", dataset="songs"), validation_loss=3.14159)
    for card in (model_card(facts), adapter_card(facts)):
        assert "| optimizer steps | 40 |\n| validation loss (nats) | 3.1416 |" in card
    assert "validation loss" not in model_card(_facts(base_model="small", dataset="songs"))


def test_a_loras_cards_say_so_and_name_the_weights_that_the_adapter_fits() -> None:
    training = replace(_facts(base_model="small", dataset="songs"), trained=selection_of(lora_rank=4))
    merged, adapter = model_card(training), adapter_card(training)
    assert "trained by LoRA" in merged and "LoRA" not in model_card(_facts(base_model="small", dataset="songs"))
    front = yaml.safe_load(adapter.split("---")[1])
    assert front["library_name"] == "peft" and front["base_model_relation"] == "adapter" and "lora" in front["tags"]
    assert 'from_pretrained("facebook/musicgen-small")' in adapter and "| trained | LoRA of rank 4" in adapter


@pytest.mark.parametrize(
    ("base_model", "started_from", "named"),
    [
        ("small", None, "facebook/musicgen-small"),
        ("ann/mine", None, "ann/mine"),
        ("/home/ann/mine", None, None),
        ("debug", None, None),
        ("small", "/home/ann/first", None),
        ("small", "/home/ann/first/lm_final.pt", None),
    ],
)
def test_an_adapters_card_loads_a_base_that_is_there_or_says_what_to_put_in(
    base_model: str, started_from: str | None, named: str | None
) -> None:
    """Neither the last part of a path nor the base without the weights at the start is the model that it fits."""
    facts = replace(_facts(base_model=base_model, dataset="songs", started_from=started_from))
    assert adapter_base(base_model, started_from) == named
    card = adapter_card(facts)
    front = yaml.safe_load(card.split("---")[1])
    assert front.get("base_model") == named and "/home" not in card
    (loaded,) = re.findall(r'base = MusicgenForConditionalGeneration.from_pretrained\("(.*)"\)', card)
    assert loaded == named if named else loaded.startswith("path/to/")
    compile(re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0], "card", "exec")
    if started_from is not None:
        assert f'the run that made "{Path(started_from).name}"' in card


def test_the_card_says_which_kind_of_model_it_is_and_gives_the_code_that_loads_it() -> None:
    mono = _facts(base_model="small", dataset="songs")
    stereo, melody = replace(mono, channels=2), replace(mono, melody=True)
    both = replace(mono, channels=2, melody=True)
    assert "A text-to-music model: " in model_card(mono) and "pipeline(" in model_card(mono)
    assert "A stereo text-to-music model: " in model_card(stereo)
    assert "A text-to-music model that also reads a melody: " in model_card(melody)
    assert "A stereo text-to-music model that also reads a melody: " in model_card(both)
    for facts, shape in ((stereo, "(1, 2, samples)"), (melody, "(1, 1, samples)"), (both, "(1, 2, samples)")):
        card = model_card(facts)
        name = "MusicgenMelodyForConditionalGeneration" if facts.melody else "MusicgenForConditionalGeneration"
        assert f'{name}.from_pretrained("models/huggingface")' in card and "pipeline(" not in card
        assert shape in card and "max_new_tokens=10 * 50 + 3" in card
        assert ("generate_with_chroma" in card) is ("5.18 or newer" in card) is ("--melody" in card) is facts.melody
        assert f"from transformers import {name}\n" in adapter_card(facts)
        for code in re.findall(r"```python\n(.*?)```", card + adapter_card(facts), re.DOTALL):
            compile(code, "card", "exec")


def test_the_card_says_how_a_mono_base_was_made_stereo() -> None:
    facts = replace(_facts(base_model="small", dataset="songs"), channels=2, stereo_init="halved")
    assert "The base model is mono." in model_card(facts) and "with embeddings halved." in model_card(facts)
    assert "mono" not in model_card(replace(facts, stereo_init=None))
    started = model_card(replace(facts, started_from="/home/me/piano"))
    assert 'from the language model of "piano".\nThese weights were mono. Left and right' in started
    assert "The base model is mono" not in started
