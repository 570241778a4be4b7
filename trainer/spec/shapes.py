"""The sizes of MusicGen's models, published ones by name and others by configuration: plain numbers, no tensors."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError
from trainer.spec.model_folder import model_folder

FRAME_RATE_HZ = 50  # frames per second of the EnCodec that every published MusicGen uses
HUB_PREFIX = "facebook/musicgen-"
# transformers leaves out of config.json what equals its own defaults: these, in 5.23 (MusicgenDecoderConfig, T5Config).
DECODER_DEFAULTS = {
    "vocab_size": 2048,
    "num_hidden_layers": 24,
    "ffn_dim": 4096,
    "num_attention_heads": 16,
    "hidden_size": 1024,
    "num_codebooks": 4,
    "audio_channels": 1,
}
T5_DEFAULT_WIDTH = 512
CHROMA_BINS = 12  # inputs of the audio projection of melody models: one for each note of the octave
# Places before the text that a melody takes, whatever its length: those of the chroma of 30 s at a hop of 4096 samples,
# 1 + 960000 // 4096. Shorter ones are repeated. Source: audiocraft 1.3.0, ChromaStemConditioner.
MELODY_PLACES, MELODY_SECONDS = 235, 30.0
DEBUG_CODEC, DEBUG_T5 = 922_842, 1_153_152  # parameters of the debug model's EnCodec and T5


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The size of a model: of its language model, which is decoder and text projection, and of the parts around it.

    layers, width, heads, ffn  of the decoder; ffn is the width of its feed-forward parts
    codes            values of a codebook
    text_width       of T5's states
    cross_attention  False for melody models, which put text and melody before the codes instead
    chroma_bins      inputs of melody's audio projection; 0 where there is none
    frozen           parameters of EnCodec (59 M) and of T5-base's encoder (110 M) together
    text_encoder     parameters of T5's encoder alone
    codec_channels   of EnCodec's first convolution, on which it depends how much memory a pass of it needs
    """

    name: str
    layers: int
    width: int
    heads: int
    ffn: int
    codebooks: int = 4
    codes: int = 2048
    text_width: int = 768
    audio_channels: int = 1
    cross_attention: bool = True
    chroma_bins: int = 0
    frozen: int = 169_000_000
    text_encoder: int = 110_000_000
    codec_channels: int = 64

    @property
    def melody(self) -> bool:
        """Whether the model reads a melody: a prefix of melody and text instead of cross-attention to the text."""
        return self.chroma_bins > 0

    @property
    def largest_delay(self) -> int:
        """Frames by which the last codebook comes later than the first: 3, in stereo too, where pairs share a delay."""
        return (self.codebooks - 1) // self.audio_channels

    def prefix_places(self, text_tokens: int) -> int:
        """Places that decoder layers compute before the first code; 0 where the text is attended to instead.

        An absent caption has one place, of zeros.
        """
        return MELODY_PLACES + max(1, text_tokens) if self.melody else 0

    def in_stereo(self) -> Shape:
        """The shape of this mono model made a stereo one: each codebook twice, for the left and the right channel."""
        return replace(self, codebooks=2 * self.codebooks, audio_channels=2)

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    @property
    def layer_parameters(self) -> int:
        """How many parameters one decoder layer has: its projections have no bias, its LayerNorms have."""
        attentions = 2 if self.cross_attention else 1
        projections = attentions * 4 * self.width**2 + 2 * self.width * self.ffn
        return projections + (attentions + 1) * 2 * self.width

    @property
    def rest_parameters(self) -> int:
        """How many parameters lie outside the layers: embeddings (a row more than codes), heads, norm, projections."""
        embeddings = self.codebooks * (self.codes + 1) * self.width
        heads = self.codebooks * self.codes * self.width
        text = (self.text_width + 1) * self.width
        audio = (self.chroma_bins + 1) * self.width if self.chroma_bins else 0
        return embeddings + heads + 2 * self.width + text + audio

    @property
    def parameters(self) -> int:
        """How many parameters the language model has."""
        return self.layers * self.layer_parameters + self.rest_parameters

    @property
    def cast_parameters(self) -> int:
        """How many parameters autocast copies to bf16: those of linear layers, not of embeddings or norms."""
        norms = (3 if self.cross_attention else 2) * 2 * self.width
        embeddings = self.codebooks * (self.codes + 1) * self.width
        return self.layers * (self.layer_parameters - norms) + self.rest_parameters - embeddings - 2 * self.width

    @property
    def largest_unit(self) -> int:
        """How many parameters the largest piece has that full sharding gathers at once: a layer, or all the rest."""
        return max(self.layer_parameters, self.rest_parameters)


def _known_shapes() -> dict[str, Shape]:
    small = Shape(name="small", layers=24, width=1024, heads=16, ffn=4096)
    medium = Shape(name="medium", layers=48, width=1536, heads=24, ffn=6144)
    large = Shape(name="large", layers=48, width=2048, heads=32, ffn=8192)
    melody = replace(medium, name="melody", cross_attention=False, chroma_bins=CHROMA_BINS)
    melody_large = replace(large, name="melody-large", cross_attention=False, chroma_bins=CHROMA_BINS)
    mono = (small, medium, large, melody, melody_large)
    stereo = [replace(shape.in_stereo(), name=f"stereo-{shape.name}") for shape in mono]
    debug = Shape(
        name="debug",
        layers=2,
        width=128,
        heads=4,
        ffn=512,
        text_width=512,
        frozen=DEBUG_CODEC + DEBUG_T5,
        text_encoder=DEBUG_T5,
        codec_channels=8,
    )
    debug_melody = replace(debug, name="debug-melody", cross_attention=False, chroma_bins=CHROMA_BINS)
    small_ones = (debug, debug_melody)
    stereo += [replace(shape.in_stereo(), name=shape.name.replace("debug", "debug-stereo")) for shape in small_ones]
    return {shape.name: shape for shape in (*mono, *small_ones, *stereo)}


# Source: MusicGen, arXiv 2306.05284, section 3.1, and audiocraft 1.3.0, config/model/lm/model_scale.
KNOWN: Mapping[str, Shape] = _known_shapes()
DEBUG_NAMES = tuple(name for name in KNOWN if name.startswith("debug"))  # built in memory, with random weights
PUBLISHED_NAMES = tuple(name for name in KNOWN if name not in DEBUG_NAMES)  # the ends of the hub ids, after HUB_PREFIX
NAMES_IN_WORDS = "small, medium, large, melody, melody-large, or one of these behind stereo-"


def published(model_id: str) -> Shape | None:
    """The shape of a model that Meta has published, by its name here or its hub id; None for all others."""
    name = model_id.removeprefix(HUB_PREFIX)
    return KNOWN[name] if name in PUBLISHED_NAMES else None


def hub_id_of(model_id: str) -> str | None:
    """facebook/musicgen-small for small, and a hub id for itself; None for debug and for folders."""
    if model_id in PUBLISHED_NAMES:
        return f"{HUB_PREFIX}{model_id}"
    return model_id if re.fullmatch(r"\w[\w.-]*/[\w.-]+", model_id) and not Path(model_id).exists() else None


def unknown_name(model_id: str) -> str:
    """That this is neither a folder nor the name of a model to train, in words, with the name that it is close to."""
    close = difflib.get_close_matches(model_id.rpartition("/")[2].removeprefix("musicgen-"), KNOWN, n=1)
    meant = f" (did you mean {close[0]}?)" if close else ""
    return f"there is no folder of this name here, and it is none of {', '.join(KNOWN)}{meant}"


def shape_to_train(shape: Shape, *, stereo: bool) -> Shape:
    """The shape that a run trains: that of --model_id, or with --stereo 1 a stereo one made of it.

    Raises ConfigError where the model is stereo already.
    """
    if not stereo:
        return shape
    if shape.audio_channels != 1:
        raise ConfigError(f"--stereo 1 makes a mono model stereo, and {shape.name} is stereo already: leave it out")
    return shape.in_stereo()


def segment_frames(seconds: float, frame_rate_hz: float = FRAME_RATE_HZ) -> int:
    """Whole codec frames of a training crop: 1500 for 30 s, 205 for 4.1 s.

    The plan and the data count by this function alone. When they counted apart, 4.1 s were 204 frames in the plan of a
    dry run and 205 in training: in floating point 4.1 x 50 is 204.99999999999997, which is why a millionth is added.
    """
    return math.floor(seconds * frame_rate_hz + 1e-6)


def shape_of(model_id: str) -> Shape:
    """The shape of the model that `--model_id` names, without network and without torch.

    Names of KNOWN and the hub ids of published models are known here; a folder's shape is in its config.json, that of
    another hub id in the local Hugging Face cache. Raises ConfigError where that finds none, ModelError as
    `model_folder` does.
    """
    if model_id in DEBUG_NAMES:
        return KNOWN[model_id]
    folder = model_folder(model_id)
    if folder is not None:
        return _shape_of_file(model_id, folder / "config.json")
    return published(model_id) or _shape_of_file(model_id, _cached_config(model_id))


def shape_of_config(name: str, config: Mapping[str, Any]) -> Shape:
    """The shape in a config.json of transformers, parsed; or in `MusicgenConfig.to_dict()`.

    Raises ConfigError for a model that is no MusicGen.
    """
    kind = config.get("model_type")
    if kind not in ("musicgen", "musicgen_melody") or not isinstance(config.get("decoder"), Mapping):
        raise ConfigError(f"--model_id {name} is a {kind} model, not a MusicGen: use {NAMES_IN_WORDS}, or a copy")
    decoder = DECODER_DEFAULTS | {key: value for key, value in config["decoder"].items() if key in DECODER_DEFAULTS}
    melody = kind == "musicgen_melody"
    return Shape(
        name=name,
        layers=decoder["num_hidden_layers"],
        width=decoder["hidden_size"],
        heads=decoder["num_attention_heads"],
        ffn=decoder["ffn_dim"],
        codebooks=decoder["num_codebooks"],
        codes=decoder["vocab_size"],
        text_width=config.get("text_encoder", {}).get("d_model", T5_DEFAULT_WIDTH),
        audio_channels=decoder["audio_channels"],
        cross_attention=not melody,
        chroma_bins=config.get("num_chroma", CHROMA_BINS) if melody else 0,
    )


def _shape_of_file(model_id: str, file: Path) -> Shape:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--model_id {model_id}: {file} cannot be read as a model's config ({error})") from error
    if not isinstance(config, dict):
        raise ConfigError(f"--model_id {model_id}: {file} is no model's config")
    return shape_of_config(model_id, config)


def _cached_config(model_id: str) -> Path:
    from huggingface_hub import try_to_load_from_cache  # half a second, and only other hub ids need it
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(model_id, "config.json")
    except HFValidationError as error:
        raise ConfigError(f"--model_id {model_id}: {unknown_name(model_id)}, and it can be no hub id") from error
    if not isinstance(path, str):
        raise ConfigError(
            f"--model_id {model_id}: {unknown_name(model_id)}. The size of another model on the hub is known once it is"
            f" downloaded: `hf download {model_id}`"
        )
    return Path(path)
