"""From a folder of sounds to examples: the folder is scanned, its clips split and encoded once, the codes opened."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.data import cache, melodies, prepared, unknown_words
from trainer.data.batches import Examples, Text
from trainer.data.caption_settings import CaptionSettings
from trainer.data.fates import IN_THE_REPORT, Fate, display, reasons, summary
from trainer.data.filling import with_codes, with_melodies
from trainer.data.held_out import share_of
from trainer.data.inventory import ScannedFolder, UnusableDataError, check_split, shows_too
from trainer.data.manifest import Columns
from trainer.data.peers import Alone, Peers
from trainer.data.prepared import Prepared
from trainer.data.prompts import Prompts
from trainer.data.shared_scan import SharedScan, scan_once
from trainer.data.stems import Demucs, Mix, stems_of, tell
from trainer.data.table_scan import TableSettings
from trainer.data.treatment import Treatment
from trainer.errors import ConfigError
from trainer.model.source import Source, free_unused, load_codec
from trainer.spec.shapes import segment_frames
from trainer.spec.trainable import Placeholder, Selection
from trainer.spec.trigger import Trigger


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Which clips a run has, how they are cached, and what is drawn of them.

    folder             of the clips, or a table of them, of which most or all are trained on
    cache_dir          folder of what was encoded; runs may share it
    validation_share   share of the folder's clips that validate, in [0, 1)
    validation_folder  a folder whose clips validate instead; None for none
    captions           where captions come from
    tables             which rows and columns of its Parquet and Arrow files are used; validation_tables of those of
                       the other folder
    min_seconds        clips of which less is encoded are left out
    treatment          what is done to each sound before it is encoded
    segment_seconds    length of a training crop
    code_views         at how many offsets inside a codec frame each track is encoded
    word_dropout       probability in [0, 1) of each word of a caption to be left out
    caption_variants   variants that each caption has if words are dropped or fields are merged; one is drawn each epoch
    placeholder        of a word that is learned, and then stands in every caption; None if no word is
    trigger            a phrase that stands in every caption; None if there is none
    trained            which parameters are trained, on which the FLOPs of a clip depend
    seed               of the split, and of the words that are left out
    rehash             whether sound files of unchanged size and date are read again
    stems              what a melody model hears the clips' melodies in: --stems, or the key of what that came to
    prepared           those of the two folders that are prepared ones, opened; `prepare` finds them
    """

    folder: Path
    cache_dir: Path
    validation_share: float
    validation_folder: Path | None
    captions: CaptionSettings
    tables: TableSettings
    validation_tables: TableSettings
    min_seconds: float
    treatment: Treatment
    segment_seconds: float
    code_views: int
    word_dropout: float
    caption_variants: int
    placeholder: Placeholder | None
    trigger: Trigger | None
    trained: Selection
    seed: int
    rehash: bool
    stems: str = "auto"
    prepared: Mapping[Path, Prepared] = field(default_factory=dict)

    @property
    def fixed_flags(self) -> dict[str, Any]:
        """The flags, by name and as plain JSON values, that decide what a prepared folder of these clips holds."""
        captions = self.captions
        return {
            "code_views": self.code_views, "trim_silence": self.treatment.trim_silence,
            "loudness": self.treatment.loudness_lufs, "captions": ",".join(captions.sources),
            "caption_column": captions.column, "caption_template": captions.template,
            "default_caption": captions.default, "caption": captions.instead, "caption_lines": captions.lines,
            "merge_metadata": captions.merge.merge, "no_label": captions.no_label, "min_seconds": self.min_seconds,
        }

    @property
    def prompts(self) -> Prompts:
        """What is made of the captions."""
        return Prompts(
            word_dropout=self.word_dropout,
            caption_variants=self.caption_variants,
            lines=self.captions.lines,
            merge=self.captions.merge,
            placeholder=self.placeholder,
            trigger=self.trigger,
            seed=self.seed,
        )


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """What a run trains and validates on.

    train, validation  the clips; None where none validate
    fates              of the files of all folders that were scanned
    folders            those folders, for the report: the one to train on, and that to validate on if there is one
    unread             how many captions hold words that T5 does not know; counted by the first process alone
    digest             of the contents and captions of the training clips: equal where two runs train on the same
    validation_digest  the same of the clips that validate; "" where none do
    stems              the key of what melodies were heard in (trainer/data/stems.py); "" for a text model
    remark             on what is put into every caption; "" where nothing is
    mono               how many of all clips are mono, and both channels of a stereo model; 0 for a mono model
    seconds            of all training clips together
    table              of the training clips, with the columns of Manifest
    """

    train: Examples
    validation: Examples | None
    fates: tuple[Fate, ...]
    folders: tuple[ScannedFolder, ...]
    unread: int
    digest: str
    seconds: float
    table: Columns
    remark: str = ""
    mono: int = 0
    validation_digest: str = ""
    stems: str = ""

    @property
    def clips(self) -> int:
        """How many clips are trained on."""
        return len(self.train.captions)

    def describe(self, rest: str = IN_THE_REPORT) -> str:
        """What became of the files, for the console; `rest` is where the others are named."""
        files = summary(self.fates, rest=rest)
        return "\n".join(filter(None, (files, self._doubled(), unknown_words.message(self.unread), self.remark)))

    def _doubled(self) -> str:
        clips = self.clips + (0 if self.validation is None else len(self.validation.captions))
        if self.mono == 0:
            return ""
        if self.mono < clips:
            return f"{self.mono:,} of {clips:,} clips are mono: both channels of the stereo model get the same sound"
        return (
            "note: all clips are mono, so that both channels of the stereo model always get the same sound:"
            " it learns to make mono. A mono model learns that in half of the encoding"
        )


def prepare(settings: DataSettings, source: Source, device: torch.device, peers: Peers | None = None) -> Dataset:
    """Scan the folder, encode what the cache lacks, and open the result.

    The first process scans and the others read the table that it wrote; each encodes its share. EnCodec and T5 are
    loaded only where something is missing, and have left the device on return.

    Raises UnusableDataError where no clip is left to train on, or none to validate on though that was asked for;
    StorageError where the cache cannot be written; ConfigError where a machine's copy of a folder differs in a file
    that it has to encode.
    """
    peers = peers or Alone()
    settings = _with_prepared(settings, source, peers)
    settings, stems = _with_stems(settings, source, device, peers)
    clips, scanned, unread = _encoded(settings, source, device, peers, stems, settings.folder, settings.tables)
    fates, folders = scanned.fates, [scanned]
    is_held_out = share_of(clips["content"], settings.seed, settings.validation_share)
    train, held_out = _rows(clips, ~is_held_out), _rows(clips, is_held_out)
    # A prepared folder has no sounds that a report could show.
    shown = () if settings.folder in settings.prepared else (scanned,)
    check_split(settings.validation_share, _count(train), _count(held_out), shown)
    if settings.validation_folder is not None:
        folder = settings.validation_folder
        with shows_too(shown):
            held_out, other, more = _encoded(
                settings, source, device, peers, stems, folder, settings.validation_tables
            )
        unread += more
        folders.append(other)
        name = display(folder)  # the files' names alone may be those of the dataset
        fates = (*fates, *(replace(fate, path=f"{name}/{fate.path}") for fate in other.fates))
    prompts = settings.prompts
    texts = prompts.drawn(train)
    captions = [*prompts.first(train), *prompts.first(held_out)]
    text = prompts.encoded(source, _text_store(settings, source), device, peers, captions, texts or ())
    free_unused(device)
    return Dataset(
        train=_examples(settings, source, train, text, texts),
        validation=_examples(settings, source, held_out, text) if _count(held_out) else None,
        fates=fates,
        folders=tuple(folders),
        unread=unread,
        digest=_digest(train),
        seconds=float(sum(train["seconds"])),
        table=train,
        remark=prompts.remark(source),
        mono=_mono(train) + _mono(held_out) if source.channels == 2 else 0,
        validation_digest=_digest(held_out) if _count(held_out) else "",
        stems=settings.stems if source.melody else "",
    )


def _with_prepared(settings: DataSettings, source: Source, peers: Peers) -> DataSettings:
    """The settings with the folders that are prepared ones. Raises ConfigError where one lacks what is asked for."""
    folders = [folder for folder in (settings.folder, settings.validation_folder) if folder is not None]
    found = prepared.find(folders, peers)
    for of_folder in found.values():
        of_folder.check_flags(settings.fixed_flags)
        of_folder.check_codec(source.codebooks, source.channels, source.codec_identity(), source.name)
        if source.melody:
            of_folder.check_stems(settings.stems, source.name)
    if settings.rehash and len(found) == len(folders):
        raise ConfigError("--rehash 1 has no effect with a prepared folder, which holds no sound files: remove it")
    return replace(settings, prepared=found)


def _with_stems(
    settings: DataSettings, source: Source, device: torch.device, peers: Peers
) -> tuple[DataSettings, Mix | Demucs | None]:
    """The settings with the key of the stems, and the stems themselves: None where no melody is to be heard in them.

    Raises ConfigError where the melodies of --dataset and of --validation would be of other stems.
    """
    if not source.melody:
        return settings, None
    keys = {of_folder.about.stems for of_folder in settings.prepared.values()}
    stems: Mix | Demucs | None = None
    if not {settings.folder, settings.validation_folder or settings.folder} <= settings.prepared.keys():
        stems = stems_of(settings.stems, device, peers, made=keys)
        keys.add(stems.key)
    if len(keys) > 1:
        raise ConfigError(
            f"the melodies of --dataset and of --validation are heard in different stems ({', '.join(sorted(keys))}):"
            " prepare both with the same --stems, and with the same weights of demucs where both begin with demucs-"
        )
    return replace(settings, stems=keys.pop()), stems


def _encoded(
    settings: DataSettings, source: Source, device: torch.device, peers: Peers, stems: Mix | Demucs | None,
    folder: Path, tables: TableSettings,
) -> tuple[Columns, ScannedFolder, int]:
    """The folder's clips, the codes and melodies of all of which are cached, the folder itself, and `Dataset.unread` of
    them.

    A file that fails while it is encoded is left out, and so is one that is shorter than a codec frame in some view,
    since there is nothing of it to learn; their fates say so. A prepared folder has the codes of all its clips.
    """
    if folder in settings.prepared:
        clips, fates = settings.prepared[folder].clips(
            no_label=settings.captions.no_label, min_seconds=settings.min_seconds
        )
        settings.prepared[folder].check_contents(clips["content"], _code_store(settings, source))
        if source.melody:
            settings.prepared[folder].check_melodies(melodies.melody_keys(clips), _melody_store(settings))
        folder_now = ScannedFolder(root=os.path.abspath(folder), fates=fates, inspected=())
        return _with_unknown_words(settings, source, peers, clips, folder_now)
    scanned = _scanned(settings, source, peers, folder, tables)
    if stems is not None:
        tell(stems, scanned.columns["melody_content"], peers)
    store = _code_store(settings, source)
    found, new_fates = with_codes(
        scanned, store, lambda: load_codec(source).to(device), peers,
        sample_rate_hz=source.sample_rate_hz, views=settings.code_views, channels=source.channels, device=device,
    )
    if stems is not None:
        found, more_fates = with_melodies(found, _melody_store(settings), stems, peers, device=device)
        new_fates |= more_fates
    clips = found.columns
    has_frames = np.array([bool(clip.all()) for clip in cache.open_codes(store, clips["content"]).frames], dtype=bool)
    short = _rows(clips, ~has_frames)
    for path, seconds in zip(short["path"], short["seconds"], strict=True):
        detail = f"{seconds:.3f} s, less than a frame of the codec: raise --min_seconds"
        new_fates[path] = Fate(path=path, fate="too short", detail=detail)
    fates = tuple(new_fates.get(fate.path, fate) for fate in scanned.fates)
    folder_now = ScannedFolder(root=os.path.abspath(folder), fates=fates, inspected=scanned.inspected)
    if not has_frames.any():
        raise UnusableDataError(f"no file of {display(folder)} could be encoded:\n{reasons(fates)}", [folder_now])
    clips = _rows(clips, has_frames)
    return _with_unknown_words(settings, source, peers, clips, folder_now)


def _scanned(
    settings: DataSettings, source: Source, peers: Peers, folder: Path, tables: TableSettings
) -> SharedScan:
    return scan_once(
        folder,
        peers,
        settings.cache_dir / "scan",
        captions=settings.captions,
        tables_used=tables,
        min_seconds=settings.min_seconds,
        rehash=settings.rehash,
        treatment=settings.treatment,
        channels=source.channels,
    )


def _with_unknown_words(
    settings: DataSettings, source: Source, peers: Peers, clips: Columns, folder: ScannedFolder
) -> tuple[Columns, ScannedFolder, int]:
    """What `_encoded` returns: remarks on captions are added to the fates."""
    unread = settings.prompts.unread(source, clips) if peers.rank == 0 else {}
    fates = tuple(fate.with_remark(unread.get(fate.path, "")) for fate in folder.fates)
    return clips, replace(folder, fates=fates), len(unread)


def _examples(
    settings: DataSettings,
    source: Source,
    clips: Columns,
    text: Text,
    texts: Sequence[Sequence[str | None]] | None = None,
) -> Examples:
    return Examples(
        codes=cache.open_codes(_code_store(settings, source), clips["content"]),
        text=text,
        captions=settings.prompts.first(clips),
        texts=texts,
        names=clips["path"],
        shape=source.shape,
        special_token=source.special_token,
        segment_frames=segment_frames(settings.segment_seconds, source.frame_rate_hz),
        token_ids=settings.placeholder is not None,
        trained=settings.trained,
        melodies=melodies.open_melodies(_melody_store(settings), clips, settings.code_views) if source.melody else None,
    )


def code_store_of(settings: DataSettings, source: Source) -> cache.Store:
    """The cache's codes of tracks as these settings and this model have them."""
    return cache.code_store(
        settings.cache_dir, source.codec_identity(), settings.code_views, settings.treatment, source.channels
    )


def _code_store(settings: DataSettings, source: Source) -> cache.Store:
    """Where codes are read: in the prepared folders, and in the cache, which is appended to."""
    store = code_store_of(settings, source)
    for of_folder in settings.prepared.values():
        store = of_folder.codes(store)
    return store


def _melody_store(settings: DataSettings) -> cache.Store:
    """The same for melodies."""
    store = melodies.melody_store(settings.cache_dir, settings.treatment, settings.stems)
    for of_folder in settings.prepared.values():
        store = of_folder.melodies(store)
    return store


def _text_store(settings: DataSettings, source: Source) -> cache.Store:
    """The same for states; a prepared folder's are read only if they are of this text encoder."""
    store = cache.text_store(settings.cache_dir, source.text_identity())
    for of_folder in settings.prepared.values():
        if of_folder.about.text_encoder == source.text_identity():
            store = of_folder.text(store)
    return store


def _rows(clips: Columns, mask: Iterable[bool]) -> Columns:
    return {name: list(compress(values, mask)) for name, values in clips.items()}


def _count(clips: Columns) -> int:
    return len(clips["content"])


def _mono(clips: Columns) -> int:
    """How many have one channel. A prepared folder that does not say how many there are has 0 there."""
    return sum(channels == 1 for channels in clips["channels"])


def _digest(clips: Columns) -> str:
    captions = [caption or "" for caption in clips["caption"]]
    rows: list[tuple[str, ...]] = [*zip(clips["content"], captions, strict=True)]
    if any(clips["caption_fields"]):  # what was digested before there were any stays as it was
        rows = [*zip(clips["content"], captions, clips["caption_fields"], strict=True)]
    if any(clips["melody_content"]):
        rows = [*zip(clips["content"], captions, clips["caption_fields"], clips["melody_content"], strict=True)]
    return hashlib.blake2b(repr(sorted(rows)).encode(), digest_size=16).hexdigest()
