"""Stereo and melody models: what is exported loads in transformers and peft, and reads back from every place."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    MusicgenForConditionalGeneration,
    MusicgenMelodyForConditionalGeneration,
    MusicgenProcessor,
    pipeline,
)

from tests.exports.comparison import assert_equal
from tests.exports.test_init_from import slices_of
from tests.synthetic import HEADER
from trainer.errors import ModelError
from trainer.exports.audiocraft_files import read_audiocraft
from trainer.exports.card_snippets import in_transformers
from trainer.exports.export import ExportSettings, export_all, export_text, write_huggingface
from trainer.exports.init_from import find_starting_point, start_from
from trainer.exports.saved_models import open_saved
from trainer.flags.config import Config
from trainer.model.language_model import LanguageModel, load_language_model, materialize
from trainer.model.lora import save_adapter
from trainer.model.new_word import TextEmbedding
from trainer.model.source import LANGUAGE_MODEL, Source, load_text_encoder, open_model
from trainer.model.stereo import in_stereo
from trainer.model.trained_model import build_trained_model
from trainer.model.weights import weights_in_memory
from trainer.run.checkpoint import Saver
from trainer.spec.shapes import MELODY_PLACES
from trainer.spec.trainable import ALL_LAYERS, Placeholder
from trainer.wiring import model_settings

KINDS = ("debug-stereo", "debug-melody", pytest.param("debug-stereo-melody", marks=pytest.mark.full))
KIND_ENDS = ("-melody", "-stereo", "-stereo-melody")
opened = cache(open_model)
PLACES = ("huggingface", "audiocraft", "audiocraft/state_dict.bin", "lm_final.pt", "checkpoints/step-00000007")
SETTINGS = ExportSettings(card="# a card\n", segment_seconds=30.0, cfg_dropout=0.1, melody_rate=0.25)
CAPTION = "energetic rock with electric guitar"
CODES = torch.randint(0, 2049, (1, 8, 12), generator=torch.Generator().manual_seed(2))
NOTES = torch.randint(0, 12, (1, MELODY_PLACES), generator=torch.Generator().manual_seed(3))
# What MusicgenMelodyFeatureExtractor().save_pretrained wrote as preprocessor_config.json: transformers 5.23.0 with
# torchaudio 2.11.0, on 2026-11-27.
WRITTEN_WITH_TORCHAUDIO = """{
  "chunk_length": 30,
  "feature_extractor_type": "MusicgenMelodyFeatureExtractor",
  "feature_size": 12,
  "hop_length": 4096,
  "n_fft": 16384,
  "n_samples": 960000,
  "padding_side": "right",
  "padding_value": 0.0,
  "return_attention_mask": false,
  "sampling_rate": 32000,
  "stem_indices": [
    3,
    2
  ]
}"""


@pytest.fixture(scope="module", params=KINDS)
def source(request: pytest.FixtureRequest) -> Source:
    return opened(request.param)


@pytest.fixture(scope="module")
def state(source: Source) -> dict[str, Tensor]:
    """Weights that differ from the source's in every tensor, as after training."""
    torch.manual_seed(1)
    language_model = load_language_model(source).state_dict()
    return {name: tensor + 0.1 * torch.randn(tensor.shape) for name, tensor in language_model.items()}


@pytest.fixture(scope="module")
def exported(source: Source, state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves: its exports, its flags and a checkpoint."""
    folder = tmp_path_factory.mktemp("models")
    export_all(source, state, folder, SETTINGS)
    (folder / "config.json").write_text(json.dumps({"model_id": source.name}))
    save_checkpoint(folder, state, {"model_id": source.name})
    return folder


def save_checkpoint(folder: Path, state: dict[str, Tensor], flags: dict[str, object]) -> None:
    saver = Saver(folder / "checkpoints")
    saver.save(7, slices_of(state), replace(HEADER, flags=flags))
    saver.wait()


@pytest.mark.parametrize("place", PLACES)
def test_each_place_gives_the_model_that_was_exported(
    source: Source, state: dict[str, Tensor], exported: Path, place: str
) -> None:
    again = open_saved(str(exported / place))
    assert again.shape == replace(source.shape, name=again.name) and again.melody == source.melody
    assert_equal({name: again.weights[name] for name in again.weights if name.startswith(LANGUAGE_MODEL)}, state)
    assert again.codec_identity() == source.codec_identity() and again.text_identity() == source.text_identity()
    assert again.special_token == 2048 and again.generation_config.decoder_start_token_id == 2048
    started = start_from(source, find_starting_point(str(exported / place)))
    assert_equal({name: started.weights[name] for name in state}, state)


def test_transformers_gives_our_logits_bit_for_bit(source: Source, state: dict[str, Tensor], exported: Path) -> None:
    theirs, info = class_of(source).from_pretrained(exported / "huggingface", output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours = load_language_model(source)
    ours.load_state_dict(state)
    inputs, expected = their_inputs(source), our_logits(ours, source)
    assert torch.equal(their_logits(theirs, inputs), expected)
    if source.melody:
        other = inputs | {"input_features": inputs["input_features"].roll(1, dims=-1)}
        assert (their_logits(theirs, other) - expected).abs().max() > 1e-2


def class_of(source: Source) -> type:
    return MusicgenMelodyForConditionalGeneration if source.melody else MusicgenForConditionalGeneration


def their_inputs(source: Source) -> dict[str, Any]:
    inputs = dict(source.load_tokenizer()(CAPTION, return_tensors="pt"))
    inputs["decoder_input_ids"] = CODES[:, : source.codebooks].flatten(0, 1)
    return inputs | ({"input_features": nn.functional.one_hot(NOTES, 12).float()} if source.melody else {})


def their_logits(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model.eval()(**inputs, use_cache=False).logits
    return logits[None, :, -CODES.shape[-1] :]  # behind those of the melody and the text, in a melody model


def our_logits(model: LanguageModel, source: Source) -> Tensor:
    text = source.load_tokenizer()(CAPTION, return_tensors="pt")
    with torch.inference_mode():
        states = load_text_encoder(source)(**text).last_hidden_state
        melody = NOTES if source.melody else None
        return model.eval()(CODES[:, : source.codebooks], states, text.attention_mask.float(), melody_BC=melody)


def test_the_processors_file_is_what_its_class_writes(source: Source, exported: Path) -> None:
    content = json.loads((exported / "huggingface/preprocessor_config.json").read_text())
    tokenizer = json.loads((exported / "huggingface/tokenizer_config.json").read_text())
    name = "MusicgenMelodyProcessor" if source.melody else "MusicgenProcessor"
    assert content.pop("processor_class") == tokenizer["processor_class"] == name
    if source.melody:
        assert content == json.loads(WRITTEN_WITH_TORCHAUDIO)
    else:
        extractor = MusicgenProcessor.from_pretrained(exported / "huggingface").feature_extractor
        assert json.loads(extractor.to_json_string()) == content and extractor.feature_size == 2


def test_no_part_of_the_folder_needs_torchaudio(source: Source, exported: Path) -> None:
    assert "torchaudio" not in sys.modules
    again = open_model(str(exported / "huggingface"))
    assert again.load_feature_extractor().feature_size == source.channels


def test_the_pipeline_and_the_cards_code_make_stereo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = opened("debug-stereo")
    write_huggingface(
        source, source.weights.starting_with(*LANGUAGE_MODEL), tmp_path / "models/huggingface", "# a card\n"
    )
    music = pipeline("text-to-audio", model=str(tmp_path / "models/huggingface"))
    made = music("gentle piano", generate_kwargs={"max_new_tokens": 13, "do_sample": False})
    # Ten frames of 640 samples: three of thirteen steps go into the delays of the last pair.
    assert made["sampling_rate"] == 32_000 and made["audio"].shape == (2, 6400)
    assert made["audio"].std(axis=1).min() > 0 and (made["audio"][0] != made["audio"][1]).any()
    monkeypatch.chdir(tmp_path)
    shown = in_transformers("rock", channels=2, melody=False, model="models/huggingface")
    (code,) = re.findall(r"```python\n(.*?)```", shown, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace("10 * 50", "10"), names)
    assert names["audio"].shape == (1, 2, 6400)


@pytest.mark.parametrize(
    "kind,targets",
    [
        ("debug-melody", "v_proj,enc_to_dec_proj,audio_enc_to_dec_proj"),
        *((f"debug{end}", ALL_LAYERS) for end in KIND_ENDS),
    ],
)
@pytest.mark.full
def test_a_loras_adapter_loads_into_its_base_and_is_the_merged_model(kind: str, targets: str, tmp_path: Path) -> None:
    from peft import PeftModel

    source = opened(kind)
    config = Config(dataset_path="unused", lora_rank=4, lora_targets=targets)
    adapted = build_trained_model(source, model_settings(config))
    materialize(adapted.model, torch.device("cpu"))
    draw, adapters = torch.Generator().manual_seed(6), {}
    with torch.no_grad():
        for name, parameter in adapted.model.named_parameters():
            parameter.copy_(adapted.start[name])
            if ".lora_" in name:
                adapters[name] = parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
    export_all(source, adapters, tmp_path, replace(SETTINGS, selection=config.selection))
    write_huggingface(source, source.weights.starting_with(*LANGUAGE_MODEL), tmp_path / "base", "# a card\n")
    base = class_of(source).from_pretrained(tmp_path / "base")
    inputs, expected = their_inputs(source), our_logits(adapted.model, source)
    without = their_logits(base, inputs)
    with_adapter = their_logits(PeftModel.from_pretrained(base, tmp_path / "adapter"), inputs)
    merged = their_logits(class_of(source).from_pretrained(tmp_path / "huggingface"), inputs)
    assert (expected - without).abs().max() > 0.1
    assert (expected - with_adapter).abs().max() < 1e-4 and (expected - merged).abs().max() < 1e-4
    started = start_from(source, find_starting_point(str(tmp_path / "adapter")))
    assert (expected - our_logits(load_language_model(started), source)).abs().max() < 1e-4


def test_an_adapter_of_layers_that_the_base_has_not_is_refused(tmp_path: Path) -> None:
    made = {
        "debug": ("v_proj", "layers.0.encoder_attn.v_proj.weight of (128, 128), which is absent in the base"),
        "debug-melody": ("audio_enc_to_dec_proj", "audio_enc_to_dec_proj.weight of (128, 12), which is absent"),
    }
    for kind, (target, message) in made.items():
        config = Config(dataset_path="unused", lora_rank=4, lora_targets=target)
        assert config.selection.lora is not None
        start = build_trained_model(opened(kind), model_settings(config)).start
        adapters = {name: start[name] for name in start if ".lora_" in name}
        save_adapter(tmp_path, adapters, config.selection.lora, None)
        point = find_starting_point(str(tmp_path))
        assert start_from(opened(kind), point).melody == opened(kind).melody
        (other,) = made.keys() - {kind}
        with pytest.raises(ModelError, match=re.escape(message)):
            start_from(opened(other), point)
        wide = {name: torch.zeros(4, 99) if ".lora_A." in name else value for name, value in adapters.items()}
        with pytest.raises(ModelError, match=r"of \(128, 99\), which is \(128, \d+\) in the base; give --model_id"):
            start_from(opened(kind), replace(point, weights=weights_in_memory(wide)))


def test_a_learned_word_is_exported_beside_the_untouched_language_model(source: Source, tmp_path: Path) -> None:
    rows = torch.randn(3, 512, generator=torch.Generator().manual_seed(3))
    placeholder, digest = Placeholder(word="<my-style>", vectors=3), source.text_identity()
    embedding = TextEmbedding(placeholder=placeholder, rows_ND=rows, base_model=source.name, text_encoder=digest)
    export_text(source, embedding, tmp_path, card="# a card\n")
    again = open_saved(str(tmp_path / "huggingface"))
    assert again.probe() == source.probe() and again.melody == source.melody
    tokens = again.load_tokenizer()("slow <my-style> rock", return_tensors="pt")
    with torch.inference_mode():
        states = load_text_encoder(again)(**tokens).last_hidden_state
        plain = load_text_encoder(source)(**source.load_tokenizer()("slow rock", return_tensors="pt"))
    assert states.shape[1] == plain.last_hidden_state.shape[1] + 3
    _, info = class_of(source).from_pretrained(tmp_path / "huggingface", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


@pytest.mark.parametrize("mono", ["debug", pytest.param("debug-melody", marks=pytest.mark.full)])
def test_every_export_of_a_run_that_made_its_base_stereo_opens_as_a_stereo_model(mono: str, tmp_path: Path) -> None:
    source = in_stereo(opened(mono), "copied")
    torch.manual_seed(4)
    state = {name: value + torch.randn(value.shape) for name, value in load_language_model(source).state_dict().items()}
    export_all(source, state, tmp_path, SETTINGS)
    flags = {"model_id": mono, "stereo": True, "stereo_init": "copied"}
    (tmp_path / "config.json").write_text(json.dumps(flags))
    save_checkpoint(tmp_path, state, flags)
    for place in PLACES:
        for base in (None, mono) if place in ("lm_final.pt", PLACES[-1]) else (None,):
            again = open_saved(str(tmp_path / place), base=base)
            assert (again.channels, again.codebooks, again.melody) == (2, 8, source.melody), (place, base)
            assert_equal({name: again.weights[name] for name in state}, state)
            assert again.weights.starting_with(*LANGUAGE_MODEL).keys() == state.keys()


def test_the_frozen_parts_of_a_run_that_made_its_base_stereo_are_the_bases(tmp_path: Path) -> None:
    source = in_stereo(opened("debug"), "copied")
    base = load_language_model(source).state_dict()
    trained = {name: value + 1 for name, value in base.items() if ".layers." not in name and "_proj." not in name}
    flags = {"model_id": "debug", "stereo": True, "stereo_init": "copied", "freeze": "layers.0-1,projection"}
    saver = Saver(tmp_path / "checkpoints")
    saver.save(7, slices_of(trained), replace(HEADER, identity={"frozen weights": source.probe()}, flags=flags))
    saver.wait()
    again = open_saved(str(tmp_path / "checkpoints/step-00000007"))
    assert_equal({name: again.weights[name] for name in base}, base | trained)


def test_a_start_of_another_kind_is_refused_with_both(source: Source, exported: Path) -> None:
    words = {"debug": "mono text", "debug-stereo": "stereo text"}
    words |= {"debug-melody": "mono melody", "debug-stereo-melody": "stereo melody"}
    for place in PLACES:
        point = find_starting_point(str(exported / place))
        for other in words.keys() - {source.name}:
            both = f"it is a {words[source.name]} model, the base is a {words[other]} model"
            with pytest.raises(ModelError, match=both):
                start_from(opened(other), point)


def test_a_language_model_of_another_kind_is_refused(source: Source, exported: Path) -> None:
    other = "debug" if source.melody else "debug-melody"
    with pytest.raises(ModelError, match=f"is not a language model of the size of {other}"):
        open_saved(str(exported / "lm_final.pt"), base=other)


def test_audiocrafts_files_say_which_kind_they_are(source: Source, exported: Path) -> None:
    read = read_audiocraft(exported / "audiocraft")
    assert read.config is not None
    assert (read.config.melody, read.config.audio_channels) == (source.melody, source.channels)
    readme = (exported / "audiocraft/README.md").read_text()
    assert ("needs torchaudio, librosa and demucs" in readme) is source.melody
    assert "mlx-examples cannot use it" in readme and not (exported / "audiocraft/config.json").exists()
