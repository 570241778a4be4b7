"""The small files in the folder of a model: its configuration, its tokenizer, how it generates. Read and checked."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoTokenizer,
    GenerationConfig,
    MusicgenConfig,
    MusicgenMelodyConfig,
    PreTrainedTokenizerBase,
)

from trainer.errors import ModelError
from trainer.spec.shapes import CHROMA_BINS, MELODY_PLACES

MELODY_CODEC = 32_000, 640  # Hz, and samples a frame (trainer/data/chroma.py)
TOKENIZER_FILES = ("tokenizer.json", "spiece.model")


def read_config(folder: Path, model_id: str) -> MusicgenConfig | MusicgenMelodyConfig:
    """The configuration of a MusicGen. Raises ModelError, which names `model_id`, where it is none that is known."""
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise ModelError(f"--model_id {model_id}: {folder} holds no readable config.json ({error})") from error
    if not isinstance(config, (MusicgenConfig, MusicgenMelodyConfig)):
        raise ModelError(f"--model_id {model_id} is a {config.model_type} model, not a MusicGen")
    codec = config.audio_encoder
    if codec.model_type != "encodec" or codec.normalize or codec.chunk_length_s is not None or codec.use_causal_conv:
        raise ModelError(f"--model_id {model_id}: only EnCodec as MusicGen has it (facebook/encodec_32khz) is known")
    if config.text_encoder.model_type != "t5":
        raise ModelError(f"--model_id {model_id}: only T5 as text encoder is known")
    if config.text_encoder.hidden_size == config.decoder.hidden_size:
        raise ModelError(f"--model_id {model_id}: it has no enc_to_dec_proj, which audiocraft's layout needs")
    if (refused := _why_no_musicgen(config)) is not None:
        raise ModelError(f"--model_id {model_id}: {refused}")
    return config


def _why_no_musicgen(config: MusicgenConfig | MusicgenMelodyConfig) -> str | None:
    """What about channels and melody no published model has; None where there is nothing."""
    decoder, codec = config.decoder, config.audio_encoder
    if decoder.audio_channels not in (1, 2) or codec.audio_channels != 1:
        return (
            f"its decoder is of {decoder.audio_channels} channels and its EnCodec of {codec.audio_channels}: only mono"
            " and stereo models are known, whose EnCodec encodes each channel by itself"
        )
    if decoder.audio_channels == 2 and decoder.num_codebooks != 2 * codec.num_quantizers:
        return (
            f"it is a stereo model of {decoder.num_codebooks} codebooks, and its EnCodec makes {codec.num_quantizers}"
            f" of each channel: {2 * codec.num_quantizers} would fit"
        )
    if isinstance(config, MusicgenMelodyConfig) and (codec.sampling_rate, codec.hop_length) != MELODY_CODEC:
        return (
            f"its EnCodec is of {codec.sampling_rate} Hz and {codec.hop_length} samples a frame: only melody models of"
            " 32000 Hz and 640 samples a frame are known, by which a melody's notes are spaced"
        )
    if isinstance(config, MusicgenMelodyConfig) and (config.num_chroma, config.chroma_length) != (
        CHROMA_BINS,
        MELODY_PLACES,
    ):
        return (
            f"its melodies are {config.chroma_length} places of {config.num_chroma} notes: only those of MusicGen,"
            f" {MELODY_PLACES} places of {CHROMA_BINS}, are known"
        )
    return None


def read_tokenizer(folder: Path, model_id: str) -> PreTrainedTokenizerBase:
    """T5's tokenizer. Raises ModelError where it cannot be read."""
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"--model_id {model_id}: the tokenizer in {folder} cannot be read ({error!r}): download the model again"
        ) from error


def require_processor(folder: Path, model_id: str, *, melody: bool) -> None:
    """Raise ModelError where the folder lacks a tokenizer or a feature extractor; of a melody model, a tokenizer.

    The tokenizer is looked for by file: without one AutoTokenizer raises nothing and makes T5's, with no words in it.
    """
    lacking = [] if any((folder / name).is_file() for name in TOKENIZER_FILES) else [TOKENIZER_FILES[0]]
    if not melody:
        try:
            AutoFeatureExtractor.from_pretrained(folder)
        except (OSError, ValueError):
            lacking.append("preprocessor_config.json")
    if lacking:
        save = "MusicgenProcessor.from_pretrained(...).save_pretrained(...)"
        advice = f"save the base model's processor there too, with {save}"
        if (folder / "compression_state_dict.bin").is_file():
            advice = "it is a folder for audiocraft: give the huggingface/ beside it, or this one to --init_from"
        raise ModelError(f"--model_id {model_id}: {folder} lacks {' and '.join(lacking)}: {advice}")


def read_generation_config(
    folder: Path, model_id: str, config: MusicgenConfig | MusicgenMelodyConfig
) -> GenerationConfig:
    """How the model generates; where the folder does not say it, as published ones do. Raises ModelError."""
    file = folder / "generation_config.json"
    if file.is_file():
        try:
            return GenerationConfig.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"--model_id {model_id}: {file} is empty or damaged ({error}): download or export the model again"
            ) from error
    special = config.decoder.pad_token_id
    return GenerationConfig(
        bos_token_id=special,
        pad_token_id=special,
        decoder_start_token_id=special,
        do_sample=True,
        guidance_scale=3.0,
        max_length=1500,
    )
