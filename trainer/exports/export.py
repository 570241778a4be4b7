"""The trained model as files that transformers, audiocraft and our own scripts load.

Every file and folder is complete or still the former one: it is written under another name, and renamed when it is
complete (trainer/atomic.py).
"""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import MusicgenForConditionalGeneration, MusicgenMelodyForConditionalGeneration

from trainer.atomic import replacing, replacing_folder
from trainer.errors import ModelError, StorageError
from trainer.exports.audiocraft_config import (
    CODEC_NAME,
    CONFIG,
    TEXT_ENCODERS,
    codec_config,
    config_beside,
    lm_config,
    published_codec,
    text_encoder_name,
)
from trainer.exports.audiocraft_files import CODEC_FILE, LM_FILE, STATE
from trainer.exports.audiocraft_names import codec_to_audiocraft, lm_to_audiocraft, plain_names
from trainer.exports.processor_files import PIECES, save_processor, save_tokenizer
from trainer.exports.strength import weights_at_strength
from trainer.model.lora import save_adapter
from trainer.model.new_word import FILE as TEXT_EMBEDDING_FILE
from trainer.model.new_word import TextEmbedding, with_embedding, write_text_embedding
from trainer.model.source import CODEC, LANGUAGE_MODEL, TEXT_ENCODER, Source, load_codec, load_text_encoder
from trainer.model.trained_model import merged
from trainer.model.weights import under
from trainer.spec.trainable import EVERYTHING, Lora, Selection

# The largest file in huggingface/: transformers holds the tensors of a file twice while it writes it.
MAX_SHARD_SIZE = "4GB"
# What audiocraft's own exports hold besides tensors and configuration. The version is the one whose layout we write.
PACKAGE = {"version": "1.3.0", "exported": True}
# Of every T5 on the hub: 32,000 pieces and 100 tokens for gaps.
PUBLISHED_TOKENS = 32_100
TEXT_EMBEDDING = "encoder.embed_tokens.weight"
# What this or another version of the program, or of transformers, writes into the exported folders: a new export leaves
# none of it from the former one, because a loader would take it for a part of the new model.
OUR_NAME = re.compile(
    r"(adapter_)?model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
    r"|((generation_|tokenizer_|processor_|preprocessor_|adapter_)?config|tokenizer|special_tokens_map|added_tokens)\.json"
    r"|spiece\.model|(compression_)?state_dict\.bin|README\.md"
)


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """What exported files tell of a run.

    card             README.md of huggingface/
    segment_seconds  of the training crops
    cfg_dropout      share of captions that were dropped
    melody_rate      share of clips that had their caption and not their melody; 0 for text models
    selection        which parameters the run trained
    adapter_card     README.md of adapter/, which is written where the run trained a LoRA
    base_model       the hub id that adapter/ names as its base; None where that has none
    strength         of what was trained, 0 to 2 (trainer/exports/strength.py)
    """

    card: str
    segment_seconds: float
    cfg_dropout: float
    selection: Selection = EVERYTHING
    adapter_card: str = ""
    base_model: str | None = None
    melody_rate: float = 0.0
    strength: float = 1.0


def export_all(source: Source, trained: Mapping[str, Tensor], output_dir: Path, settings: ExportSettings) -> None:
    """Write lm_final.pt, huggingface/ and audiocraft/ into `output_dir`, each replaced by a complete new one.

    source   the model that the run started with
    trained  the parameters that the run trained, by name, on any device; where those are all of a LanguageModel,
             prefixes of wrappers are allowed

    Holds one float32 copy of the language model at most, besides `trained`. Raises StorageError, saying what of the
    export is valid, and ModelError where the weights do not fit the source.
    """
    weights = merged(source, trained, settings.selection)
    if settings.strength != 1:
        base = source.weights.starting_with(*LANGUAGE_MODEL)
        weights = weights_at_strength(base, weights, settings.strength, base_name=source.name, tuned_name="the run")
    writers: dict[str, Callable[[Path], None]] = {
        "lm_final.pt": lambda path: write_lm(weights, path),
        "huggingface": lambda path: write_huggingface(source, weights, path, settings.card),
        "audiocraft": lambda path: write_audiocraft(
            source,
            weights,
            path,
            segment_seconds=settings.segment_seconds,
            cfg_dropout=settings.cfg_dropout,
            melody_rate=settings.melody_rate,
        ),
    }
    if (lora := settings.selection.lora) is not None:
        # The adapters' product is scaled by alpha / rank: peft then adds them to the base at this strength.
        scaled = replace(lora, alpha=lora.alpha * settings.strength)
        writers["adapter"] = lambda path: write_adapter(
            trained, scaled, path, settings.base_model, settings.adapter_card
        )
    done: list[str] = []
    for name, write in writers.items():
        try:
            write(output_dir / name)
        except StorageError as error:
            former = [other for other in writers if other not in done and (output_dir / other).exists()]
            raise StorageError(
                f"{error}. Complete from this export: {', '.join(done) or 'nothing'};"
                f" still the former export: {', '.join(former) or 'nothing'}. The checkpoints are untouched:"
                " make room or choose another --output_dir, and run the same command again"
            ) from error
        done.append(name)


def export_text(source: Source, embedding: TextEmbedding, output_dir: Path, *, card: str) -> None:
    """Write text_embedding.safetensors, and huggingface/ with a tokenizer and a T5 that know the learned word.

    The language model is the source's, so that there is no lm_final.pt and no audiocraft/ to write.
    card  README.md of huggingface/

    Raises StorageError and ModelError.
    """
    write_text_embedding(embedding, output_dir / TEXT_EMBEDDING_FILE)
    extended = with_embedding(source, embedding)
    write_huggingface(extended, extended.weights.starting_with(*LANGUAGE_MODEL), output_dir / "huggingface", card)


def write_lm(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write lm_final.pt or lm_<step>.pt, for `model.lm.load_state_dict(torch.load(path))` in audiocraft.

    weights  of a whole LanguageModel; written in float32

    Raises StorageError, which leaves a former file as it was.
    """
    with _storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            _save(_float32_lm(weights), partial)


def write_adapter(adapters: Mapping[str, Tensor], lora: Lora, folder: Path, base_model: str | None, card: str) -> None:
    """Write an adapter as peft writes it (see save_adapter), and `card` as README.md. Raises StorageError."""
    with _new_folder(folder) as partial:
        (partial / "README.md").write_text(card, encoding="utf-8")
        save_adapter(partial, adapters, lora, base_model)


def write_huggingface(source: Source, weights: Mapping[str, Tensor], folder: Path, card: str) -> None:
    """Write what MusicgenForConditionalGeneration, MusicgenProcessor and the text-to-audio pipeline load.

    A melody model is for MusicgenMelodyForConditionalGeneration and MusicgenMelodyProcessor, and no pipeline takes it.
    Everything is float32 and in safetensors. T5, EnCodec and the configuration are the source's: the decoder's dropout
    there is the base model's, not the run's.
    weights  of a whole LanguageModel
    card     becomes README.md

    Raises StorageError and ModelError.
    """
    with _new_folder(folder) as partial:
        save_processor(source, partial)
        (partial / "README.md").write_text(card, encoding="utf-8")
        _assembled(source, weights).save_pretrained(partial, max_shard_size=MAX_SHARD_SIZE)


def write_audiocraft(
    source: Source,
    weights: Mapping[str, Tensor],
    folder: Path,
    *,
    segment_seconds: float,
    cfg_dropout: float,
    melody_rate: float = 0.0,
) -> None:
    """Write what audiocraft's `MusicGen.get_pretrained(folder)` loads: language model and the whole EnCodec.

    A T5 that audiocraft would not find under its name on the hub is written into the folder as well. audiocraft finds
    it only where the folder is the working directory, which the folder's README.md says. Where T5 and EnCodec are the
    published ones, there is a config.json for mlx-examples, which takes both from the hub and knows mono text models.
    weights                                    of a whole LanguageModel
    segment_seconds, cfg_dropout, melody_rate  see `lm_config`

    Raises StorageError and ModelError.
    """
    name = text_encoder_name(source.config)
    config = lm_config(
        source.config,
        text_encoder_name=name,
        segment_seconds=segment_seconds,
        cfg_dropout=cfg_dropout,
        melody_rate=melody_rate,
    )
    tokenizer, text_config = source.load_tokenizer(), source.config.text_encoder
    # A T5 that has the name of a published one and is another, as the debug model's or one that knows a learned word,
    # is told by its tokenizer.
    own_text_encoder = text_config._name_or_path != name or len(tokenizer) != PUBLISHED_TOKENS
    with _new_folder(folder) as partial:
        if own_text_encoder:
            save_tokenizer(tokenizer, partial / name)
            load_text_encoder(source).save_pretrained(partial / name)
        codec = load_codec(source)
        if published_codec(codec.config) and not own_text_encoder and _known_to_mlx(source):
            beside = config_beside(source.config, text_encoder_name=name)
            (partial / "config.json").write_text(beside, encoding="utf-8")
        (partial / "README.md").write_text(_audiocraft_readme(partial, name, source), encoding="utf-8")
        package = {STATE: codec_to_audiocraft(codec.state_dict()), CONFIG: codec_config(codec.config)}
        _save(package | PACKAGE, partial / CODEC_FILE)
        _save({STATE: _float32_lm(weights), CONFIG: config} | PACKAGE, partial / LM_FILE)


def _assembled(
    source: Source, weights: Mapping[str, Tensor]
) -> MusicgenForConditionalGeneration | MusicgenMelodyForConditionalGeneration:
    kind = MusicgenMelodyForConditionalGeneration if source.melody else MusicgenForConditionalGeneration
    with torch.device("meta"):
        model = kind(copy.deepcopy(source.config))
    tensors = {plain: weights[name].detach().float().cpu() for plain, name in plain_names(weights).items()}
    for prefix in (CODEC, TEXT_ENCODER):
        frozen = under(source.weights, prefix)
        tensors |= {
            prefix + name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in frozen.items()
        }
    tensors[TEXT_ENCODER + TEXT_EMBEDDING] = tensors[TEXT_ENCODER + "shared.weight"]
    try:
        model.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        raise ModelError(f"the trained weights do not fit {source.name}: {error}") from error
    model.tie_weights()
    model.generation_config = copy.deepcopy(source.generation_config)
    return model


def _float32_lm(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = lm_to_audiocraft(weights)
    for name in state:
        state[name] = state[name].float()
    return state


def _save(value: object, path: Path) -> None:
    try:
        with path.open("wb") as file:
            torch.save(value, file)
    except RuntimeError as error:  # what torch.save raises where the disk takes a part of a write only
        raise OSError(f"the file could not be written whole ({error})") from error


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of `folder` when the block ends without an error.

    What the user has put beside the program's files in `folder` moves along.
    """
    with _storage_errors(folder), replacing_folder(folder, is_ours=_is_ours) as partial:
        yield partial
        for path in partial.rglob("*"):
            # safetensors makes files that only their owner can read. Many mounts (exFAT, SMB, S3) know no such rights
            # and refuse to set any; nothing of the export depends on it.
            if path.is_file():
                with suppress(OSError):
                    shutil.copymode(partial / "README.md", path)


def _is_ours(name: str) -> bool:
    """Whether the program wrote this file into an exported folder, or this T5, which audiocraft would take up."""
    return OUR_NAME.fullmatch(name) is not None or name in {known.split("/")[0] for known in TEXT_ENCODERS}


@contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    """Turn what a full or read-only disk raises into a StorageError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        free = _free_bytes(path)
        raise StorageError(f"{path} could not be written: {error} ({free / 2**30:.2f} GiB free)") from error


def _free_bytes(path: Path) -> int:
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _known_to_mlx(source: Source) -> bool:
    """Whether mlx-examples has models of this kind: it delays each codebook by one frame more, and reads no melody."""
    return source.channels == 1 and not source.melody


def _audiocraft_readme(folder: Path, text_encoder: str, source: Source) -> str:
    """How the folder is loaded, by what was written into it."""
    text = "For `MusicGen.get_pretrained` of audiocraft (1.3.0).\n"
    if source.channels == 2:
        text += "\nIt makes stereo: `generate` returns (prompts, 2, samples).\n"
    if source.melody:
        text += (
            "\nIt reads a melody: `generate_with_chroma(descriptions, melody, rate)`. To load melody models, audiocraft"
            " needs torchaudio, librosa and demucs, and it downloads demucs's weights (htdemucs).\n"
        )
    if (folder / text_encoder).is_dir():
        text += (
            f"\nIts text encoder, T5, is the folder {text_encoder}/ and not the one of that name on the hub."
            " audiocraft finds it only where this folder is the working directory:\n\n```\ncd audiocraft\n"
            "python -c \"from audiocraft.models import MusicGen; MusicGen.get_pretrained('.')\"\n```\n"
        )
        if not (folder / text_encoder / PIECES).is_file():
            text += (
                "\nThat needs transformers 5 or newer. With transformers 4, as audiocraft's own environment has it,"
                " T5Tokenizer reads only a spiece.model, which cannot hold the words that this T5's tokenizer knows.\n"
            )
    if (folder / "config.json").is_file():
        text += (
            "\nThe musicgen of mlx-examples reads config.json and state_dict.bin here, and takes T5 and EnCodec"
            f" from the hub: {text_encoder} and {CODEC_NAME}.\n"
        )
    elif not _known_to_mlx(source):
        text += "\nThe musicgen of mlx-examples cannot use it: that knows mono models without melody only.\n"
    else:
        text += (
            "\nThe musicgen of mlx-examples cannot use it: that takes T5 and EnCodec from the hub, which has not"
            " those of this model.\n"
        )
    return text
