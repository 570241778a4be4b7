"""audiocraft's configurations of models that the debug model is no example of."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from transformers import MusicgenConfig, MusicgenDecoderConfig, T5Config

from trainer.errors import ModelError
from trainer.exports.audiocraft_config import lm_config, read_lm_config, text_encoder_name
from trainer.model.source import open_model


def test_stereo_codebooks_come_in_pairs_of_one_delay() -> None:
    decoder = MusicgenDecoderConfig(num_codebooks=8, audio_channels=2)
    config = MusicgenConfig(text_encoder={"model_type": "t5"}, audio_encoder={"model_type": "encodec"},
                            decoder=decoder.to_dict())  # fmt: skip
    text = lm_config(config, text_encoder_name="t5-base", segment_seconds=30.0, cfg_dropout=0.1)
    tree = yaml.safe_load(text)
    assert tree["codebooks_pattern"]["delay"]["delays"] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert tree["interleave_stereo_codebooks"]["use"] and tree["channels"] == 2


@pytest.mark.parametrize(
    ("saved_as", "width", "name"),
    [
        ("t5-base", 768, "t5-base"),
        ("google/flan-t5-large", 1024, "google/flan-t5-large"),
        ("t5-base", 512, "t5-small"),
        ("", 1024, "t5-large"),
        ("google/t5-v1_1-xl", 2048, None),
    ],
)
def test_audiocraft_gets_a_text_encoder_that_it_knows(saved_as: str, width: int, name: str | None) -> None:
    text = T5Config(d_model=width, _name_or_path=saved_as)  # type: ignore[call-arg]
    config = MusicgenConfig(
        text_encoder=text.to_dict(),
        audio_encoder={"model_type": "encodec"},
        decoder=MusicgenDecoderConfig().to_dict(),
    )
    if name is None:
        with pytest.raises(ModelError, match="2048"):
            text_encoder_name(config)
    else:
        assert text_encoder_name(config) == name


def changed(path: str, value: object, model: str = "debug-melody") -> str:
    """The xp.cfg of a model, with another value at a place such as fuser.cross."""
    tree = yaml.safe_load(
        lm_config(
            open_model(model).config,
            text_encoder_name="t5-small",
            segment_seconds=30.0,
            cfg_dropout=0.1,
            melody_rate=0.5,
        )
    )
    *parents, last = path.split(".")
    part = tree
    for parent in parents:
        part = part[parent]
    part[last] = value
    return yaml.safe_dump(tree)


# What of it is known, and what is refused with the reason.
@pytest.mark.parametrize(
    ("path", "value", "refused"),
    [
        ("conditioners.self_wav.chroma_stem.sample_rate", "${sample_rate}", None),  # as audiocraft's own files have it
        ("conditioners.args", {"merge_text_conditions_p": 0.25}, None),
        ("conditioners.self_wav.model", "style", "reads self_wav by style, as MusicGen-Style does"),
        ("conditioners.genre", {"model": "lut"}, "the conditioners description, genre, self_wav: only"),
        ("conditioners.self_wav.chroma_stem.radix2_exp", 12, "hears melodies with .*'radix2_exp': 12"),
        ("conditioners.self_wav.chroma_stem.argmax", False, "hears melodies with .*'argmax': False"),
        ("fuser.prepend", ["description", "self_wav"], "joins its conditions otherwise"),
        ("fuser.cross", ["description"], "joins its conditions otherwise"),
        ("interleave_stereo_codebooks", {"use": True, "per_timestep": True}, "one after the other in time"),
        ("conditioners", {"description": {"model": "t5"}}, "describes no text-to-music model"),
    ],
)
def test_only_conditions_of_musicgens_melody_models_are_read(path: str, value: object, refused: str | None) -> None:
    if refused is None:
        read = read_lm_config(changed(path, value), Path("state_dict.bin"))
        assert read.melody and read.audio_channels == 1
    else:
        with pytest.raises(ModelError, match=rf"state_dict\.bin: its xp\.cfg .*{refused}"):
            read_lm_config(changed(path, value), Path("state_dict.bin"))


def test_delays_of_pairs_are_a_stereo_models_and_others_nobodys() -> None:
    path, file = "codebooks_pattern.delay.delays", Path("state_dict.bin")
    for delays, channels in (([0, 1, 2, 3], 1), ([0, 0, 1, 1, 2, 2, 3, 3], 2), ([0, 0, 1, 1], 2)):
        assert read_lm_config(changed(path, delays), file).audio_channels == channels
    with pytest.raises(ValueError, match="neither those of a mono model nor of a stereo one"):
        _ = read_lm_config(changed(path, [0, 2, 3, 4]), file).audio_channels
