"""What we export, loaded by the real audiocraft: every tensor, the logits, the tokens, the sound."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    MusicgenDecoderConfig,
    MusicgenForCausalLM,
    MusicgenForConditionalGeneration,
    MusicgenProcessor,
)

from tests.interop.audiocraft_modules import require_audiocraft
from trainer.exports.audiocraft_config import lm_config
from trainer.exports.audiocraft_files import read_audiocraft
from trainer.exports.audiocraft_names import CONDITIONER, lm_to_audiocraft
from trainer.exports.export import ExportSettings, export_all
from trainer.flags.config import Config
from trainer.model.language_model import LanguageModel, load_language_model, materialize
from trainer.model.source import Source, load_codec, load_text_encoder, open_model
from trainer.model.trained_model import build_trained_model
from trainer.wiring import model_settings

require_audiocraft()

from omegaconf import OmegaConf

from tests.interop.audiocraft_models import build_from, build_lm, conditions, lm_without_text, load_exported

FRAMES = 50
# Greedy tokens of a random model with weak text conditioning would not depend on the caption.
TEXT_GAIN = 8.0


@pytest.fixture(scope="module")
def source() -> Source:
    return open_model("debug")


@pytest.fixture(scope="module")
def model(source: Source) -> LanguageModel:
    """Ours, with weights that differ from the source's in every tensor."""
    torch.manual_seed(3)
    model = load_language_model(source).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape))
    model.enc_to_dec_proj.weight.mul_(TEXT_GAIN)
    return model


@pytest.fixture(scope="module")
def exported(source: Source, model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    export_all(source, model.state_dict(), folder, ExportSettings(card="", segment_seconds=30.0, cfg_dropout=0.1))
    return folder


@pytest.fixture(scope="module")
def musicgen(exported: Path) -> Any:
    """audiocraft's MusicGen of the exported folder, on the CPU."""
    return load_exported(exported / "audiocraft")


@pytest.mark.parametrize("codebooks", [4, 8])
@pytest.mark.parametrize(
    ("width", "heads", "layers"),
    [(1024, 16, 24), (1536, 24, 48), (2048, 32, 48)],
    ids=["small", "medium", "large"],
)
def test_names_and_shapes_are_audiocrafts(codebooks: int, width: int, heads: int, layers: int) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    config = MusicgenDecoderConfig(
        hidden_size=width,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        ffn_dim=4 * width,
        num_codebooks=codebooks,
    )
    with torch.device("meta"):
        ours = LanguageModel(MusicgenForCausalLM._from_config(config), torch.nn.Linear(768, width))
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    with FakeTensorMode():
        converted = lm_to_audiocraft({name: torch.empty(shape) for name, shape in shapes.items()})
    exported = {name: tensor.shape for name, tensor in converted.items()}
    projection = {f"{CONDITIONER}.output_proj.{part}" for part in ("weight", "bias")}
    expected = lm_without_text(codebooks, width, layers, heads)
    assert {name: shape for name, shape in exported.items() if name not in projection} == expected
    assert exported.keys() == expected.keys() | projection


def test_lm_final_loads_into_audiocrafts_language_model(
    source: Source, exported: Path, musicgen: Any, tmp_path: Path
) -> None:
    other = build_lm(source, load_language_model(source).state_dict(), tmp_path)
    answer = other.load_state_dict(torch.load(exported / "lm_final.pt"))
    assert str(answer) == "<All keys matched successfully>"
    loaded = musicgen.lm.state_dict()
    assert loaded.keys() == other.state_dict().keys()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in other.state_dict().items())


@pytest.mark.parametrize("efficient", [True, False], ids=["efficient", "mha"])
def test_a_file_that_audiocraft_wrote_reads_back_bit_for_bit(
    model: LanguageModel, musicgen: Any, exported: Path, tmp_path: Path, efficient: bool
) -> None:
    config = copy.deepcopy(musicgen.lm.cfg)
    config.transformer_lm.memory_efficient = efficient
    lm = build_from(config, exported / "audiocraft")
    lm.load_state_dict(musicgen.lm.state_dict())
    theirs = lm.state_dict()
    assert any(".mha." in name for name in theirs) is not efficient
    # As audiocraft.utils.export.export_lm writes it, which cannot run on this torch.
    package = {"best_state": theirs, "xp.cfg": OmegaConf.to_yaml(config), "exported": True}
    torch.save(package, tmp_path / "state_dict.bin")
    read = read_audiocraft(tmp_path)
    ours = model.state_dict()
    assert read.state.keys() == ours.keys()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in read.state.items())
    assert read.config is not None and (read.config.heads, read.config.delays) == (4, (0, 1, 2, 3))


@pytest.mark.numbers
@pytest.mark.parametrize("caption", ["epic orchestral music with a choir", "rock", None])
def test_logits_agree(source: Source, model: LanguageModel, musicgen: Any, caption: str | None) -> None:
    codes_BKT = torch.randint(0, 2049, (2, 4, 40), generator=torch.Generator().manual_seed(4))
    text_BSD, mask_BS = _text(source, caption, rows=2)
    with torch.inference_mode():
        theirs = musicgen.lm(codes_BKT, conditions([caption] * 2))
        ours = model(codes_BKT, text_BSD, mask_BS, None)
    assert theirs.std() > 0.1
    assert (ours - theirs).abs().max() < 1e-4


@pytest.mark.numbers
def test_a_merged_lora_in_audiocraft_has_the_logits_of_base_and_adapter(source: Source, tmp_path: Path) -> None:
    config = Config(dataset_path="unused", lora_rank=4)
    adapted = build_trained_model(source, model_settings(config))
    materialize(adapted.model, torch.device("cpu"))
    draw, adapters = torch.Generator().manual_seed(6), {}
    with torch.no_grad():
        for name, parameter in adapted.model.named_parameters():
            parameter.copy_(adapted.start[name])
            if ".lora_" in name:
                adapters[name] = parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
    settings = ExportSettings(card="", segment_seconds=30.0, cfg_dropout=0.0, selection=config.selection)
    export_all(source, adapters, tmp_path, settings)
    codes_BKT = torch.randint(0, 2049, (2, 4, 40), generator=draw)
    with torch.inference_mode():
        theirs = load_exported(tmp_path / "audiocraft").lm(codes_BKT, conditions(["epic rock"] * 2))
        ours = adapted.model.eval()(codes_BKT, *_text(source, "epic rock", rows=2), None)
        without = load_language_model(source).eval()(codes_BKT, *_text(source, "epic rock", rows=2), None)
    assert (ours - without).abs().max() > 0.1
    assert (ours - theirs).abs().max() < 1e-4


def test_captions_change_the_logits(model: LanguageModel, source: Source) -> None:
    """Without this, equal logits would say nothing about the conditioning."""
    codes_BKT = torch.zeros(1, 4, 8, dtype=torch.int64)
    with torch.inference_mode():
        rock = model(codes_BKT, *_text(source, "rock"), None)
        null = model(codes_BKT, *_text(source, None), None)
    assert (rock - null).abs().max() > 0.1


@pytest.mark.numbers
@pytest.mark.parametrize("captions", [["epic rock"], ["epic rock", "slow jazz"]], ids=["one", "two"])
def test_greedy_tokens_and_sound_with_guidance_are_the_same(
    exported: Path, musicgen: Any, captions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captions of one length: padded text is where the two differ, because audiocraft attends to padding."""
    musicgen.set_generation_params(use_sampling=False, cfg_coef=3.0, duration=FRAMES / 50)
    their_sound, their_codes = musicgen.generate(captions, return_tokens=True)

    generator = MusicgenForConditionalGeneration.from_pretrained(exported / "huggingface")
    processor = MusicgenProcessor.from_pretrained(exported / "huggingface")
    text = processor(text=captions, padding=True, return_tensors="pt")
    assert text.attention_mask.all()
    decoded: list[Tensor] = []
    decode = generator.audio_encoder.decode

    def listen(audio_codes: Tensor, *rest: Any, **named: Any) -> Any:
        decoded.append(audio_codes)
        return decode(audio_codes, *rest, **named)

    monkeypatch.setattr(generator.audio_encoder, "decode", listen)
    # Three steps more than frames: the delays of the last codebook.
    our_sound = generator.generate(**text, do_sample=False, guidance_scale=3.0, max_new_tokens=FRAMES + 3)
    assert torch.equal(decoded[0][0], their_codes)
    assert len(their_codes.unique()) > FRAMES // 2
    if len(captions) == 2:
        assert not torch.equal(their_codes[0], their_codes[1])
    assert torch.allclose(our_sound, their_sound, atol=1e-6)


@pytest.mark.numbers
def test_codec_gives_the_same_codes_and_sound(source: Source, musicgen: Any) -> None:
    codec = load_codec(source)
    sound_BCT = 0.3 * torch.randn(2, 1, 32_000, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        their_codes, scale = musicgen.compression_model.encode(sound_BCT)
        ours = codec.encode(sound_BCT).audio_codes
        their_sound = musicgen.compression_model.decode(their_codes)
        our_sound = codec.decode(ours, [None]).audio_values
    assert scale is None
    assert torch.equal(ours[0], their_codes) and len(their_codes.unique()) > 100
    assert torch.equal(our_sound, their_sound)


def test_longest_duration_is_the_segment_of_training(musicgen: Any) -> None:
    assert musicgen.max_duration == 30.0
    assert musicgen.lm.cfg.classifier_free_guidance.training_dropout == 0.1


def test_a_short_segment_still_loads_in_audiocraft(source: Source) -> None:
    # get_pretrained raises where the longest duration is not above its default stride of 18 s
    config = lm_config(source.config, text_encoder_name="t5-small", segment_seconds=4.0, cfg_dropout=0.0)
    assert OmegaConf.create(config)["dataset"]["segment_duration"] == 30.0


def _text(source: Source, caption: str | None, rows: int = 1) -> tuple[Tensor, Tensor]:
    """States (rows, S, D) and mask (rows, S) of one caption; a null condition has a mask of zeros."""
    tokens = source.load_tokenizer()(caption or "", return_tensors="pt")
    with torch.inference_mode():
        states = load_text_encoder(source)(**tokens).last_hidden_state
    mask = tokens.attention_mask.float() * (caption is not None)
    return states.expand(rows, -1, -1), mask.expand(rows, -1)
