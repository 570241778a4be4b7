"""The model that `--model` of a script names, as a Source: whatever a run wrote, and every base model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    EncodecConfig,
    GenerationConfig,
    MusicgenConfig,
    MusicgenDecoderConfig,
    MusicgenMelodyConfig,
    MusicgenMelodyDecoderConfig,
    T5Config,
    T5EncoderModel,
)

from trainer.errors import CheckpointError, ModelError
from trainer.exports.audiocraft_config import CONFIG, AudiocraftConfig
from trainer.exports.audiocraft_files import CODEC_FILE, LM_FILE, AudiocraftModel, read_audiocraft, read_codec
from trainer.exports.first_model import first_model
from trainer.exports.init_from import find_starting_point, start_from
from trainer.model.lora import ADAPTER_CONFIG, base_named_by
from trainer.model.source import CODEC, LANGUAGE_MODEL, TEXT_ENCODER, Source, codec_feature_extractor, open_model
from trainer.model.stereo import Embeddings, in_stereo
from trainer.model.weights import current_name, weights_in_memory
from trainer.run.checkpoint import Checkpoint
from trainer.spec.model_folder import model_folder
from trainer.spec.trainable import selection_of_flags

RUN_CONFIG = "config.json"
STEP_FILE = re.compile(r"lm_\d+\.pt")  # other names are the user's, and taken only where they are given
LM_SUFFIXES = (".pt", ".bin", ".th", ".ckpt")


def open_saved(model: str, *, base: str | None = None) -> Source:
    """The model that `--model` names; the tensors of its language model stay on disk until they are used.

    model  an output_dir, its huggingface/, audiocraft/ or adapter/, an lm_final.pt or lm_<step>.pt, a checkpoint's
           folder, or what open_model takes: a folder, a hub id, a short name, debug
    base   where an lm_*.pt, a checkpoint or audiocraft/ takes T5 and EnCodec from, instead of from the run's own base;
           and what an adapter is put onto, instead of what its run started from

    Raises ModelError where there is no such model, or where it is incomplete.
    """
    path = _path_of(model)
    if path.is_dir() and (path / LM_FILE).is_file():
        return _open_audiocraft(path) if base is None else _with_language_model(path, open_named(base, "--base"))
    if path.is_file() or (path.suffix in LM_SUFFIXES and not path.is_dir()):
        if not path.is_file():
            raise ModelError(f"--model {model}: there is no such file")
        if path.name == LM_FILE and base is None:
            return _open_audiocraft(path.parent)
        return _with_language_model(path, _base_of_run(path) if base is None else open_named(base, "--base"))
    if (path / "checkpoint.json").is_file():
        return _open_checkpoint(path, base)
    if (path / ADAPTER_CONFIG).is_file():
        return _open_adapter(path, base)
    if base is not None:
        raise ModelError(
            f"--base {base} is for an lm_*.pt, a checkpoint, an adapter/ or an audiocraft/ folder; --model {model} is"
            " none: leave --base out"
        )
    if _is_run(path):
        path = _huggingface_of_run(path)
        model = str(path)
    return open_named(model, "--model")


def takes_base(model: str) -> bool:
    """Whether open_saved takes a `base` with this model."""
    path = _path_of(model)
    files = (LM_FILE, "checkpoint.json", ADAPTER_CONFIG)
    if path.is_dir():
        return any((path / name).is_file() for name in files)
    return path.suffix in LM_SUFFIXES


def run_of(path: Path) -> Path | None:
    """The output_dir that a file or folder is, or lies in: in exports/step-7/huggingface too. None where it is in none.

    It is known by its config.json, which names the model that it was trained from.
    """
    if not path.exists():
        return None
    whole = path.absolute()
    return next((folder for folder in (path, *whole.parents[:3]) if _flags_of_run(folder) is not None), None)


def _path_of(model: str) -> Path:
    """The path that `model` is if it is one; of a folder of the Hugging Face cache its snapshot."""
    try:
        return model_folder(model) or Path(model).expanduser()
    except ModelError as error:
        raise ModelError(f"--model {model}: {error}") from None


def open_named(model: str, flag: str) -> Source:
    """open_model, whose errors name the flag that named the model."""
    try:
        return open_model(model)
    except ModelError as error:
        raise ModelError(str(error).replace("--model_id", flag)) from error


def _is_run(path: Path) -> bool:
    return path.is_dir() and ((path / "huggingface").is_dir() or (path / "checkpoints").is_dir())


def _huggingface_of_run(path: Path) -> Path:
    if (path / "huggingface").is_dir():
        return path / "huggingface"
    ours = [file for file in path.glob("lm_*.pt") if STEP_FILE.fullmatch(file.name)]
    steps = sorted(ours, key=lambda file: int(file.stem.removeprefix("lm_")))
    instead = f"give {steps[-1]}, its newest lm_*.pt, or " if steps else ""
    raise ModelError(f"{path} holds a run that has not been exported yet: {instead}let the run finish")


def _base_of_run(path: Path) -> Source:
    """The model that the run that wrote this lm_*.pt was given as --model_id."""
    run = run_of(path)
    if run is None:
        raise ModelError(
            f"{path} holds a language model only, and there is no {RUN_CONFIG} of a run beside it or above that"
            " names the model it was trained from: add --base with that model (small, medium, large, a hub id or a"
            " folder), whose T5 and EnCodec are used"
        )
    return open_named(str((_flags_of_run(run) or {})["model_id"]), "--base")


def _flags_of_run(folder: Path) -> dict[str, Any] | None:
    """The flags in a run's config.json; None for a folder that holds none, such as one of Hugging Face."""
    try:
        flags = json.loads((folder / RUN_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return flags if isinstance(flags, dict) and "model_id" in flags else None


def _open_checkpoint(folder: Path, base: str | None) -> Source:
    """The base of a checkpoint's run with the weights that the run would export from it."""
    try:
        return with_trained(folder, _first_model(Checkpoint(folder).run.flags, base))
    except (KeyError, CheckpointError) as error:
        raise ModelError(f"--model {folder}: {error}") from error


def _open_adapter(folder: Path, base: str | None) -> Source:
    """What the adapter's run started from, or what the adapter itself names, with the adapter merged."""
    run, named = run_of(folder), base_named_by(folder)
    if run is not None:
        return with_trained(folder, _first_model(_flags_of_run(run) or {}, base))
    if base is None and named is None:
        raise ModelError(
            f"{folder} holds an adapter and does not name the model that it was trained on, and there is no"
            f" {RUN_CONFIG} of a run above: add --base with that model"
        )
    return with_trained(folder, open_named(base or str(named), "--base"))


def _first_model(flags: Mapping[str, Any], base: str | None) -> Source:
    """What a run with these flags started from, as far as it did not train all of it; `base` instead of --model_id."""
    source = open_named(base or str(flags["model_id"]), "--base")
    # What the run did not train, it took from there.
    start = None if selection_of_flags(flags).everything else flags.get("init_from")
    point = None if start is None else find_starting_point(str(start))
    # With --base that may be a stereo model, which needs not be made one.
    made_stereo = bool(flags.get("stereo")) and source.channels == 1
    embeddings: Embeddings = "copied" if flags.get("stereo_init") == "copied" else "halved"
    return first_model(source, point, embeddings if made_stereo else None)


def with_trained(folder: Path, source: Source) -> Source:
    """`source` with what was trained of it: a checkpoint's folder, or one of peft with an adapter.

    Raises ModelError where it was trained of another model.
    """
    try:
        return replace(start_from(source, find_starting_point(str(folder))), name=str(folder))
    except ModelError as error:
        raise ModelError(str(error).replace(f"--init_from {folder}", f"--model {folder}")) from error


def _with_language_model(path: Path, base: Source) -> Source:
    """The model `base` with the language model of a file or folder of audiocraft in place of its own.

    A mono base is taken for a stereo language model too, which a run made of it with --stereo 1: all its tensors are
    replaced, and T5 and EnCodec are the same ones.
    """
    state = read_audiocraft(path).state
    heads = sum(name.startswith("decoder.lm_heads.") for name in state)
    source = in_stereo(base) if base.channels == 1 and heads == 2 * base.codebooks else base
    own = {name for name in source.weights if name.startswith(LANGUAGE_MODEL)}
    wrong = [name for name in own & set(state) if source.weights.shape(name) != tuple(state[name].shape)]
    if own != set(state) or wrong:
        raise ModelError(
            f"{path} is not a language model of the size of {base.name} ({base.decoder_shape()}): give --base the"
            " model that it was trained from"
        )
    return replace(source, name=str(path), weights=source.weights.replaced(weights_in_memory(state)))


def _open_audiocraft(folder: Path) -> Source:
    """The model of a folder with audiocraft's two files. Its T5 is a folder inside, or that of the hub by its name."""
    package = read_audiocraft(folder / LM_FILE)
    if package.config is None:
        raise ModelError(f"{folder / LM_FILE} has no {CONFIG}: add --base with the model that it was trained from")
    codec_config, codec = read_codec(folder / CODEC_FILE)
    encoder, location = _text_encoder(folder, package.config.text_encoder)
    try:
        config = _config_of(package, package.config, encoder.config, codec_config)
    except ValueError as error:
        raise ModelError(f"{folder}: {error}") from error
    text = {TEXT_ENCODER + name: tensor for name, tensor in encoder.state_dict().items()}
    weights: dict[str, Tensor] = {name: tensor for name, tensor in text.items() if current_name(name)}
    weights |= {CODEC + name: tensor for name, tensor in codec.items()} | package.state
    special = config.decoder.pad_token_id
    return Source(
        name=str(folder),
        config=config,
        generation_config=GenerationConfig(bos_token_id=special, pad_token_id=special, decoder_start_token_id=special),
        weights=weights_in_memory(weights),
        load_tokenizer=lambda: AutoTokenizer.from_pretrained(location),
        load_feature_extractor=lambda: codec_feature_extractor(config),
    )


def _config_of(
    model: AudiocraftModel, said: AudiocraftConfig, text_encoder: T5Config, codec: EncodecConfig
) -> MusicgenConfig | MusicgenMelodyConfig:
    """The configuration of transformers for a model of audiocraft, which has `said`, and its two other parts.

    Raises ValueError for delays that are neither those of a mono model nor of a stereo one.
    """
    whole, part = (
        (MusicgenMelodyConfig, MusicgenMelodyDecoderConfig) if said.melody else (MusicgenConfig, MusicgenDecoderConfig)
    )
    codes = model.state["decoder.model.decoder.embed_tokens.0.weight"].shape[0] - 1
    decoder = part(
        vocab_size=codes,
        hidden_size=said.width,
        num_hidden_layers=said.layers,
        num_attention_heads=said.heads,
        ffn_dim=model.state["decoder.model.decoder.layers.0.fc1.weight"].shape[0],
        num_codebooks=len(said.delays),
        activation_function=said.activation,
        audio_channels=said.audio_channels,
        pad_token_id=codes,
        bos_token_id=codes,
    )
    return whole(text_encoder=text_encoder.to_dict(), audio_encoder=codec.to_dict(), decoder=decoder.to_dict())


def _text_encoder(folder: Path, name: str) -> tuple[T5EncoderModel, str]:
    """T5 in float32, and the folder or hub id of its tokenizer."""
    location = str(folder / name) if (folder / name).is_dir() else name
    try:
        return T5EncoderModel.from_pretrained(location, dtype=torch.float32), location
    except OSError as error:
        raise ModelError(
            f"{folder} needs the T5 {name}, which is neither a folder in it nor could be fetched"
            f" ({str(error).splitlines()[0]}): add --base with a MusicGen that has it"
        ) from error
