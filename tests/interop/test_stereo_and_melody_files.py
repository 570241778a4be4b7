"""What we export of stereo and melody models, loaded by the real audiocraft: every tensor, the codec, the logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from transformers import MusicgenMelodyDecoderConfig, MusicgenMelodyForCausalLM

from tests.exports.comparison import assert_equal
from tests.interop.audiocraft_modules import require_audiocraft
from trainer.exports.audiocraft_config import CONFIG
from trainer.exports.audiocraft_files import CODEC_FILE, LM_FILE, read_audiocraft, read_codec
from trainer.exports.audiocraft_names import (
    CONDITIONER,
    MELODY_CONDITIONER,
    WINDOW,
    lm_from_audiocraft,
    lm_to_audiocraft,
)
from trainer.exports.export import ExportSettings, export_all
from trainer.exports.saved_models import open_saved
from trainer.model.language_model import LanguageModel, load_language_model
from trainer.model.source import Source, load_codec, load_text_encoder, open_model
from trainer.spec.shapes import MELODY_PLACES

require_audiocraft()

from audiocraft.models.lm import LMModel
from audiocraft.modules.conditioners import ConditioningAttributes, WavCondition
from omegaconf import OmegaConf

from tests.interop.audiocraft_models import build_from, load_exported
from tests.interop.melody_stand_ins import stand_ins

KINDS = ("debug-stereo", "debug-melody", "debug-stereo-melody")
RATE, CAPTION = 32_000, "epic orchestral music with a choir"


@pytest.fixture(scope="module", params=KINDS)
def source(request: pytest.FixtureRequest) -> Source:
    return open_model(request.param)


@pytest.fixture(scope="module")
def model(source: Source) -> LanguageModel:
    """Ours, with weights that differ from the source's in every tensor, and conditions that are heard."""
    torch.manual_seed(3)
    model = load_language_model(source).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape))
    model.enc_to_dec_proj.weight.mul_(8)
    if model.audio_enc_to_dec_proj is not None:
        model.audio_enc_to_dec_proj.weight.mul_(4)
    return model


@pytest.fixture(scope="module")
def exported(source: Source, model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    settings = ExportSettings(card="", segment_seconds=10.0, cfg_dropout=0.1, melody_rate=0.25)
    export_all(source, model.state_dict(), folder, settings)
    return folder


@pytest.fixture(scope="module")
def musicgen(exported: Path) -> Any:
    """audiocraft's MusicGen of the exported folder, on the CPU."""
    with stand_ins():
        return load_exported(exported / "audiocraft")


def test_get_pretrained_and_lm_final_load_every_tensor(source: Source, exported: Path, musicgen: Any) -> None:
    loaded = musicgen.lm.state_dict()
    with stand_ins():
        other = build_from(musicgen.lm.cfg, exported / "audiocraft")
    answer = other.load_state_dict(torch.load(exported / "lm_final.pt"))  # strict
    assert str(answer) == "<All keys matched successfully>"
    assert_equal(dict(other.state_dict()), dict(loaded))
    assert (WINDOW in loaded) is source.melody
    if source.melody:
        assert torch.equal(loaded[WINDOW], torch.hann_window(16_384))


def test_what_audiocraft_saves_reads_back_bit_for_bit(
    source: Source, model: LanguageModel, musicgen: Any, tmp_path: Path
) -> None:
    """As audiocraft.utils.export.export_lm writes it, which cannot run on this torch; and in half precision."""
    package = {"best_state": musicgen.lm.state_dict(), "xp.cfg": OmegaConf.to_yaml(musicgen.lm.cfg), "exported": True}
    torch.save(package, tmp_path / LM_FILE)
    assert_equal(read_audiocraft(tmp_path).state, model.state_dict())
    half = {name: tensor.half() for name, tensor in package["best_state"].items()}
    torch.save(package | {"best_state": half}, tmp_path / LM_FILE)
    assert_equal(read_audiocraft(tmp_path).state, {name: tensor.half() for name, tensor in model.state_dict().items()})


def test_its_configuration_says_what_the_run_dropped_and_which_sound_it_makes(source: Source, musicgen: Any) -> None:
    config = musicgen.lm.cfg
    assert musicgen.max_duration == 30.0 and config.classifier_free_guidance.training_dropout == 0.1
    assert musicgen.compression_model.channels == source.channels
    assert list(musicgen.lm.pattern_provider.delays) == [k // source.channels for k in range(source.codebooks)]
    if source.melody:
        assert musicgen.lm.att_dropout.p["wav"]["self_wav"] == 0.25
        assert musicgen.lm.condition_provider.conditioners["self_wav"].chroma_len == MELODY_PLACES


@pytest.mark.numbers
def test_logits_agree(source: Source, model: LanguageModel, musicgen: Any) -> None:
    codes_BKT = torch.randint(0, 2049, (1, source.codebooks, 40), generator=torch.Generator().manual_seed(4))
    tokens = source.load_tokenizer()(CAPTION, return_tensors="pt")
    with torch.inference_mode():
        states = load_text_encoder(source)(**tokens).last_hidden_state
        theirs = musicgen.lm(codes_BKT, conditions(source, musicgen.lm))
        inputs = (codes_BKT, states, tokens.attention_mask.float())
        melody_BC = notes(musicgen.lm) if source.melody else None
        ours = model(*inputs, melody_BC=melody_BC)
        if melody_BC is not None:  # without this, equal logits would say nothing about the melody
            assert (ours - model(*inputs, melody_BC=torch.zeros_like(melody_BC))).abs().max() > 1e-2
    assert theirs.std() > 0.1 and (ours - theirs).abs().max() < 1e-4


def sound() -> Tensor:
    """30 s (1, 1, samples) of two notes in turns, an octave's C and G."""
    time = torch.arange(30 * RATE) / RATE
    pitch = torch.where(time % 2 < 1, 261.63, 392.0)
    return 0.3 * torch.sin(2 * torch.pi * pitch * time)[None, None]


def conditions(source: Source, lm: LMModel) -> list[ConditioningAttributes]:
    attributes = ConditioningAttributes(text={"description": CAPTION})
    if source.melody:
        conditioner: Any = lm.condition_provider.conditioners["self_wav"]
        conditioner._get_stemmed_wav = lambda wav, sample_rate: wav
        attributes.wav["self_wav"] = WavCondition(sound(), torch.tensor([sound().shape[-1]]), [RATE], [None], [])
    return [attributes]


def notes(lm: LMModel) -> Tensor:
    conditioner: Any = lm.condition_provider.conditioners["self_wav"]
    heard: Tensor = conditioner.chroma(sound()[0]).argmax(dim=-1)
    assert heard.shape == (1, MELODY_PLACES) and {0, 7} <= set(heard.flatten().tolist())  # C and G
    return heard


@pytest.mark.numbers
def test_codec_gives_the_same_codes_and_sound_per_channel(source: Source, musicgen: Any) -> None:
    codec = load_codec(source)
    sound_BCT = 0.3 * torch.randn(2, source.channels, RATE, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        their_codes, _ = musicgen.compression_model.encode(sound_BCT)
        ours = [codec.encode(sound_BCT[:, [channel]]).audio_codes[0] for channel in range(source.channels)]
        their_sound = musicgen.compression_model.decode(their_codes)
        heard = [codec.decode(codes[None], [None]).audio_values for codes in ours]
    assert torch.equal(torch.stack(ours, dim=2).flatten(1, 2), their_codes) and len(their_codes.unique()) > 100
    assert torch.equal(torch.cat(heard, dim=1), their_sound)


def test_a_folder_written_for_audiocraft_is_a_source_like_the_one_it_came_from(source: Source, exported: Path) -> None:
    again = open_saved(str(exported / "audiocraft"))
    config, _ = read_codec(exported / "audiocraft" / CODEC_FILE)
    assert config.audio_channels == 1  # one EnCodec for both channels
    for part in ("decoder", "audio_encoder"):
        was, now = (getattr(each.config, part).to_dict() for each in (source, again))
        changed = {key for key in was | now if was.get(key) != now.get(key)}
        assert changed <= {"dtype", "architectures", "transformers_version", "dropout", "decoder_start_token_id"}, part


@pytest.mark.parametrize("stereo", [False, True], ids=["mono", "stereo"])
@pytest.mark.parametrize(("width", "heads", "layers"), [(1536, 24, 48), (2048, 32, 48)], ids=["melody", "melody-large"])
def test_names_and_shapes_of_the_published_melody_models_are_audiocrafts(
    stereo: bool, width: int, heads: int, layers: int
) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    codebooks = 8 if stereo else 4
    config = MusicgenMelodyDecoderConfig(
        hidden_size=width,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        ffn_dim=4 * width,
        num_codebooks=codebooks,
    )
    with torch.device("meta"):
        decoder = MusicgenMelodyForCausalLM._from_config(config)
        ours = LanguageModel(decoder, nn.Linear(768, width), nn.Linear(12, width))
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    with FakeTensorMode():
        converted = lm_to_audiocraft({name: torch.empty(shape) for name, shape in shapes.items()})
        back = lm_from_audiocraft(converted)
    assert {name: tensor.shape for name, tensor in back.items()} == shapes
    parts = [f"output_proj.{part}" for part in ("weight", "bias")]
    projections = {f"{each}.{part}" for each in (CONDITIONER, MELODY_CONDITIONER) for part in parts}
    expected = lm_without_conditioners(codebooks, width, layers, heads)
    found = {name: tensor.shape for name, tensor in converted.items()}
    assert {name: shape for name, shape in found.items() if name not in projections | {WINDOW}} == expected
    assert found.keys() == expected.keys() | projections | {WINDOW} and found[WINDOW] == (16_384,)


def lm_without_conditioners(codebooks: int, width: int, layers: int, heads: int) -> dict[str, torch.Size]:
    """Shapes by name of audiocraft's melody model, without its conditioners; no memory is used."""
    from audiocraft.modules.codebooks_patterns import DelayedPatternProvider
    from audiocraft.modules.conditioners import ConditionFuser, ConditioningProvider

    with torch.device("meta"):
        model = LMModel(
            DelayedPatternProvider(codebooks),
            ConditioningProvider({}),
            ConditionFuser({"cross": [], "sum": [], "prepend": ["self_wav", "description"], "input_interpolate": []}),
            n_q=codebooks,
            card=2048,
            dim=width,
            num_heads=heads,
            num_layers=layers,
            **{"norm_first": True, "bias_proj": False, "bias_ff": False, "bias_attn": False, "causal": True},
            **{"memory_efficient": True, "cross_attention": False, "activation": "gelu"},
        )
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def test_the_configuration_is_that_of_audiocrafts_own_melody_models(source: Source, exported: Path) -> None:
    """Source: audiocraft 1.3.0, config/conditioner/chroma2music.yaml, which the package does not hold."""
    tree = yaml.safe_load(torch.load(exported / "audiocraft" / LM_FILE, weights_only=True)[CONFIG])
    if not source.melody:
        assert list(tree["conditioners"]) == ["description"] and tree["fuser"]["cross"] == ["description"]
        return
    assert tree["fuser"] == {
        "cross_attention_pos_emb": False,
        "cross_attention_pos_emb_scale": 1,
        "sum": [],
        "prepend": ["self_wav", "description"],
        "cross": [],
        "input_interpolate": [],
    }
    assert tree["conditioners"]["self_wav"] == {
        "model": "chroma_stem",
        "chroma_stem": {
            **{"sample_rate": 32_000, "n_chroma": 12, "radix2_exp": 14, "argmax": True, "match_len_on_eval": False},
            **{"eval_wavs": None, "n_eval_wavs": 100, "cache_path": None},
        },
    }
