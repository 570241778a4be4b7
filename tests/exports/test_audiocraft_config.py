"""audiocraft's configurations of models that the debug model is no example of."""

from __future__ import annotations

import pytest
import yaml
from transformers import MusicgenConfig, MusicgenDecoderConfig, T5Config

from trainer.errors import ModelError
from trainer.exports.audiocraft_config import lm_config, text_encoder_name


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
