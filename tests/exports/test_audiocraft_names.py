"""Tensors under audiocraft's names: all of them, there and back bit for bit, and what is missing is named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import MusicgenDecoderConfig, MusicgenForCausalLM

from tests.exports.comparison import assert_equal
from trainer.errors import ModelError
from trainer.exports.audiocraft_files import read_audiocraft
from trainer.exports.audiocraft_names import (
    WINDOW,
    codec_from_audiocraft,
    codec_to_audiocraft,
    lm_from_audiocraft,
    lm_to_audiocraft,
)
from trainer.model.language_model import LanguageModel, load_language_model
from trainer.model.source import Source, load_codec, open_model


# Keys and millions of parameters of Meta's models: audiocraft 1.3.0's LMModel built at these sizes.
@pytest.mark.parametrize(
    ("width", "heads", "layers", "codebooks", "keys", "millions"),
    [
        pytest.param(1024, 16, 24, 4, 300, 420.4, id="small"),
        pytest.param(1536, 24, 48, 4, 588, 1838.7, id="medium"),
        pytest.param(2048, 32, 48, 4, 588, 3257.0, id="large"),
        pytest.param(1024, 16, 24, 8, 308, 437.2, id="stereo-small"),
        pytest.param(1536, 24, 48, 8, 596, 1863.9, id="stereo-medium"),
        pytest.param(2048, 32, 48, 8, 596, 3290.5, id="stereo-large"),
    ],
)
def test_published_sizes_have_audiocrafts_keys_and_parameters(
    width: int, heads: int, layers: int, codebooks: int, keys: int, millions: float
) -> None:
    config = MusicgenDecoderConfig(
        hidden_size=width,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        ffn_dim=4 * width,
        num_codebooks=codebooks,
    )
    with torch.device("meta"):
        model = LanguageModel(MusicgenForCausalLM._from_config(config), torch.nn.Linear(768, width))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    with FakeTensorMode():
        ours = {name: torch.empty(shape) for name, shape in shapes.items()}
        theirs = lm_to_audiocraft(ours)
        back = lm_from_audiocraft(theirs)
    assert len(theirs) == keys
    assert sum(tensor.numel() for tensor in theirs.values()) / 1e6 == pytest.approx(millions, abs=0.051)
    assert {name: tensor.shape for name, tensor in back.items()} == shapes


def test_language_model_survives_the_way_there_and_back_bit_for_bit(state: dict[str, Tensor]) -> None:
    theirs = lm_to_audiocraft(state)
    assert_equal(lm_from_audiocraft(theirs), state)
    for tensor in theirs.values():
        assert tensor.is_contiguous() and tensor.untyped_storage().nbytes() == 4 * tensor.numel()


def test_codec_survives_the_way_there_and_back_bit_for_bit(source: Source) -> None:
    ours = load_codec(source).state_dict()
    theirs = codec_to_audiocraft(ours)
    assert len(theirs) == len(ours) == 116
    assert_equal(codec_from_audiocraft(theirs), ours)


def test_prefixes_of_wrappers_are_taken_off(state: dict[str, Tensor]) -> None:
    wrapped = {
        f"module.{name}".replace("layers.0.", "layers.0._orig_mod._fsdp_wrapped_module."): tensor
        for name, tensor in state.items()
    }
    assert_equal(lm_to_audiocraft(wrapped), lm_to_audiocraft(state))


def test_names_of_audiocrafts_plain_attention_are_read(state: dict[str, Tensor]) -> None:
    theirs = lm_to_audiocraft(state)
    plain = {name.replace("_attn.", "_attn.mha.").replace("cross_attention.", "cross_attention.mha."): tensor
             for name, tensor in theirs.items()}  # fmt: skip
    assert any(".mha." in name for name in plain)
    assert_equal(lm_from_audiocraft(plain), state)


def test_missing_and_unknown_tensors_are_named(state: dict[str, Tensor]) -> None:
    lost = "decoder.model.decoder.layers.1.fc1.weight"
    with pytest.raises(ModelError, match=rf"lacks {re.escape(lost)}"):
        lm_to_audiocraft({name: tensor for name, tensor in state.items() if name != lost})
    with pytest.raises(ModelError, match=r"unknown audio_enc_to_dec_proj\.weight"):
        lm_to_audiocraft(state | {"audio_enc_to_dec_proj.weight": torch.zeros(1)})
    with pytest.raises(ModelError, match=r"unknown .*self_wav"):
        theirs = lm_to_audiocraft(state)
        lm_from_audiocraft(theirs | {"condition_provider.conditioners.self_wav.output_proj.bias": torch.zeros(1)})
    with pytest.raises(ModelError, match=r"more than a description and a melody's chroma .*feat.*MusicGen-Style"):
        lm_from_audiocraft(theirs | {"condition_provider.conditioners.self_wav.feat_extractor.weight": torch.zeros(1)})
    with pytest.raises(ModelError, match=r"encoder\.fc"):
        codec_to_audiocraft({"encoder.fc.weight": torch.zeros(1)})


def test_a_melody_model_heard_through_another_window_is_refused(tmp_path: Path) -> None:
    state = lm_to_audiocraft(load_language_model(open_model("debug-melody")).state_dict())
    assert torch.equal(state[WINDOW], torch.hann_window(16_384))
    torch.save(state | {WINDOW: torch.hamming_window(16_384)}, tmp_path / "hamming.pt")
    torch.save(state | {WINDOW: torch.hann_window(8192)}, tmp_path / "short.pt")
    for name, shape in (("hamming", 16_384), ("short", 8192)):
        with pytest.raises(ModelError, match=rf"another window .*\({shape},\)\) than MusicGen's"):
            read_audiocraft(tmp_path / f"{name}.pt")
    # As models are that were saved by other programs, where nothing needs it.
    torch.save({name: tensor for name, tensor in state.items() if name != WINDOW}, tmp_path / "none.pt")
    assert read_audiocraft(tmp_path / "none.pt").state.keys() == lm_from_audiocraft(state).keys()


def test_a_melody_model_without_its_projection_is_told_what_it_lacks() -> None:
    state = dict(load_language_model(open_model("debug-melody")).state_dict())
    with pytest.raises(ModelError, match=r"lacks audio_enc_to_dec_proj\.bias"):
        lm_to_audiocraft({name: value for name, value in state.items() if name != "audio_enc_to_dec_proj.bias"})
