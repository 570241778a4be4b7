"""The shapes count what transformers builds, for every published model, without building it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    MusicgenConfig,
    MusicgenDecoderConfig,
    MusicgenForCausalLM,
    MusicgenMelodyDecoderConfig,
    MusicgenMelodyForCausalLM,
    T5Config,
)

from trainer.errors import ConfigError
from trainer.model.debug_model import build_debug_model
from trainer.model.language_model import LanguageModel
from trainer.spec.shapes import (
    DEBUG_NAMES,
    KNOWN,
    PUBLISHED_NAMES,
    Shape,
    hub_id_of,
    published,
    shape_of,
    shape_of_config,
    shape_to_train,
)


def on_meta(shape: Shape) -> nn.Module:
    """What transformers builds for the shape, and the projections beside it, without memory."""
    values = {
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "ffn_dim": shape.ffn,
        "num_codebooks": shape.codebooks,
        "audio_channels": shape.audio_channels,
        "pad_token_id": 2048,
        "bos_token_id": 2048,
    }
    with torch.device("meta"):
        projection = nn.Linear(shape.text_width, shape.width)
        if shape.cross_attention:
            return LanguageModel(MusicgenForCausalLM(MusicgenDecoderConfig(**values)), projection)
        decoder = MusicgenMelodyForCausalLM(MusicgenMelodyDecoderConfig(**values))
        return LanguageModel(decoder, projection, nn.Linear(shape.chroma_bins, shape.width))


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_are_those_of_the_model_that_transformers_builds(name: str) -> None:
    assert KNOWN[name].parameters == count(on_meta(KNOWN[name]))


def test_published_sizes() -> None:
    # facebook/musicgen-small: 419.584 M in the decoder and 0.787 M in enc_to_dec_proj.
    assert KNOWN["small"].parameters == 419_584_000 + 787_456
    billions = {name: round(KNOWN[name].parameters / 1e9, 3) for name in ("small", "medium", "large")}
    assert billions == {"small": 0.420, "medium": 1.839, "large": 3.257}
    assert round(KNOWN["stereo-small"].parameters / 1e9, 3) == 0.437
    assert {KNOWN[name].head_size for name in ("small", "medium", "large", "stereo-large")} == {64}


def test_units_and_cast_matrices_are_those_of_the_model() -> None:
    for name in ("small", "large", "stereo-medium", "melody", "stereo-melody-large", "debug"):
        shape, model = KNOWN[name], on_meta(KNOWN[name])
        layer = count(model.decoder.model.decoder.layers[0])
        assert (shape.layer_parameters, shape.rest_parameters) == (layer, count(model) - shape.layers * layer)
        assert shape.largest_unit == max(layer, shape.rest_parameters)
        linear = sum(count(module) for module in model.modules() if isinstance(module, nn.Linear))
        assert shape.cast_parameters == linear


@pytest.mark.parametrize("name", DEBUG_NAMES)
def test_a_debug_shape_is_that_of_its_model(name: str) -> None:
    model = build_debug_model(stereo="stereo" in name, melody="melody" in name)
    frozen = count(model.audio_encoder) + count(model.text_encoder)
    assert (KNOWN[name].parameters, KNOWN[name].frozen) == (count(model) - frozen, frozen)
    of_config = shape_of_config(name, model.config.to_dict())
    around = {"frozen", "text_encoder", "codec_channels"}  # which no decoder's configuration tells
    assert {key: value for key, value in vars(of_config).items() if key not in around} == {
        key: value for key, value in vars(KNOWN[name]).items() if key not in around
    }


def test_names_and_hub_ids_mean_the_same() -> None:
    assert shape_of("facebook/musicgen-stereo-large") == shape_of("stereo-large") == KNOWN["stereo-large"]
    for name in PUBLISHED_NAMES:
        assert hub_id_of(name) == hub_id_of(f"facebook/musicgen-{name}") == f"facebook/musicgen-{name}"
        assert published(name) == published(f"facebook/musicgen-{name}") == KNOWN[name]


def test_other_hub_ids_stand_for_themselves_and_folders_for_none(tmp_path: Path) -> None:
    assert hub_id_of("someone/my-musicgen") == "someone/my-musicgen"
    assert [hub_id_of(name) for name in ("debug", str(tmp_path), "../model", "a/b/c")] == [None] * 4
    assert [published(name) for name in ("debug", "facebook/musicgen-debug", "someone/small")] == [None] * 3


def test_a_mono_model_is_made_stereo_once() -> None:
    for name in ("small", "melody-large", "debug"):
        stereo = shape_to_train(KNOWN[name], stereo=True)
        expected = KNOWN["debug-stereo" if name == "debug" else f"stereo-{name}"]
        assert replace(stereo, name=expected.name) == expected
        assert shape_to_train(KNOWN[name], stereo=False) == KNOWN[name]
        with pytest.raises(ConfigError, match="is stereo already"):
            shape_to_train(stereo, stereo=True)


@pytest.mark.parametrize(
    "decoder", [{}, {"hidden_size": 512, "num_hidden_layers": 3, "ffn_dim": 1024, "num_codebooks": 8}]
)
def test_a_folder_is_read_though_its_config_leaves_out_defaults(tmp_path: Path, decoder: dict[str, int]) -> None:
    config = MusicgenConfig(
        text_encoder=T5Config().to_dict() | {"model_type": "t5"},
        audio_encoder=build_debug_model().config.audio_encoder.to_dict(),
        decoder=MusicgenDecoderConfig(**decoder).to_dict(),
    )
    config.save_pretrained(tmp_path)
    shape = shape_of(str(tmp_path))
    with torch.device("meta"):
        built = LanguageModel(
            MusicgenForCausalLM(config.decoder), nn.Linear(config.text_encoder.hidden_size, config.decoder.hidden_size)
        )
    assert shape.parameters == count(built)
    values = json.loads((tmp_path / "config.json").read_text())
    for part in ("decoder", "text_encoder"):  # a file that names nothing but what differs from the defaults
        values[part] = {key: value for key, value in values[part].items() if key in decoder}
    assert shape_of_config(str(tmp_path), values).parameters == shape.parameters


def test_what_is_no_musicgen_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        shape_of(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ConfigError, match="is a t5 model, not a MusicGen"):
        shape_of(str(tmp_path))


def test_a_hub_model_is_known_once_it_is_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="hf download someone/my-musicgen"):
        shape_of("someone/my-musicgen")
    with pytest.raises(ConfigError, match=r"no folder of this name here.*it can be no hub id"):
        shape_of("no such/hub/id")
    repository = tmp_path / "models--someone--my-musicgen"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots" / "abc").mkdir(parents=True)
    config = {"model_type": "musicgen", "decoder": {"hidden_size": 256}, "text_encoder": {"d_model": 768}}
    (repository / "snapshots" / "abc" / "config.json").write_text(json.dumps(config))
    assert shape_of("someone/my-musicgen").width == 256
