"""The tensors of MusicGen and EnCodec under audiocraft's names, and back, without importing audiocraft.

"Our names" are those of `LanguageModel.state_dict()` and of transformers' `EncodecModel.state_dict()`; "theirs" are
audiocraft's. The values are the same; only query, key and value are three matrices here and one there.
Source: audiocraft 1.3.0, models/lm.py, modules/transformer.py and modules/seanet.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from trainer.errors import ModelError

# Parts of a name that wrappers put in: DDP and DeepSpeed, torch.compile, FSDP, activation checkpointing.
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# The tensors of a convolution: as weight_norm names them since torch 2.0, and as it did before, which audiocraft uses.
CODEC_TAILS = {
    "bias": "bias",
    "parametrizations.weight.original0": "weight_g",
    "parametrizations.weight.original1": "weight_v",
}
CONDITIONERS = "condition_provider.conditioners."
CONDITIONER, MELODY_CONDITIONER = f"{CONDITIONERS}description", f"{CONDITIONERS}self_wav"
# The window of the spectrogram in which a melody is heard. audiocraft keeps it among the tensors and demands it when it
# loads them; it is the same one in every model.
WINDOW, WINDOW_SAMPLES = f"{MELODY_CONDITIONER}.chroma.spec.window", 16_384


def lm_to_audiocraft(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The language model as `lm.load_state_dict` of audiocraft takes it, in the tensors' own dtypes.

    state    under our names, prefixes of wrappers allowed
    returns  copies on the CPU, contiguous, each with a storage of its own: torch.save writes whole storages, so that
             views would make the file larger than the model

    Raises ModelError where tensors are missing or unknown.
    """
    names = plain_names(state)
    melody = "audio_enc_to_dec_proj.weight" in names and not any(".encoder_attn." in name for name in names)
    layers = _count(names, r"decoder\.model\.decoder\.layers")
    table = _lm_table(_count(names, r"decoder\.lm_heads"), layers, melody=melody)
    _require_same(names, (ours for parts in table.values() for ours in parts), "the language model")
    theirs = {their_name: _stacked([state[names[ours]] for ours in parts]) for their_name, parts in table.items()}
    return theirs | ({WINDOW: window()} if melody else {})


def lm_from_audiocraft(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `lm_to_audiocraft`.

    state    under their names; those of audiocraft's attention without memory_efficient, which have a part `mha`
             more, are taken as well
    returns  under our names, on the CPU: views into `state` where that is on the CPU too, so that of a mapped file
             only what is used is read

    Raises ModelError where tensors are missing or unknown, as in style models. What WINDOW holds is not looked at: see
    `require_window`.
    """
    names = plain_names(state, also=("mha",))
    _require_conditioners(names)
    melody = f"{MELODY_CONDITIONER}.output_proj.weight" in names and not any(".cross_att" in name for name in names)
    table = _lm_table(_count(names, "linears"), _count(names, r"transformer\.layers"), melody=melody)
    _require_same([name for name in names if not melody or name != WINDOW], table, "audiocraft's language model")
    result: dict[str, Tensor] = {}
    for theirs, parts in table.items():
        tensor = state[names[theirs]]
        if tensor.shape[0] % len(parts):
            raise ModelError(f"{theirs} has {tensor.shape[0]} rows: not query, key and value of one size")
        for ours, part in zip(parts, tensor.chunk(len(parts)), strict=True):
            result[ours] = part.detach().cpu()
    return result


def window() -> Tensor:
    """What WINDOW holds: (16384,) float32, a periodic Hann window."""
    return torch.hann_window(WINDOW_SAMPLES)


def require_window(state: Mapping[str, Tensor]) -> None:
    """Raise ModelError where a model of audiocraft hears melodies through another window than `window`.

    In files of half precision it is rounded.
    """
    theirs = state.get(WINDOW)
    if theirs is None:
        return
    ours = window()
    if theirs.shape != ours.shape or not torch.allclose(theirs.float(), ours, rtol=0, atol=1e-3):
        raise ModelError(
            f"it hears melodies through another window ({WINDOW}, {tuple(theirs.shape)}) than MusicGen's, a Hann window"
            f" of {WINDOW_SAMPLES} samples: its notes would be others"
        )


def codec_to_audiocraft(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """EnCodec as audiocraft's `EncodecModel.load_state_dict` takes it; copies as in `lm_to_audiocraft`.

    Raises ModelError for a name that EnCodec does not have. That none is missing is not checked.
    """
    names = plain_names(state)
    layers = [int(match[1]) for name in names if (match := re.match(r"decoder\.layers\.(\d+)\.conv\.", name))]
    theirs = {_codec_name_to_audiocraft(name, last=max(layers, default=0)): name for name in names}
    return {their_name: _stacked([state[names[our_name]]]) for their_name, our_name in theirs.items()}


def codec_from_audiocraft(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `codec_to_audiocraft`, copies on the CPU as well.

    Raises ModelError for a name that audiocraft's EnCodec does not have.
    """
    names = plain_names(state)
    return {_codec_name_from_audiocraft(name): _stacked([state[names[name]]]) for name in names}


def plain_names(names: Iterable[str], *, also: tuple[str, ...] = ()) -> dict[str, str]:
    """Map each name without the parts that wrappers put into it to the name as it stands in `names`.

    also  further parts to leave out

    Raises ModelError where two names differ in such parts alone.
    """
    result: dict[str, str] = {}
    for name in names:
        plain = ".".join(part for part in name.split(".") if part not in WRAPPERS + also)
        if plain in result:
            raise ModelError(f"{result[plain]} and {name} are both {plain} to a model without wrappers")
        result[plain] = name
    return result


def _lm_table(codebooks: int, layers: int, *, melody: bool = False) -> dict[str, tuple[str, ...]]:
    """Each of audiocraft's names, with ours of the tensors whose rows it holds one below the other.

    melody  of a melody model, which has no cross-attention; WINDOW, for which there is none of ours, is left out
    """
    decoder = "decoder.model.decoder"
    table: dict[str, tuple[str, ...]] = {}
    for k in range(codebooks):
        table[f"emb.{k}.weight"] = (f"{decoder}.embed_tokens.{k}.weight",)
        table[f"linears.{k}.weight"] = (f"decoder.lm_heads.{k}.weight",)
    for layer in range(layers):
        theirs, ours = f"transformer.layers.{layer}", f"{decoder}.layers.{layer}"
        blocks = (("self_attn", "self_attn"), *(() if melody else (("cross_attention", "encoder_attn"),)))
        for their_block, our_block in blocks:
            attention = f"{ours}.{our_block}"
            projections = tuple(f"{attention}.{x}_proj.weight" for x in "qkv")
            table[f"{theirs}.{their_block}.in_proj_weight"] = projections
            table[f"{theirs}.{their_block}.out_proj.weight"] = (f"{attention}.out_proj.weight",)
        table[f"{theirs}.linear1.weight"] = (f"{ours}.fc1.weight",)
        table[f"{theirs}.linear2.weight"] = (f"{ours}.fc2.weight",)
        norms = (("norm1", "self_attn"), *(() if melody else (("norm_cross", "encoder_attn"),)), ("norm2", "final"))
        for their_norm, our_norm in norms:
            for part in ("weight", "bias"):
                table[f"{theirs}.{their_norm}.{part}"] = (f"{ours}.{our_norm}_layer_norm.{part}",)
    for part in ("weight", "bias"):
        table[f"out_norm.{part}"] = (f"{decoder}.layer_norm.{part}",)
        table[f"{CONDITIONER}.output_proj.{part}"] = (f"enc_to_dec_proj.{part}",)
        if melody:
            table[f"{MELODY_CONDITIONER}.output_proj.{part}"] = (f"audio_enc_to_dec_proj.{part}",)
    return table


def _codec_name_to_audiocraft(name: str, *, last: int) -> str:
    """`last` is the index of the decoder's last convolution; those between it and the first are transposed."""
    if match := re.fullmatch(r"quantizer\.layers\.(\d+)\.codebook\.(\w+)", name):
        return f"quantizer.vq.layers.{match[1]}._codebook.{match[2]}"
    if match := re.fullmatch(r"(encoder|decoder)\.layers\.(\d+)\.lstm\.(\w+)", name):
        return f"{match[1]}.model.{match[2]}.lstm.{match[3]}"
    match = re.fullmatch(r"(encoder|decoder)\.layers\.(\d+)((?:\.block\.\d+|\.shortcut)?)\.conv\.(.+)", name)
    if not match or match[4] not in CODEC_TAILS:
        raise ModelError(f"{name} is no tensor of MusicGen's EnCodec")
    transposed = match[1] == "decoder" and not match[3] and 0 < int(match[2]) < last
    kind = "convtr" if transposed else "conv"
    return f"{match[1]}.model.{match[2]}{match[3]}.{kind}.{kind}.{CODEC_TAILS[match[4]]}"


def _codec_name_from_audiocraft(name: str) -> str:
    if match := re.fullmatch(r"quantizer\.vq\.layers\.(\d+)\._codebook\.(\w+)", name):
        return f"quantizer.layers.{match[1]}.codebook.{match[2]}"
    if match := re.fullmatch(r"(encoder|decoder)\.model\.(\d+)\.lstm\.(\w+)", name):
        return f"{match[1]}.layers.{match[2]}.lstm.{match[3]}"
    pattern = r"(encoder|decoder)\.model\.(\d+)((?:\.block\.\d+|\.shortcut)?)\.(convtr|conv)\.\4\.(\w+)"
    match = re.fullmatch(pattern, name)
    our_tails = {theirs: ours for ours, theirs in CODEC_TAILS.items()}
    if not match or match[5] not in our_tails:
        raise ModelError(f"{name} is no tensor of audiocraft's EnCodec")
    return f"{match[1]}.layers.{match[2]}{match[3]}.conv.{our_tails[match[5]]}"


def _stacked(parts: list[Tensor]) -> Tensor:
    cpu = [part.detach().cpu() for part in parts]
    return torch.cat(cpu) if len(cpu) > 1 else cpu[0].clone(memory_format=torch.contiguous_format)


def _count(names: Iterable[str], prefix: str) -> int:
    """How many modules `prefix`.0, `prefix`.1, ... there are; `prefix` is a regular expression."""
    numbers = [int(match[1]) for name in names if (match := re.match(rf"{prefix}\.(\d+)\.", name))]
    return max(numbers, default=-1) + 1


def _require_conditioners(names: Iterable[str]) -> None:
    """Raise ModelError for conditioners that MusicGen's text and melody models do not have."""
    known = {f"{MELODY_CONDITIONER}.output_proj.{part}" for part in ("weight", "bias")} | {WINDOW}
    conditions = [name for name in names if name.startswith(CONDITIONERS)]
    foreign = {name for name in conditions if not name.startswith(f"{CONDITIONER}.") and name not in known}
    if foreign:
        raise ModelError(
            f"it reads more than a description and a melody's chroma ({min(foreign)}), as MusicGen-Style does: only"
            " text and melody models can be used"
        )


def _require_same(names: Iterable[str], expected: Iterable[str], what: str) -> None:
    names, expected = set(names), set(expected)
    problems = []
    for label, wrong in (("lacks", expected - names), ("has the unknown", names - expected)):
        if wrong:
            shown = ", ".join(sorted(wrong)[:4]) + (f" and {len(wrong) - 4} more" if len(wrong) > 4 else "")
            problems.append(f"{label} {shown}")
    if problems:
        raise ModelError(f"{what} {' and '.join(problems)}")
