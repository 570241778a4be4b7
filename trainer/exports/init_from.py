"""The language model that `--init_from` names, from which a run starts in place of the base model's own.

The base (`--model_id`) still gives the configuration, T5, EnCodec and the tokenizer. No tensor is copied here: each is
read later from where it lies, in the ranges that each process needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from transformers import AutoConfig, MusicgenConfig, MusicgenMelodyConfig

from trainer.errors import CheckpointError, ModelError
from trainer.exports.audiocraft_config import delays_of
from trainer.exports.audiocraft_files import LM_FILE, SOLVER_FILE, read_audiocraft
from trainer.model.lora import ADAPTER_CONFIG, DOWN, UP, read_adapter
from trainer.model.source import LANGUAGE_MODEL, MELODY_PROJECTION, Source
from trainer.model.trained_model import merged
from trainer.model.weights import INDEX_FILES, SINGLE_FILES, Weights, weights_in_folder, weights_in_memory
from trainer.run.checkpoint import Checkpoint, newest
from trainer.spec.model_folder import model_folder
from trainer.spec.trainable import EVERYTHING, Selection, selection_of_flags

KINDS = (
    "an output_dir of a run or one of its checkpoints/step-... folders, an lm_*.pt, a Hugging Face folder,"
    " audiocraft's folder or state_dict.bin, its solver's checkpoint.th, or a LoRA's folder of peft"
)
FINAL = "lm_final.pt"


@dataclass(frozen=True, kw_only=True)
class StartingPoint:
    """A language model, or the trained parameters of one, found in `path`.

    weights   by the names of `LanguageModel`, or by peft's names where they are adapters
    settings  what the model's numbers depend on and no tensor's shape tells, by name, as far as the files say it
    parts     digests of the EnCodec and the T5 that it was trained beside, by name, as far as the files say them
    trained   which parameters `weights` holds: those that its run trained
    frozen    Source.probe of the model that holds the other parameters; None where `weights` holds all, or where the
              files do not say it
    """

    path: Path
    weights: Weights
    settings: Mapping[str, object] = field(default_factory=dict)
    parts: Mapping[str, object] = field(default_factory=dict)
    trained: Selection = EVERYTHING
    frozen: object = None


def find_starting_point(path: str) -> StartingPoint:
    """The language model in `path`, one of KINDS; of a run its newest checkpoint, or its export if none is left.

    No tensor is copied. Raises ModelError where there is none, and where it is damaged.
    """
    location = Path(path).expanduser()
    try:
        if location.is_file():
            return _audiocraft(location)
        folder = model_folder(path)
        if folder is not None:
            return _in_folder(folder)
    except (ModelError, CheckpointError) as error:
        raise ModelError(f"--init_from {path}: {error}") from error
    raise ModelError(
        f"--init_from {path}: there is no such file or folder. It takes {KINDS}; a hub id goes to --model_id"
    )


def start_from(source: Source, point: StartingPoint) -> Source:
    """`source` with the language model of `point` in place of its own; all else stays the source's.

    Raises ModelError where its shapes or settings are not the source's, and where it was trained beside another
    EnCodec or T5.
    """
    point = _completed(source, point)
    _check_fits(source, point)
    # A Hugging Face folder holds a T5 and an EnCodec too. Those of the base are used, so that its cache serves, and so
    # that the run goes on beside the same ones when PATH is gone.
    language_model = point.weights.starting_with(*LANGUAGE_MODEL)
    started = replace(source, weights=source.weights.replaced(language_model))
    _check_parts(started, point)
    return started


def _in_folder(folder: Path) -> StartingPoint:
    if (folder / ADAPTER_CONFIG).is_file():
        lora, tensors = read_adapter(folder)
        return StartingPoint(path=folder, weights=weights_in_memory(tensors), trained=Selection(lora=lora))
    if (folder / "checkpoint.json").is_file():
        return _checkpoint(Checkpoint(folder))
    for checkpoints in (folder / "checkpoints", folder):
        checkpoint = newest(checkpoints)
        if checkpoint is not None:
            return _checkpoint(checkpoint)
    for name in (FINAL, LM_FILE, SOLVER_FILE):
        if (folder / name).is_file():
            return _audiocraft(folder / name)
    if any((folder / name).is_file() for name in SINGLE_FILES + INDEX_FILES):
        return _huggingface(folder)
    raise ModelError(f"this folder holds no model to start from. It takes {KINDS}")


def _checkpoint(checkpoint: Checkpoint) -> StartingPoint:
    identity = checkpoint.run.identity
    parts = {name: identity[name] for name in ("codec", "text encoder") if name in identity}
    weights, frozen = checkpoint.weights(), identity.get("frozen weights")
    if frozen is None:
        return StartingPoint(path=checkpoint.folder, weights=weights, parts=parts)
    trained = selection_of_flags(checkpoint.run.flags)
    if trained.new_rows:
        raise ModelError(
            f"{checkpoint.folder} holds {trained.describe()}, which its run learned, and no language model: start from"
            " what that run started from"
        )
    return StartingPoint(path=checkpoint.folder, weights=weights, parts=parts, trained=trained, frozen=frozen)


def _audiocraft(file: Path) -> StartingPoint:
    model = read_audiocraft(file)
    config = model.config
    settings: dict[str, object] = {}
    if config is not None:
        settings = {"attention heads": config.heads, "activation": config.activation, "delays": config.delays}
    return StartingPoint(path=file, weights=weights_in_memory(model.state), settings=settings)


def _huggingface(folder: Path) -> StartingPoint:
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} holds no readable config.json ({error})") from error
    if not isinstance(config, (MusicgenConfig, MusicgenMelodyConfig)):
        raise ModelError(f"{folder} holds a {config.model_type} model, not a MusicGen")
    return StartingPoint(path=folder, weights=weights_in_folder(folder), settings=_settings(config))


def _settings(config: MusicgenConfig | MusicgenMelodyConfig) -> dict[str, object]:
    decoder = config.decoder
    return {
        "attention heads": decoder.num_attention_heads,
        "activation": decoder.activation_function,
        "delays": delays_of(decoder.num_codebooks, decoder.audio_channels),
    }


def _completed(source: Source, point: StartingPoint) -> StartingPoint:
    """The starting point with the parameters that its run did not train, which are the source's."""
    if point.trained.everything:
        return point
    if point.frozen not in (None, source.probe()):
        raise ModelError(
            f"--init_from {point.path} holds what was trained ({point.trained.describe()}), not the frozen rest, which"
            f" is not that of --model_id {source.name}: give the run's {FINAL} or an lm_*.pt, which are whole"
        )
    if point.trained.lora:
        _check_adapters(source, point)
    return replace(point, weights=merged(source, point.weights, point.trained), trained=EVERYTHING, frozen=None)


def _check_adapters(source: Source, point: StartingPoint) -> None:
    """Raise ModelError for an adapter of a layer that the source has not, or has in another size.

    Merging passes over the first, such as the text's attention where the base is a melody model.
    """
    for name in sorted(name for name in point.weights if name.endswith(UP)):
        stem = name.removesuffix(UP)
        layer, (outputs, _), (_, inputs) = stem + ".weight", point.weights.shape(name), point.weights.shape(stem + DOWN)
        found = source.weights.shape(layer) if layer in source.weights else None
        if found != (outputs, inputs):
            raise ModelError(
                f"--init_from {point.path} does not fit --model_id {source.name}: it has an adapter for {layer} of"
                f" {(outputs, inputs)}, which is {'absent' if found is None else found} in the base; give --model_id"
                " the model that it was trained from"
            )


def _check_fits(source: Source, point: StartingPoint) -> None:
    shapes, wanted = _shapes(point.weights), _shapes(source.weights)
    mismatch = f"--init_from {point.path} does not fit --model_id {source.name}"
    advice = "give --model_id the model that it was trained from"
    kind, wanted_kind = (_kind(names, source.codebooks // source.channels) for names in (shapes, wanted))
    if kind != wanted_kind:
        raise ModelError(f"{mismatch}: it is a {kind}, the base is a {wanted_kind}; {advice}")
    if shapes != wanted:
        name = min(name for name in wanted.keys() | shapes.keys() if wanted.get(name) != shapes.get(name))
        raise ModelError(
            f"{mismatch}: it has {_size(shapes)}, the base has {_size(wanted)} ({name}: {_shape(shapes, name)} there,"
            f" {_shape(wanted, name)} in the base); {advice}"
        )
    for name, value in _settings(source.config).items():
        if point.settings.get(name, value) != value:
            raise ModelError(f"{mismatch}: {name} {point.settings[name]} there, {value} in the base; {advice}")


def _check_parts(source: Source, point: StartingPoint) -> None:
    """Refuse a language model that was trained beside another EnCodec or T5: its codes and texts mean other things."""
    now = {"codec": source.codec_identity(), "text encoder": source.text_identity()}
    for name, digest in point.parts.items():
        if digest != now[name]:
            raise ModelError(
                f"--init_from {point.path} was trained beside another {name} ({digest} then, {now[name]} in --model_id"
                f" {source.name}): give --model_id the model that it was trained from. If they are known to be alike,"
                f" give the run's {FINAL}, of which this is not asked"
            )


def _shapes(weights: Weights) -> dict[str, tuple[int, ...]]:
    return {name: weights.shape(name) for name in weights if name.startswith(LANGUAGE_MODEL)}


def _kind(shapes: Mapping[str, tuple[int, ...]], codebooks: int) -> str:
    """Which of the four kinds of MusicGen has these tensors, of which a channel has so many codebooks."""
    channels = "stereo" if _codebooks(shapes) == 2 * codebooks else "mono"
    return f"{channels} {'melody' if MELODY_PROJECTION + 'weight' in shapes else 'text'} model"


def _size(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """A language model's size as text, from the names and shapes of its tensors."""
    layers = len({name.split(".")[4] for name in shapes if ".layers." in name})
    width = shapes.get("decoder.model.decoder.layer_norm.weight", (0,))[0]
    return f"{layers} layers of width {width}, {_codebooks(shapes)} codebooks"


def _codebooks(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return len([name for name in shapes if ".embed_tokens." in name])


def _shape(shapes: Mapping[str, tuple[int, ...]], name: str) -> str:
    return str(shapes[name]) if name in shapes else "absent"
