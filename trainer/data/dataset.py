"""From a folder to examples: scanned, split, encoded once, and opened by index."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from trainer.data import cache, manifest
from trainer.data.batches import Examples, Text
from trainer.data.captions import first_caption, texts_of, with_placeholder
from trainer.data.manifest import Columns, Fate
from trainer.errors import DataError
from trainer.flags.config import Config
from trainer.model.new_word import TokenIds, extended_tokenizer, placeholder_of
from trainer.model.source import Source, load_codec, load_text_encoder


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
    return math.floor(segment_seconds * source.frame_rate_hz + 1e-6)  # 4.1 s x 50 Hz is 204.99999999999997


class Peers(Protocol):
    """The other processes, as far as sharing the work needs them (see trainer.engine.Ranks)."""

    rank: int
    world_size: int

    def wait(self, what: str) -> None: ...

    def gather(self, value: Any) -> list[Any]: ...

    def check_equal(self, **values: object) -> None: ...


class Alone:
    """The view of a process without others."""

    rank, world_size = 0, 1

    def wait(self, what: str) -> None: ...

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def check_equal(self, **values: object) -> None: ...


def prepare(config: Config, source: Source, device: torch.device, peers: Peers | None = None) -> Dataset:
    """Scan the folder, encode what the cache lacks, and open the result.

    The first process scans, the others read what it found; each encodes its share. EnCodec and T5 are loaded
    only where something is missing, and are off the device on return.

    Raises DataError where no clip is left to train on, or none to validate on though a share was asked for,
    StorageError where the cache cannot be written.
    """
    peers = peers or Alone()
    clips, fates = _encoded(config, source, device, peers, Path(config.dataset_path))
    held = manifest.split(clips["content"], config.seed, config.validation_share)
    train, held_out = _rows(clips, ~held), _rows(clips, held)
    _check_split(config, _count(train), _count(held_out))
    if config.validation_folder is not None:
        folder = Path(config.validation_folder)
        held_out, other_fates = _encoded(config, source, device, peers, folder)
        shown = manifest.display(folder)  # the names alone may be those of the dataset
        fates = (*fates, *(replace(fate, path=f"{shown}/{fate.path}") for fate in other_fates))
    texts = _texts(config, train)
    text = _text(config, source, device, peers, [*_captions(config, train), *_captions(config, held_out)], texts or ())
    return Dataset(
        train=_examples(config, source, train, text, texts),
        validation=_examples(config, source, held_out, text) if _count(held_out) else None,
        fates=fates,
        digest=_digest(train),
        seconds=float(sum(train["seconds"])),
    )


def _check_split(config: Config, train: int, held_out: int) -> None:
    if train == 0:
        raise DataError(f"--validation {config.validation} leaves no clip to train on: use a smaller share")
    if config.validation_share > 0 and held_out == 0:
        raise DataError(
            f"--validation {config.validation} chose none of the {train} clips, since each is chosen by itself, with"
            " that probability: use a larger share, another --seed, or a folder of clips to validate on"
        )


def _encoded(
    config: Config, source: Source, device: torch.device, peers: Peers, folder: Path
) -> tuple[Columns, tuple[Fate, ...]]:
    """The folder's clips, all in the code cache; a file that fails while it is read becomes a fate.

    So does one that is shorter than a frame in some view: there is nothing of it to learn.
    """
    if peers.rank != 0:
        peers.wait("scan")
    scanned = manifest.scan(
        folder,
        no_label=config.no_label,
        caption_lines=config.caption_lines,
        min_seconds=config.min_seconds,
        memory=Path(config.cache_dir) / "scan",
        rehash=config.rehash and peers.rank == 0,
        show_progress=peers.rank == 0,
    )
    if peers.rank == 0:
        peers.wait("scan")
    peers.wait("scanned")
    clips = scanned.columns
    holds = f"{_count(clips)} clips, digest {_digest(clips)}"
    peers.check_equal(**{f"what {manifest.display(folder)} holds": holds})
    store = _code_store(config, source)
    mine = cache.fill_codes(
        store,
        clips,
        lambda: load_codec(source).to(device),
        sample_rate_hz=source.sample_rate_hz,
        views=config.code_views,
        device=device,
        show_progress=peers.rank == 0,
        rank=peers.rank,
        world_size=peers.world_size,
    )
    peers.wait("codes")
    found = peers.gather([(index, fault.fate, fault.detail) for index, fault in mine])
    faults = {index: (fate, detail) for rank in found for index, fate, detail in rank}
    paths = clips["path"]
    changed = {
        paths[index]: Fate(path=paths[index], fate=fate, detail=detail) for index, (fate, detail) in faults.items()
    }
    clips = _rows(clips, [index not in faults for index in range(len(paths))])
    whole = np.array([bool(clip.all()) for clip in cache.open_codes(store, clips["content"]).frames], dtype=bool)
    short = _rows(clips, ~whole)
    for path, seconds in zip(short["path"], short["seconds"], strict=True):
        detail = f"{seconds:.3f} s, less than a frame of the codec: raise --min_seconds"
        changed[path] = Fate(path=path, fate="too short", detail=detail)
    fates = tuple(changed.get(fate.path, fate) for fate in scanned.fates)
    if not whole.any():
        raise DataError(f"no file of {manifest.display(folder)} could be encoded:\n{manifest.summary(fates)}")
    return _rows(clips, whole), fates


def _text(
    config: Config,
    source: Source,
    device: torch.device,
    peers: Peers,
    captions: Sequence[str | None],
    drawn: Sequence[Sequence[str | None]],
) -> Text:
    """What the model reads of these captions, and of those that are drawn in their place."""
    texts = sorted({text for of_clip in (captions, *drawn) for text in of_clip if text is not None})
    placeholder = placeholder_of(config)
    if placeholder is not None:
        return TokenIds(extended_tokenizer(source.load_tokenizer(), placeholder), texts)
    store = _text_store(config, source)
    cache.fill_text(
        store,
        texts,
        lambda: (load_text_encoder(source).to(device), source.load_tokenizer()),
        device=device,
        show_progress=peers.rank == 0,
        rank=peers.rank,
        world_size=peers.world_size,
    )
    peers.wait("text")
    return cache.open_text(store, texts)


def _captions(config: Config, clips: Columns) -> list[str | None]:
    """The caption by which each clip is validated; None is no text."""
    return [_prompt(config, first_caption(caption)) for caption in clips["caption"]]


def _texts(config: Config, clips: Columns) -> list[tuple[str | None, ...]] | None:
    """The texts that each clip is trained with; None where that is its caption alone."""
    if config.word_dropout == 0 and not config.caption_lines:
        return None
    rate, variants = config.word_dropout, config.caption_variants
    drawn = [texts_of(caption, word_dropout=rate, variants=variants, seed=config.seed) for caption in clips["caption"]]
    return [tuple(_prompt(config, text) for text in texts) for texts in drawn]


def _prompt(config: Config, text: str | None) -> str | None:
    """The text as the model is given it: with --tune_text 1 the placeholder is in every one."""
    return with_placeholder(text, config.placeholder) if config.tune_text else text


def _examples(
    config: Config,
    source: Source,
    clips: Columns,
    text: Text,
    texts: Sequence[Sequence[str | None]] | None = None,
) -> Examples:
    return Examples(
        codes=cache.open_codes(_code_store(config, source), clips["content"]),
        text=text,
        captions=_captions(config, clips),
        texts=texts,
        names=clips["path"],
        shape=source.shape,
        special_token=source.special_token,
        segment_frames=segment_frames(source, config.segment_seconds),
        token_ids=config.tune_text,
        trained=config.selection,
    )


def _code_store(config: Config, source: Source) -> cache.Store:
    return cache.code_store(Path(config.cache_dir), source.codec_identity(), config.code_views)


def _text_store(config: Config, source: Source) -> cache.Store:
    return cache.text_store(Path(config.cache_dir), source.text_identity())


def _rows(clips: Columns, mask: Iterable[bool]) -> Columns:
    return {name: list(compress(values, mask)) for name, values in clips.items()}


def _count(clips: Columns) -> int:
    return len(clips["content"])


def _digest(clips: Columns) -> str:
    pairs = sorted(zip(clips["content"], [caption or "" for caption in clips["caption"]], strict=True))
    return hashlib.blake2b(repr(pairs).encode(), digest_size=16).hexdigest()
