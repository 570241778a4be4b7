"""Writing a prepared folder (trainer/data/prepared.py) from the caches: whole, or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from trainer.atomic import check_operations, replacing_folder
from trainer.data import cache, melodies
from trainer.data.arrow_store import Rows, Store
from trainer.data.dataset import Dataset, DataSettings, code_store_of
from trainer.data.fates import display
from trainer.data.manifest import TYPES, Columns
from trainer.data.prepared import SOUND_FLAGS, Prepared, digest_of, is_prepared, open_prepared
from trainer.data.prepared_about import CARD, CODES, MARKER, MELODY, TABLE, TEXT, About
from trainer.errors import ConfigError, DataError, StorageError
from trainer.model.source import Source

PART_BYTES = 64 * 2**20
# Of the table, what tells nothing of where the music lay and what its files were called.
NAMELESS = ("content", "sound", "caption", "caption_fields", "seconds", "sample_rate_hz", "channels", "size_bytes")
OURS = (MARKER, TABLE, CARD, CODES, TEXT, MELODY)


@dataclass(frozen=True, kw_only=True)
class Written:
    """What a prepared folder came to hold.

    new  distinct sounds that the former folder at this place, if there was one, did not have
    """

    prepared: Prepared
    new: int
    size_bytes: int


def check_place(folder: Path) -> None:
    """Raise ConfigError where `folder` is something that must not be replaced, StorageError where none can be made."""
    if folder.exists() and not is_prepared(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            f"--output {display(folder)} is there already and is no prepared folder: give a new or an empty one"
        )
    with _storage_errors(folder):
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        check_operations(folder.absolute().parent)


def reuse(folder: Path, settings: DataSettings, source: Source) -> None:
    """Give the caches what a prepared folder at this place has and they lack, so that it need not be made again.

    Does nothing where there is none, where it is damaged, and for what another model made.
    """
    try:
        former = open_prepared(folder) if is_prepared(folder) else None
        if former is None:
            return
        had, wanted = former.about.flags, settings.fixed_flags
        same_sound = all(had.get(name, off) == wanted[name] for name, off in SOUND_FLAGS.items())
        # One EnCodec serves mono and stereo models: what tells their codes apart is the number of channels.
        same_codec = (former.about.codec, former.about.channels) == (source.codec_identity(), source.channels)
        if same_sound and same_codec:
            codes = code_store_of(settings, source)
            _append_missing(codes, former.codes(codes).open())
        if had.get("trim_silence", False) == wanted["trim_silence"] and former.about.stems:
            notes = melodies.melody_store(settings.cache_dir, settings.treatment, former.about.stems)
            _append_missing(notes, former.melodies(notes).open())
        if former.about.text_encoder == source.text_identity():
            text = cache.text_store(settings.cache_dir, source.text_identity())
            _append_missing(text, former.text(text).open())
    except DataError as error:
        print(f"note: {error}. All of it is made anew from the music and the cache")


def write(folder: Path, data: Dataset, settings: DataSettings, source: Source, *, anonymous: bool) -> Written:
    """Make `folder` hold the clips of `data`, which were encoded into the caches of `settings`, ready to be trained on.

    anonymous  whether the table has numbers in place of the names of files

    It takes the place of a prepared folder there; what else is in that one stays. Raises StorageError.
    """
    before = _contents_at(folder)
    about = About(
        codec=source.codec_identity(),
        text_encoder=source.text_identity(),
        model_id=source.name,
        codebooks=data.train.codes.codebooks,
        channels=source.channels,
        frame_rate_hz=source.frame_rate_hz,
        sample_rate_hz=source.sample_rate_hz,
        clips=data.clips,
        hours=data.seconds / 3600,
        flags=settings.fixed_flags,
        stems=data.stems,
    )
    codes = code_store_of(settings, source).open()
    states = cache.text_store(settings.cache_dir, source.text_identity()).open()
    texts = cache.text_keys(sorted(set(data.train.all_texts())))
    notes = melodies.melody_store(settings.cache_dir, settings.treatment, data.stems).open() if data.stems else None
    written = write_rows(folder, about, data.table, codes, states, texts, notes, anonymous=anonymous)
    return Written(
        prepared=written,
        new=len(set(data.table["content"]) - before),
        size_bytes=sum(written.about.files.values()),
    )


def write_rows(
    folder: Path,
    about: About,
    clips: Columns,
    codes: Rows,
    states: Rows,
    texts: Sequence[str],
    notes: Rows | None = None,
    *,
    anonymous: bool = False,
) -> Prepared:
    """Make `folder` hold these clips with their codes, and the states under the keys `texts`; with their melodies too,
    where `notes` has them.

    about  without files and digests
    """
    contents = list(dict.fromkeys(clips["content"]))
    with _storage_errors(folder), replacing_folder(folder.absolute(), is_ours=OURS.__contains__) as partial:
        names = [TABLE, *_write_parts(partial, CODES, codes, contents), *_write_parts(partial, TEXT, states, texts)]
        if notes is not None:
            names += _write_parts(partial, MELODY, notes, list(dict.fromkeys(melodies.melody_keys(clips))))
        _write_table(partial / TABLE, clips, anonymous)
        about = replace(
            about,
            files={name: (partial / name).stat().st_size for name in sorted(names)},
            digests={name: digest_of(partial / name) for name in sorted(names)},
        )
        (partial / CARD).write_text(_card(about), encoding="utf-8")
        (partial / MARKER).write_text(about.to_json(), encoding="utf-8")
    return open_prepared(folder)


def _append_missing(store: Store, former: Rows) -> None:
    present = store.keys()
    missing = [row for key, row in former.index.items() if key not in present]
    if missing:
        store.append_all(former.table.slice(row, 1).to_pylist()[0] for row in missing)


def _contents_at(folder: Path) -> set[str]:
    """The contents of the clips of the prepared folder at this place; none where there is no sound one."""
    try:
        if not is_prepared(folder):
            return set()
        columns, _ = open_prepared(folder).clips(no_label=False, min_seconds=0.0)
        return set(columns["content"])
    except DataError:
        return set()


def _write_parts(folder: Path, kind: str, rows: Rows, keys: Sequence[str]) -> list[str]:
    """Write the rows of these keys, in this order, as parts in `folder`/`kind`; returns the parts' paths in `folder`.

    Equal rows give equal files, so that a hub need not be sent again what it has.
    """
    names = []
    (folder / kind).mkdir()
    for number, group in enumerate(_groups(rows, kind, keys)):
        names.append(f"{kind}/part-{number:05d}.arrow")
        table = rows.table.take(pa.array(group, pa.int64())).combine_chunks()
        with pa.OSFile(str(folder / names[-1]), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    return names


def _groups(rows: Rows, kind: str, keys: Sequence[str]) -> Iterator[list[int]]:
    """The rows of the keys in groups of PART_BYTES, or little more."""
    values = rows.binaries({CODES: "codes", TEXT: "states", MELODY: "notes"}[kind])
    group: list[int] = []
    size_bytes = 0
    for key in keys:
        group.append(rows.index[key])
        size_bytes += values[group[-1]].size
        if size_bytes >= PART_BYTES:
            yield group
            group, size_bytes = [], 0
    if group:
        yield group


def _write_table(path: Path, clips: Columns, anonymous: bool) -> None:
    from pyarrow import parquet

    # A folder without melody files has the table that it had before there were any.
    melodies = ("melody_content",) if any(clips["melody_content"]) else ()
    plain = [name for name in TYPES if name != "path_bytes" and not name.startswith("melody_")]
    columns: dict[str, Any] = {name: clips[name] for name in (*plain, *melodies)}
    if anonymous:
        numbers = [f"clip {number:05d}" for number in range(1, len(clips["content"]) + 1)]
        columns = {"path": numbers, **{name: clips[name] for name in (*NAMELESS, *melodies)}}
    arrays = {name: pa.array(values, pa.type_for_alias(TYPES[name])) for name, values in columns.items()}
    parquet.write_table(pa.table(arrays), path)


def _card(about: About) -> str:
    """A data card by which `datasets.load_dataset` and the hub open the table of clips."""
    of_sides = "" if about.channels == 1 else " of stereo sound, left and right in turns"
    folders = f"`{CODES}/`, `{TEXT}/`: codes and text states"
    if about.stems:
        folders = f"`{CODES}/`, `{TEXT}/`, `{MELODY}/`: codes, text states and melodies"
    return f"""---
configs:
- config_name: clips
  data_files: {TABLE}
  default: true
tags:
- music
- musicgen
---

# Music, prepared for training

{about.clips:,} clips, {about.hours:.1f} hours, encoded by musicgen-trainer for the EnCodec of `{about.model_id}`
({about.codebooks} codebooks{of_sides}, {about.frame_rate_hz:g} frames a second, {about.flags["code_views"]} view(s)).
`python launch.py --dataset THIS_FOLDER` trains on it.

- `{TABLE}`: the clips with captions and lengths
- {folders}, as Arrow streams
- `{MARKER}`: what they are

The sound files are not in it. **EnCodec's codes can be decoded to sound again**, of lower quality: share this folder
only where you may share the music. `python scripts/prepare_dataset.py` writes this page anew with the folder.
"""


@contextmanager
def _storage_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"--output {display(folder)} cannot be written ({error.strerror or error}). What was encoded is kept in the"
            " cache. Free some space or permit access, or choose another place"
        ) from error
