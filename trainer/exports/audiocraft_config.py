"""audiocraft's configurations (xp.cfg) of a language model and of an EnCodec, written and read without audiocraft.

audiocraft builds a model from this text before it loads tensors into it. What no tensor's shape tells (heads,
activation, causality, delays) must be right here: with another value the tensors load without an error, and the model
computes other numbers. Source: audiocraft 1.3.0, models/builders.py and models/loaders.py.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import EncodecConfig, MusicgenConfig, MusicgenMelodyConfig

from trainer.errors import ModelError
from trainer.exports.pickled import plain_config

CONFIG = "xp.cfg"  # the entry of audiocraft's files that holds the configuration
# The names of T5 models that audiocraft loads, and their widths: those that are both in T5Conditioner.MODELS and in
# T5Conditioner.MODELS_DIMS.
TEXT_ENCODERS = {
    "t5-small": 512,
    "t5-base": 768,
    "t5-large": 1024,
    "t5-3b": 1024,
    "t5-11b": 1024,
    "google/flan-t5-small": 512,
    "google/flan-t5-base": 768,
    "google/flan-t5-large": 1024,
}
# audiocraft makes longer music in segments that advance by 18 s unless told otherwise, and refuses to load a model
# whose segment is not longer than that. 30 s is what the published models say.
LEAST_SEGMENT_SECONDS = 30.0
# What the conditioner of melody models hears: in all published ones the same.
CHROMA = {"sample_rate": 32_000, "n_chroma": 12, "radix2_exp": 14, "argmax": True}
# The EnCodec of all published MusicGens, and what it is known by here.
CODEC_NAME = "facebook/encodec_32khz"
CODEC_SIZES = {"sampling_rate": 32_000, "audio_channels": 1, "num_filters": 64, "hidden_size": 128}


@dataclass(frozen=True, kw_only=True)
class AudiocraftConfig:
    """What an xp.cfg says about a language model and its tensors do not tell.

    delays           of each codebook, in frames
    text_encoder     the T5's name, see TEXT_ENCODERS
    segment_seconds  the longest music that audiocraft makes in one go
    melody           whether it reads a melody
    """

    width: int
    layers: int
    heads: int
    activation: str
    delays: tuple[int, ...]
    text_encoder: str
    segment_seconds: float
    melody: bool = False

    @property
    def audio_channels(self) -> int:
        """Of the sound: 2 where codebooks come in pairs of one delay. Raises ValueError for other delays."""
        for channels in (1, 2):
            if self.delays == delays_of(len(self.delays), channels):
                return channels
        raise ValueError(f"delays {self.delays} are neither those of a mono model nor of a stereo one")


def delays_of(codebooks: int, channels: int) -> tuple[int, ...]:
    """Frames by which each codebook comes late: the two of a stereo model's pair together."""
    return tuple(k // channels for k in range(codebooks))


def lm_config(
    config: MusicgenConfig | MusicgenMelodyConfig,
    *,
    text_encoder_name: str,
    segment_seconds: float,
    cfg_dropout: float,
    melody_rate: float = 0.0,
) -> str:
    """The xp.cfg, in YAML, from which audiocraft builds this language model.

    text_encoder_name  one of TEXT_ENCODERS
    segment_seconds    of the training crops; LEAST_SEGMENT_SECONDS are written where they are shorter
    cfg_dropout        share of captions that were dropped; written for those who train on with audiocraft
    melody_rate        of a melody model: share of clips that had their caption and not their melody; likewise

    Raises ModelError where audiocraft has no such model.
    """
    decoder: Any = config.decoder
    codec: Any = config.audio_encoder
    _require_representable(decoder)
    stereo = decoder.audio_channels == 2
    delays = list(delays_of(decoder.num_codebooks, decoder.audio_channels))
    transformer = {
        "dim": decoder.hidden_size,
        "num_heads": decoder.num_attention_heads,
        "num_layers": decoder.num_hidden_layers,
        "hidden_scale": decoder.ffn_dim // decoder.hidden_size,
        "n_q": decoder.num_codebooks,
        "card": decoder.vocab_size,
        "activation": decoder.activation_function,
        "causal": True,
        **{"dropout": 0.0, "norm": "layer_norm", "norm_first": True, "positional_embedding": "sin"},
        **{"bias_ff": False, "bias_attn": False, "bias_proj": False, "cross_attention": False},
        **{"custom": False, "memory_efficient": True, "attention_as_float32": False},
    }
    melody = isinstance(config, MusicgenMelodyConfig)
    return _yaml(
        {
            "device": "cpu",
            "dtype": "float32",
            "sample_rate": codec.sampling_rate,
            "channels": decoder.audio_channels,
            "interleave_stereo_codebooks": {"use": stereo, "per_timestep": False},
            "dataset": {"segment_duration": max(LEAST_SEGMENT_SECONDS, float(segment_seconds))},
            "lm_model": "transformer_lm",
            "transformer_lm": transformer,
            "codebooks_pattern": {
                "modeling": "delay",
                "delay": {"delays": delays, "flatten_first": 0, "empty_initial": 0},
            },
            "classifier_free_guidance": {"training_dropout": float(cfg_dropout), "inference_coef": 3.0},
            **_conditions(text_encoder_name, melody_rate if melody else None),
        }
    )


def _conditions(text_encoder_name: str, melody_rate: float | None) -> dict[str, Any]:
    """The entries about conditions: how often they are dropped, where they go, and what reads them.

    melody_rate  see `lm_config`; None for a text model
    """
    t5 = {"name": text_encoder_name, "finetune": False, "word_dropout": 0.0, "normalize_text": False}
    description = {"description": {"model": "t5", "t5": t5}}
    fuser: dict[str, Any] = {"cross_attention_pos_emb": False, "cross_attention_pos_emb_scale": 1, "sum": []}
    if melody_rate is None:
        fuser |= {"prepend": [], "cross": ["description"], "input_interpolate": []}
        return {"attribute_dropout": {}, "fuser": fuser, "conditioners": description}
    fuser |= {"prepend": ["self_wav", "description"], "cross": [], "input_interpolate": []}
    # get_pretrained turns match_len_on_eval on, by which short melodies are repeated.
    chroma = CHROMA | {"match_len_on_eval": False, "eval_wavs": None, "n_eval_wavs": 100, "cache_path": None}
    return {
        "attribute_dropout": {"args": {"active_on_eval": False}, "text": {}, "wav": {"self_wav": float(melody_rate)}},
        "fuser": fuser,
        "conditioners": {"self_wav": {"model": "chroma_stem", "chroma_stem": chroma}, **description},
    }


def read_lm_config(entry: object, file: Path) -> AudiocraftConfig:
    """What the xp.cfg of a language model says.

    entry  what stands under CONFIG in `file`: YAML in an exported file, and in a solver's checkpoint what takes the
           place of its configuration object (see trainer/exports/pickled.py)

    Raises ModelError where it describes no text-to-music model, or one with other conditions than MusicGen's.
    """
    try:
        tree = yaml.safe_load(entry) if isinstance(entry, str) else plain_config(entry)
        model, conditioner = tree["transformer_lm"], tree["conditioners"]["description"]
        config = AudiocraftConfig(
            width=int(model["dim"]),
            layers=int(model["num_layers"]),
            heads=int(model["num_heads"]),
            activation=str(model.get("activation", "relu")),  # audiocraft's own default
            delays=tuple(int(delay) for delay in tree["codebooks_pattern"]["delay"]["delays"]),
            text_encoder=str(conditioner["t5"]["name"]),
            segment_seconds=float(tree["dataset"]["segment_duration"]),
            melody="self_wav" in tree["conditioners"],
        )
        refused = _why_refused(tree, config)
    except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{file}: its {CONFIG} describes no text-to-music model ({error!r})") from error
    if refused is not None:
        raise ModelError(f"{file}: its {CONFIG} {refused}")
    return config


def _why_refused(tree: Mapping[str, Any], config: AudiocraftConfig) -> str | None:
    """What of a configuration no MusicGen of text or melody has; None where there is nothing."""
    conditioners = {name for name in tree["conditioners"] if name != "args"}
    if conditioners - {"description", "self_wav"}:
        return f"has the conditioners {', '.join(sorted(conditioners))}: only a description and a melody are known"
    if config.melody:
        melody = tree["conditioners"]["self_wav"]
        if melody["model"] != "chroma_stem":
            return f"reads self_wav by {melody['model']}, as MusicGen-Style does: only the chroma of melodies is known"
        chroma = {name: melody["chroma_stem"].get(name) for name in CHROMA}
        if chroma["sample_rate"] == "${sample_rate}":  # a reference, as audiocraft's own configurations have it
            chroma["sample_rate"] = tree["sample_rate"]
        if chroma != CHROMA:
            return f"hears melodies with {chroma}, and all published models with {CHROMA}: only the latter is known"
        if list(tree["fuser"]["prepend"]) != ["self_wav", "description"] or tree["fuser"]["cross"]:
            return f"joins its conditions otherwise than MusicGen's melody models ({tree['fuser']})"
    interleaved = tree.get("interleave_stereo_codebooks") or {}
    if interleaved.get("use") and interleaved.get("per_timestep"):
        return "has the codes of left and right one after the other in time: only pairs of codebooks are known"
    return None


def text_encoder_name(config: MusicgenConfig | MusicgenMelodyConfig) -> str:
    """The name under which audiocraft loads this model's T5: the one it was saved under, else by its width.

    Raises ModelError for a width that no T5 known to audiocraft has.
    """
    encoder: Any = config.text_encoder
    name, width = encoder._name_or_path, encoder.hidden_size
    if TEXT_ENCODERS.get(name) == width:
        return name
    for name in ("t5-small", "t5-base", "t5-large"):
        if TEXT_ENCODERS[name] == width:
            return name
    raise ModelError(f"its T5 is {width} wide, but audiocraft loads T5 of width 512, 768 or 1024 only")


def codec_config(config: EncodecConfig) -> str:
    """The xp.cfg, in YAML, from which audiocraft builds this EnCodec."""
    sound = {"channels": config.audio_channels, "causal": config.use_causal_conv}
    seanet = sound | {
        "dimension": config.hidden_size,
        "n_filters": config.num_filters,
        "n_residual_layers": config.num_residual_layers,
        "ratios": list(config.upsampling_ratios),
        "norm": config.norm_type,
        "kernel_size": config.kernel_size,
        "last_kernel_size": config.last_kernel_size,
        "residual_kernel_size": config.residual_kernel_size,
        "dilation_base": config.dilation_growth_rate,
        "pad_mode": config.pad_mode,
        "true_skip": not config.use_conv_shortcut,
        "compress": config.compress,
        "lstm": config.num_lstm_layers,
        **{"activation": "ELU", "activation_params": {"alpha": 1.0}, "norm_params": {}},
        **{"disable_norm_outer_blocks": 0, "encoder": {}},
        "decoder": {"trim_right_ratio": config.trim_right_ratio},
    }
    codec = {"autoencoder": "seanet", "quantizer": "rvq", "sample_rate": config.sampling_rate}
    return _yaml(
        {
            "device": "cpu",
            "dtype": "float32",
            "compression_model": "encodec",
            "sample_rate": config.sampling_rate,
            "channels": config.audio_channels,
            "encodec": codec | sound | {"renormalize": config.normalize},
            "seanet": seanet,
            "rvq": {"n_q": config.num_quantizers, "bins": config.codebook_size, "q_dropout": False},
        }
    )


def published_codec(config: EncodecConfig) -> bool:
    """Whether an EnCodec has the sizes of CODEC_NAME."""
    return all(getattr(config, name) == value for name, value in CODEC_SIZES.items())


def config_beside(config: MusicgenConfig, *, text_encoder_name: str) -> str:
    """The config.json, as transformers writes it, for programs that look for one beside audiocraft's state_dict.bin.

    Apple's mlx-examples reads the sizes there, and under _name_or_path which T5 and which EnCodec of the hub to take.
    Source: mlx-examples, musicgen/musicgen.py, MusicGen.from_pretrained.
    text_encoder_name  as for `lm_config`
    """
    named: Any = copy.deepcopy(config)
    named._name_or_path = ""  # the folder on this machine from which the model was read
    named.text_encoder._name_or_path = text_encoder_name
    named.audio_encoder._name_or_path = CODEC_NAME
    return str(named.to_json_string(use_diff=False))


def read_codec_config(package: Mapping[str, Any], file: Path) -> EncodecConfig:
    """The inverse of `codec_config`.

    package  the content of `file`; the configuration stands under CONFIG

    Raises ModelError where it describes no EnCodec.
    """
    try:
        tree = yaml.safe_load(package[CONFIG])
    except (KeyError, AttributeError, yaml.YAMLError) as error:
        raise ModelError(f"{file} has no readable {CONFIG} ({error!r})") from error
    try:
        return _encodec_config(tree)
    except (KeyError, TypeError) as error:
        raise ModelError(f"{file}: its {CONFIG} describes no EnCodec ({error!r})") from error


def _encodec_config(tree: Mapping[str, Any]) -> EncodecConfig:
    seanet, quantizer = tree["seanet"], tree["rvq"]
    config = EncodecConfig(
        sampling_rate=tree["sample_rate"],
        audio_channels=tree["channels"],
        normalize=tree["encodec"]["renormalize"],
        use_causal_conv=seanet["causal"],
        hidden_size=seanet["dimension"],
        num_filters=seanet["n_filters"],
        num_residual_layers=seanet["n_residual_layers"],
        upsampling_ratios=list(seanet["ratios"]),
        norm_type=seanet["norm"],
        kernel_size=seanet["kernel_size"],
        last_kernel_size=seanet["last_kernel_size"],
        residual_kernel_size=seanet["residual_kernel_size"],
        dilation_growth_rate=seanet["dilation_base"],
        pad_mode=seanet["pad_mode"],
        use_conv_shortcut=not seanet["true_skip"],
        compress=seanet["compress"],
        num_lstm_layers=seanet["lstm"],
        trim_right_ratio=seanet["decoder"]["trim_right_ratio"],
        codebook_size=quantizer["bins"],
        chunk_length_s=None,
        overlap=None,
    )
    # EncodecConfig has no field for the number of codebooks: it computes it from a bandwidth in kbit/s.
    bits = (config.codebook_size - 1).bit_length()
    config.target_bandwidths = [quantizer["n_q"] * config.frame_rate * bits / 1000]
    assert config.num_quantizers == quantizer["n_q"]
    return config


def _require_representable(decoder: Any) -> None:
    if decoder.activation_function not in ("gelu", "relu") or decoder.scale_embedding:
        raise ModelError("its decoder has an activation or a scaled embedding that audiocraft does not have")
    if decoder.ffn_dim % decoder.hidden_size:
        raise ModelError(f"its feed-forward width {decoder.ffn_dim} is no multiple of {decoder.hidden_size}")


def _yaml(value: dict[str, Any]) -> str:
    return yaml.safe_dump(value, sort_keys=False)
