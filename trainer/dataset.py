"""From a folder to examples: scanned, split, encoded once, and opened by index."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from trainer import cache, manifest
from trainer.batches import Examples
from trainer.config import Config
from trainer.errors import DataError
from trainer.manifest import Fate, Word
from trainer.models import Source, load_codec, load_text_encoder

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """What a run trains and validates on. `digest` names the training clips and captions, in any order."""

    train: Examples
    validation: Examples | None
    fates: tuple[Fate, ...]
    digest: str
    seconds: float

    @property
    def clips(self) -> int:
        return len(self.train.captions)


def segment_frames(source: Source, segment_seconds: float) -> int:
    """Codec frames of a training crop: 1500 for 30 s."""
    return int(segment_seconds * source.frame_rate_hz)


def prepare(config: Config, source: Source, device: torch.device) -> Dataset:
    """Scan the folder, encode what the cache lacks, and open the result.

    EnCodec and T5 are loaded only where something is missing, and are off the device on return.

    Raises DataError where no clip is left, StorageError where the cache cannot be written.
    """
    scanned = _scan(config, Path(config.dataset_path))
    validation_mask = manifest.split(scanned.clips["content"], config.seed, config.validation_share)
    train, held_out = _rows(scanned.clips, ~validation_mask), _rows(scanned.clips, validation_mask)
    fates = scanned.fates
    if config.validation_folder is not None:
        other = _scan(config, Path(config.validation_folder))
        held_out, fates = other.clips, (*fates, *other.fates)
    if len(train) == 0:
        raise DataError(f"--validation {config.validation} leaves no clip to train on: use a smaller share")
    train, held_out, fates = _encode(config, source, device, train, held_out, fates)
    return Dataset(
        train=_examples(config, source, train),
        validation=_examples(config, source, held_out) if len(held_out) else None,
        fates=fates,
        digest=_digest(train),
        seconds=float(sum(train["seconds"])),
    )


def _scan(config: Config, folder: Path) -> manifest.Manifest:
    return manifest.scan(
        folder,
        no_label=config.no_label,
        min_seconds=config.min_seconds,
        memory=Path(config.cache_dir) / "scan",
        rehash=config.rehash,
    )


def _encode(
    config: Config,
    source: Source,
    device: torch.device,
    train: datasets.Dataset,
    held_out: datasets.Dataset,
    fates: tuple[Fate, ...],
) -> tuple[datasets.Dataset, datasets.Dataset, tuple[Fate, ...]]:
    """Fill the caches; a file that fails while it is read gets another fate and leaves its table."""
    codes, text = _code_store(config, source), _text_store(config, source)
    kept = []
    for clips in (train, held_out):
        faults = cache.fill_codes(
            codes,
            clips,
            lambda: load_codec(source).to(device),
            sample_rate_hz=source.sample_rate_hz,
            views=config.code_views,
            device=device,
        )
        for index, fault in faults:
            fates = _with_fate(fates, clips[index]["path"], fault.fate, fault.detail)
        failed = {index for index, _ in faults}
        kept.append(clips.select([index for index in range(len(clips)) if index not in failed]))
    train, held_out = kept
    if len(train) == 0:
        raise DataError(f"no file of {config.dataset_path} could be encoded:\n{manifest.summary(fates)}")
    captions = {caption for clips in kept for caption in clips["caption"] if caption is not None}
    cache.fill_text(
        text,
        sorted(captions),
        lambda: (load_text_encoder(source).to(device), source.load_tokenizer()),
        device=device,
    )
    return train, held_out, fates


def _examples(config: Config, source: Source, clips: datasets.Dataset) -> Examples:
    captions: Sequence[str | None] = clips["caption"][:]
    return Examples(
        codes=cache.open_codes(_code_store(config, source), clips["content"][:]),
        text=cache.open_text(_text_store(config, source), [text for text in captions if text is not None]),
        captions=captions,
        names=clips["path"][:],
        codebooks=source.codebooks,
        special_token=source.special_token,
        segment_frames=segment_frames(source, config.segment_seconds),
        text_width=source.config.text_encoder.hidden_size,
    )


def _code_store(config: Config, source: Source) -> cache.Store:
    return cache.code_store(Path(config.cache_dir), source.codec_identity(), config.code_views)


def _text_store(config: Config, source: Source) -> cache.Store:
    return cache.text_store(Path(config.cache_dir), source.text_identity())


def _rows(clips: datasets.Dataset, mask: np.ndarray) -> datasets.Dataset:
    return clips.select(np.flatnonzero(mask).tolist())


def _digest(clips: datasets.Dataset) -> str:
    pairs = sorted(zip(clips["content"][:], [caption or "" for caption in clips["caption"]], strict=True))
    return hashlib.blake2b(repr(pairs).encode(), digest_size=16).hexdigest()


def _with_fate(fates: tuple[Fate, ...], path: str, fate: Word, detail: str) -> tuple[Fate, ...]:
    return tuple(replace(one, fate=fate, detail=detail) if one.path == path else one for one in fates)
