"""MusicGen and EnCodec under audiocraft's key names, with its configuration, and back; without audiocraft.

"Our names" are those of `LanguageModel.state_dict()` and of transformers' `EncodecModel`. Source of the other
side: audiocraft 1.3.0, models/lm.py, models/loaders.py, modules/transformer.py and modules/seanet.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import EncodecConfig, MusicgenConfig

from trainer.errors import ModelError
from trainer.exports.pickled import load_pickled, plain_config

# Parts of a name that wrappers put in: DDP and DeepSpeed, torch.compile, FSDP, activation checkpointing.
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# The names that audiocraft takes and their widths (T5Conditioner.MODELS and MODELS_DIMS; those in both).
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
LM_FILE, CODEC_FILE, SOLVER_FILE = "state_dict.bin", "compression_state_dict.bin", "checkpoint.th"
STATE, FSDP_STATE, CONFIG = "best_state", "fsdp_best_state", "xp.cfg"
# Parts of a convolution: weight_norm's names since torch 2.0, and before.
CODEC_TAILS = {
    "bias": "bias",
    "parametrizations.weight.original0": "weight_g",
    "parametrizations.weight.original1": "weight_v",
}
CONDITIONER = "condition_provider.conditioners.description"

SHORTEST_LONGEST_SECONDS = 30.0

@dataclass(frozen=True, kw_only=True)
class AudiocraftConfig:
    """What an xp.cfg says about the language model and no tensor's shape tells."""

    width: int
    layers: int
    heads: int
    activation: str
    delays: tuple[int, ...]
    text_encoder: str
    segment_seconds: float


@dataclass(frozen=True, kw_only=True)
class AudiocraftModel:
    """A language model from audiocraft's files: tensors under our names; `config` is None without xp.cfg."""

    state: dict[str, Tensor]
    config: AudiocraftConfig | None


def lm_to_audiocraft(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The language model as `lm.load_state_dict` of audiocraft takes it, in the tensors' own dtypes.

    state    under our names, prefixes of wrappers allowed
    returns  copies on the CPU, contiguous, each with a storage of its own

    Raises ModelError where tensors are missing or unknown.
    """
    names = plain_names(state)
    table = _lm_table(_count(names, r"decoder\.lm_heads"), _count(names, r"decoder\.model\.decoder\.layers"))
    _require_same(names, (ours for parts in table.values() for ours in parts), "the language model")
    return {theirs: _stacked([state[names[ours]] for ours in parts]) for theirs, parts in table.items()}


def lm_from_audiocraft(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `lm_to_audiocraft`; takes the `.mha.` names of audiocraft's plain attention as well.

    The tensors share the memory of those given, so that of a mapped file only what is used is read.
    Raises ModelError where tensors are missing or unknown, as in melody and style models.
    """
    names = plain_names(state, also=("mha",))
    table = _lm_table(_count(names, "linears"), _count(names, r"transformer\.layers"))
    _require_same(names, table, "audiocraft's language model")
    result: dict[str, Tensor] = {}
    for theirs, parts in table.items():
        tensor = state[names[theirs]]
        if tensor.shape[0] % len(parts):
            raise ModelError(f"{theirs} has {tensor.shape[0]} rows: not query, key and value of one size")
        for ours, part in zip(parts, tensor.chunk(len(parts)), strict=True):
            result[ours] = part.detach().cpu()
    return result


def codec_to_audiocraft(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """EnCodec as audiocraft's `EncodecModel.load_state_dict` takes it; copies as in `lm_to_audiocraft`.

    Raises ModelError for a name that EnCodec does not have; that none is missing is not checked.
    """
    names = plain_names(state)
    ends = [int(found[1]) for name in names if (found := re.match(r"decoder\.layers\.(\d+)\.conv\.", name))]
    renamed = {_codec_name_to_audiocraft(name, last=max(ends, default=0)): name for name in names}
    return {theirs: _stacked([state[names[ours]]]) for theirs, ours in renamed.items()}


def codec_from_audiocraft(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `codec_to_audiocraft`."""
    names = plain_names(state)
    return {_codec_name_from_audiocraft(name): _stacked([state[names[name]]]) for name in names}


def lm_config(
    config: MusicgenConfig, *, text_encoder_name: str, segment_seconds: float, cfg_dropout: float
) -> str:
    """The xp.cfg, YAML, from which audiocraft builds this language model.

    text_encoder_name  one of TEXT_ENCODERS
    segment_seconds    what audiocraft takes for the longest music the model makes in one go; at least 30 is
                       written, as for the published models, since audiocraft's own default stride for longer
                       music is 18 s and must be less
    cfg_dropout        rate of dropped captions; written for those who train on

    num_heads, activation and causal have other defaults there, and a wrong one loads without an error.
    Raises ModelError where audiocraft has no such model.
    """
    decoder: Any = config.decoder
    codec: Any = config.audio_encoder
    _require_representable(decoder)
    stereo = decoder.audio_channels == 2
    delays = [k // 2 if stereo else k for k in range(decoder.num_codebooks)]
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
    fuser = {"cross_attention_pos_emb": False, "cross_attention_pos_emb_scale": 1}
    t5 = {"name": text_encoder_name, "finetune": False, "word_dropout": 0.0, "normalize_text": False}
    return _yaml(
        {
            "device": "cpu",
            "dtype": "float32",
            "sample_rate": codec.sampling_rate,
            "channels": decoder.audio_channels,
            "interleave_stereo_codebooks": {"use": stereo, "per_timestep": False},
            "dataset": {"segment_duration": max(SHORTEST_LONGEST_SECONDS, float(segment_seconds))},
            "lm_model": "transformer_lm",
            "transformer_lm": transformer,
            "codebooks_pattern": {
                "modeling": "delay",
                "delay": {"delays": delays, "flatten_first": 0, "empty_initial": 0},
            },
            "classifier_free_guidance": {"training_dropout": float(cfg_dropout), "inference_coef": 3.0},
            "attribute_dropout": {},
            "fuser": fuser | {"sum": [], "prepend": [], "cross": ["description"], "input_interpolate": []},
            "conditioners": {"description": {"model": "t5", "t5": t5}},
        }
    )


def codec_config(config: EncodecConfig) -> str:
    """The xp.cfg, YAML, from which audiocraft builds this EnCodec."""
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


def text_encoder_name(config: MusicgenConfig) -> str:
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


def read_audiocraft(path: Path) -> AudiocraftModel:
    """The language model of a folder with state_dict.bin, of such a file, of a plain lm_final.pt, or of a solver's
    checkpoint.th: there the best state, FSDP's first, as audiocraft 1.3.0's utils/export.py takes it.

    Nothing in the file is executed (see `trainer.pickled`), and its tensors stay on disk until they are used. Raises
    ModelError where it is missing, truncated or holds something else.
    """
    file = path / LM_FILE if path.is_dir() else path
    package = load_pickled(file)
    state = package.get(FSDP_STATE) or package.get(STATE, package)
    if isinstance(state, dict) and isinstance(state.get("model"), dict):  # a solver's: by the name of each module
        state = state["model"]
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ModelError(f"{file} holds no language model of audiocraft, whose tensors stand under {STATE}")
    try:
        state = lm_from_audiocraft(state)
    except ModelError as error:
        raise ModelError(f"{file} holds no text-to-music model of audiocraft: {error}") from error
    config = _parse_config(package[CONFIG], file) if CONFIG in package else None
    return AudiocraftModel(state=state, config=config)


def plain_names(names: Iterable[str], *, also: tuple[str, ...] = ()) -> dict[str, str]:
    """Each name without the parts that wrappers (and `also`) put into it, to the name as it was given."""
    result: dict[str, str] = {}
    for name in names:
        plain = ".".join(part for part in name.split(".") if part not in WRAPPERS + also)
        if plain in result:
            raise ModelError(f"{result[plain]} and {name} are both {plain} to a model without wrappers")
        result[plain] = name
    return result


def _lm_table(codebooks: int, layers: int) -> dict[str, tuple[str, ...]]:
    """audiocraft's name of each tensor, and ours of the tensors that it holds one below the other."""
    decoder = "decoder.model.decoder"
    table: dict[str, tuple[str, ...]] = {}
    for k in range(codebooks):
        table[f"emb.{k}.weight"] = (f"{decoder}.embed_tokens.{k}.weight",)
        table[f"linears.{k}.weight"] = (f"decoder.lm_heads.{k}.weight",)
    for layer in range(layers):
        theirs, ours = f"transformer.layers.{layer}", f"{decoder}.layers.{layer}"
        for their_block, our_block in (("self_attn", "self_attn"), ("cross_attention", "encoder_attn")):
            attention = f"{ours}.{our_block}"
            projections = tuple(f"{attention}.{x}_proj.weight" for x in "qkv")
            table[f"{theirs}.{their_block}.in_proj_weight"] = projections
            table[f"{theirs}.{their_block}.out_proj.weight"] = (f"{attention}.out_proj.weight",)
        table[f"{theirs}.linear1.weight"] = (f"{ours}.fc1.weight",)
        table[f"{theirs}.linear2.weight"] = (f"{ours}.fc2.weight",)
        norms = (("norm1", "self_attn"), ("norm_cross", "encoder_attn"), ("norm2", "final"))
        for their_norm, our_norm in norms:
            for part in ("weight", "bias"):
                table[f"{theirs}.{their_norm}.{part}"] = (f"{ours}.{our_norm}_layer_norm.{part}",)
    for part in ("weight", "bias"):
        table[f"out_norm.{part}"] = (f"{decoder}.layer_norm.{part}",)
        table[f"{CONDITIONER}.output_proj.{part}"] = (f"enc_to_dec_proj.{part}",)
    return table


def _codec_name_to_audiocraft(name: str, *, last: int) -> str:
    """`last`: index of the decoder's last convolution; those between it and the first are transposed."""
    if found := re.fullmatch(r"quantizer\.layers\.(\d+)\.codebook\.(\w+)", name):
        return f"quantizer.vq.layers.{found[1]}._codebook.{found[2]}"
    if found := re.fullmatch(r"(encoder|decoder)\.layers\.(\d+)\.lstm\.(\w+)", name):
        return f"{found[1]}.model.{found[2]}.lstm.{found[3]}"
    found = re.fullmatch(r"(encoder|decoder)\.layers\.(\d+)((?:\.block\.\d+|\.shortcut)?)\.conv\.(.+)", name)
    if not found or found[4] not in CODEC_TAILS:
        raise ModelError(f"{name} is no tensor of MusicGen's EnCodec")
    transposed = found[1] == "decoder" and not found[3] and 0 < int(found[2]) < last
    kind = "convtr" if transposed else "conv"
    return f"{found[1]}.model.{found[2]}{found[3]}.{kind}.{kind}.{CODEC_TAILS[found[4]]}"


def _codec_name_from_audiocraft(name: str) -> str:
    if found := re.fullmatch(r"quantizer\.vq\.layers\.(\d+)\._codebook\.(\w+)", name):
        return f"quantizer.layers.{found[1]}.codebook.{found[2]}"
    if found := re.fullmatch(r"(encoder|decoder)\.model\.(\d+)\.lstm\.(\w+)", name):
        return f"{found[1]}.layers.{found[2]}.lstm.{found[3]}"
    pattern = r"(encoder|decoder)\.model\.(\d+)((?:\.block\.\d+|\.shortcut)?)\.(convtr|conv)\.\4\.(\w+)"
    found = re.fullmatch(pattern, name)
    tails = {theirs: ours for ours, theirs in CODEC_TAILS.items()}
    if not found or found[5] not in tails:
        raise ModelError(f"{name} is no tensor of audiocraft's EnCodec")
    return f"{found[1]}.layers.{found[2]}{found[3]}.conv.{tails[found[5]]}"


def _stacked(parts: list[Tensor]) -> Tensor:
    cpu = [part.detach().cpu() for part in parts]
    return torch.cat(cpu) if len(cpu) > 1 else cpu[0].clone(memory_format=torch.contiguous_format)


def _count(names: Iterable[str], prefix: str) -> int:
    numbers = [int(found[1]) for name in names if (found := re.match(rf"{prefix}\.(\d+)\.", name))]
    return max(numbers, default=-1) + 1


def _require_same(given: Iterable[str], expected: Iterable[str], what: str) -> None:
    given, expected = set(given), set(expected)
    problems = []
    for label, names in (("lacks", expected - given), ("has the unknown", given - expected)):
        if names:
            shown = ", ".join(sorted(names)[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            problems.append(f"{label} {shown}")
    if problems:
        raise ModelError(f"{what} {' and '.join(problems)}")


def _require_representable(decoder: Any) -> None:
    if decoder.activation_function not in ("gelu", "relu") or decoder.scale_embedding:
        raise ModelError("its decoder has an activation or a scaled embedding that audiocraft does not have")
    if decoder.ffn_dim % decoder.hidden_size:
        raise ModelError(f"its feed-forward width {decoder.ffn_dim} is no multiple of {decoder.hidden_size}")


def _yaml(value: dict[str, Any]) -> str:
    return yaml.safe_dump(value, sort_keys=False)


def _parse_config(config: object, file: Path) -> AudiocraftConfig:
    """`config` is the YAML of an exported file, or what stands for a solver's configuration object."""
    try:
        tree = yaml.safe_load(config) if isinstance(config, str) else plain_config(config)
        model, conditioner = tree["transformer_lm"], tree["conditioners"]["description"]
        return AudiocraftConfig(
            width=int(model["dim"]),
            layers=int(model["num_layers"]),
            heads=int(model["num_heads"]),
            activation=str(model.get("activation", "relu")),  # audiocraft's own default
            delays=tuple(int(delay) for delay in tree["codebooks_pattern"]["delay"]["delays"]),
            text_encoder=str(conditioner["t5"]["name"]),
            segment_seconds=float(tree["dataset"]["segment_duration"]),
        )
    except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{file}: its {CONFIG} describes no text-to-music model ({error!r})") from error
