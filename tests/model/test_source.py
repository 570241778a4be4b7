"""Models by name and folder: what their parts are known by, and what is missing."""

from __future__ import annotations

import copy
import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from trainer.errors import ModelError
from trainer.exports.init_from import find_starting_point, start_from
from trainer.exports.saved_models import open_saved
from trainer.model.debug_model import build_debug_model, debug_feature_extractor, debug_tokenizer
from trainer.model.source import CODEC, TEXT_ENCODER, open_model, source_of


@pytest.fixture(scope="module")
def source():
    return open_model("debug")


def changed(source, prefix):
    weights = dict(source.weights)
    name = next(name for name in weights if name.startswith(prefix) and weights[name].is_floating_point())
    weights[name] = torch.nextafter(weights[name], torch.full_like(weights[name], torch.inf))
    return replace(source, weights=weights)


def test_any_weight_of_a_part_changes_its_identity_and_no_other(source):
    other = changed(source, CODEC)
    assert other.codec_identity() != source.codec_identity() and other.text_identity() == source.text_identity()
    other = changed(source, TEXT_ENCODER)
    assert other.codec_identity() == source.codec_identity() and other.text_identity() != source.text_identity()


@pytest.mark.parametrize("setting,value", [("pad_mode", "constant"), ("target_bandwidths", [1.1])])
def test_a_codec_of_equal_weights_that_gives_other_codes_has_another_identity(source, setting, value):
    config = copy.deepcopy(source.config)
    setattr(config.audio_encoder, setting, value)
    assert replace(source, config=config).codec_identity() != source.codec_identity()


def test_a_tokenizer_that_splits_differently_changes_the_text_identity(source):
    tokenizer = debug_tokenizer()
    tokenizer.add_tokens(["fox"])
    assert replace(source, load_tokenizer=lambda: tokenizer).text_identity() != source.text_identity()


def test_a_saved_model_has_the_identities_of_the_one_in_memory(source, tmp_path):
    build_debug_model().save_pretrained(tmp_path)
    debug_tokenizer().save_pretrained(tmp_path)
    debug_feature_extractor().save_pretrained(tmp_path)
    saved = open_model(str(tmp_path))
    assert saved.codec_identity() == source.codec_identity()
    assert saved.text_identity() == source.text_identity()
    assert source_of(build_debug_model(), name="debug").codec_identity() == source.codec_identity()


def test_a_folder_without_its_processor_is_refused_with_what_it_lacks(tmp_path):
    build_debug_model().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"lacks tokenizer.json and preprocessor_config.json: save the base model"):
        open_model(str(tmp_path))
    debug_feature_extractor().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"lacks tokenizer.json: "):
        open_model(str(tmp_path))
    debug_tokenizer().save_pretrained(tmp_path)
    assert len(open_model(str(tmp_path)).load_tokenizer()) == len(debug_tokenizer())


def test_a_melody_model_whose_codec_has_other_frames_is_refused(tmp_path):
    model = build_debug_model(melody=True)
    model.config.audio_encoder.sampling_rate = 24_000
    model.config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="24000 Hz and 640 samples a frame: only melody models of 32000 Hz"):
        open_model(str(tmp_path))


def test_a_folder_of_the_hub_cache_opens_its_snapshot(source, tmp_path):
    snapshot = tmp_path / "models--me--tiny/snapshots" / (40 * "a")
    build_debug_model().save_pretrained(snapshot)
    debug_tokenizer().save_pretrained(snapshot)
    debug_feature_extractor().save_pretrained(snapshot)
    (tmp_path / "models--me--tiny/refs").mkdir()
    (tmp_path / "models--me--tiny/refs/main").write_text(40 * "a")
    named = str(tmp_path / "models--me--tiny")
    for found in (open_model(named), open_saved(named), start_from(source, find_starting_point(named))):
        assert found.probe() == source.probe()


class NoSuchRepository(BaseHTTPRequestHandler):
    """What the hub answers for a repository that it does not have (huggingface_hub 1.x reads the headers)."""

    def do_GET(self):
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *arguments):
        pass


def test_an_unknown_name_is_told_so_and_then_what_the_hub_said(monkeypatch, tmp_path):
    with ThreadingHTTPServer(("127.0.0.1", 0), NoSuchRepository) as hub:
        threading.Thread(target=hub.serve_forever).start()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        with pytest.raises(ModelError) as caught:
            open_model("meduim")
        hub.shutdown()
    words = ("no folder of this name here", "none of small, medium", "did you mean medium?", "404", "Not Found")
    assert all(word in str(caught.value) for word in words), caught.value
    assert "Give one of these names" in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors.index.json", "model.safetensors", "config.json"])
def test_a_file_cut_short_is_named(tmp_path, name):
    build_debug_model().save_pretrained(tmp_path, max_shard_size="20MB")
    debug_tokenizer().save_pretrained(tmp_path)
    debug_feature_extractor().save_pretrained(tmp_path)
    path = tmp_path / name
    if not path.exists():  # one file where there were shards
        for shard in tmp_path.glob("model*"):
            shard.unlink()
        build_debug_model().save_pretrained(tmp_path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ModelError, match=rf"cannot be read|no readable {name}|cannot be read.*{name}"):
        source = open_model(str(tmp_path))
        source.load_tokenizer()


def test_the_debug_model_does_not_depend_on_the_number_of_threads():
    before, identities = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            identities.append(source_of(build_debug_model(), name="debug").codec_identity())
    finally:
        torch.set_num_threads(before)
    assert identities[0] == identities[1]


def save(model, folder, extractor=None, **how):
    model.save_pretrained(folder, **how)
    debug_tokenizer().save_pretrained(folder)
    if extractor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(extractor))


# What the published stereo models have as preprocessor_config.json.
PUBLISHED_STEREO = {
    "chunk_length_s": None,
    "feature_extractor_type": "EncodecFeatureExtractor",
    "feature_size": 2,
    "overlap": None,
    "padding_side": "left",
    "padding_value": 0.0,
    "processor_class": "MusicgenProcessor",
    "return_attention_mask": True,
    "sampling_rate": 32000,
}


def test_a_stereo_folder_opens_with_the_feature_extractor_of_the_published_ones(tmp_path):
    save(build_debug_model(stereo=True), tmp_path, PUBLISHED_STEREO)
    source = open_model(str(tmp_path))
    assert (source.channels, source.codebooks, source.melody) == (2, 8, False)
    assert source.probe() == open_model("debug-stereo").probe()
    assert source.load_feature_extractor().feature_size == 2


# MusicgenMelodyFeatureExtractor cannot be made where torchaudio is not installed, as here.
@pytest.mark.parametrize("extractor", [None, {"feature_extractor_type": "MusicgenMelodyFeatureExtractor"}])
@pytest.mark.parametrize("stereo", [False, True])
def test_a_melody_folder_opens_without_torchaudio_and_whatever_its_feature_extractor(tmp_path, extractor, stereo):
    save(build_debug_model(stereo=stereo, melody=True), tmp_path, extractor)
    source = open_model(str(tmp_path))
    assert source.melody and source.channels == 1 + stereo
    assert source.probe() == open_model("debug-stereo-melody" if stereo else "debug-melody").probe()
    assert "audio_enc_to_dec_proj.weight" in source.weights
    assert source.load_feature_extractor().feature_size == source.channels


def test_a_melody_folder_without_a_tokenizer_is_refused(tmp_path):
    build_debug_model(melody=True).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"lacks tokenizer.json: "):
        open_model(str(tmp_path))


@pytest.mark.parametrize("kind", ["debug-stereo", "debug-melody"])
def test_a_folder_with_pickled_weights_opens_too(tmp_path, kind):
    """As folders of before safetensors are, with their weights of the convolutions under torch's former names."""
    model = build_debug_model(stereo="stereo" in kind, melody="melody" in kind)
    save(model, tmp_path, PUBLISHED_STEREO)
    (tmp_path / "model.safetensors").unlink()
    former = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    tensors = dict(model.state_dict())
    for now, then in former.items():
        tensors = {name.replace(now, then): value for name, value in tensors.items()}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    saved, source = open_model(str(tmp_path)), open_model(kind)
    assert saved.probe() == source.probe() and saved.codec_identity() == source.codec_identity()
    assert saved.text_identity() == source.text_identity()


@pytest.mark.parametrize(
    ("kind", "part", "setting", "value", "refused"),
    [
        ("debug-stereo", "decoder", "num_codebooks", 6, "of 6 codebooks, and its EnCodec makes 4 of each channel: 8"),
        ("debug-stereo", "decoder", "audio_channels", 3, "no readable config.json .*got 3 channels"),
        ("debug", "audio_encoder", "audio_channels", 2, "its EnCodec of 2: only mono and stereo models are known"),
        ("debug-melody", None, "chroma_length", 100, "its melodies are 100 places of 12 notes: .* 235 places of 12"),
        ("debug-melody", None, "num_chroma", 24, "its melodies are 235 places of 24 notes"),
    ],
)
def test_what_no_published_model_has_is_refused(tmp_path, kind, part, setting, value, refused):
    save(build_debug_model(stereo="stereo" in kind, melody="melody" in kind), tmp_path, PUBLISHED_STEREO)
    config = json.loads((tmp_path / "config.json").read_text())
    (config if part is None else config[part])[setting] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"(?s)--model_id {tmp_path}: .*{refused}"):
        open_model(str(tmp_path))
