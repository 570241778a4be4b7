"""The melody of every clip as notes, found once and kept on disk: one byte for each frame of the codes.

A clip's melody is heard in its own sound, or in the file that stands beside it as its melody; there in the same
seconds. Notes are kept under the content of the clip, with that of the melody file where there is one.

How loud a sound is changes none of its notes. So they are heard in the sound before its gain, and runs with another
--loudness share them; what --trim_silence leaves out moves them, and has a store of its own.
"""

from __future__ import annotations

import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import torch

from trainer.data import audio
from trainer.data.arrow_store import KEY, Binaries, Row, Store
from trainer.data.audio_fault import AudioFault
from trainer.data.cache import BLOCK_SECONDS, ROW_BYTES, missing_rows, stored_rows
from trainer.data.chroma import FRAME_SAMPLES, NOTE_SAMPLES, SAMPLE_RATE_HZ, VERSION, NoteFinder
from trainer.data.codec import view_offsets
from trainer.data.decoding import Decoders
from trainer.data.excerpt import Excerpt
from trainer.data.fates import FateKind, display
from trainer.data.manifest import Columns
from trainer.data.places import file_of, sound_at
from trainer.data.progress import check_room, duration, hours_bar
from trainer.data.sound_file import opened
from trainer.data.stems import Mix
from trainer.data.treatment import Treatment

# Sounds in hand at once, each decoded ahead by a thread while the others' notes are found: finding them takes an H200 a
# third of the time that decoding takes a core (1.05 and 2.9 s an hour, 2026-11-27, docs/benchmarks.md).
SOUNDS_AT_ONCE = 8


class Stems(Protocol):
    """What of a sound its melody is heard in (trainer/data/stems.py); `key` tells it from others."""

    key: str

    def blocks(
        self, sound: Path | bytes, sample_rate_hz: int, block_seconds: float, excerpt: Excerpt | None
    ) -> Iterator[np.ndarray]:
        """It as mono blocks (n,) float32; raises AudioFault where the sound cannot be read."""


@dataclass(frozen=True, kw_only=True)
class CachedMelodies:
    """The melodies of a list of clips, which are numbered from 0 as they stand in it.

    offsets  samples at which each cached view of the codes begins

    The notes stay in the memory-mapped files: `_values` has them by row of the store, and `_row_of_clip`, (clips,)
    int64, gives each clip's row.
    """

    offsets: tuple[int, ...]
    _values: Binaries
    _row_of_clip: np.ndarray

    def crop(self, clip: int, view: int, start: int, frames: int) -> np.ndarray:
        """The notes (n,) uint8 in [0, 12) of frames [start, start + frames) of one view of a clip.

        n = 1 + frames x 640 // 4096, of which as many are there as begin before the melody's end; 0 where there is no
        melody. Each is the cached note nearest in time: in music, .98 of them are those of the crop heard by itself,
        but for the two at either end, where the crop alone is mirrored and here the sound goes on.
        """
        notes = np.frombuffer(self._values[int(self._row_of_clip[clip])], np.uint8)
        samples = np.arange(0, frames * FRAME_SAMPLES + 1, NOTE_SAMPLES)
        samples += start * FRAME_SAMPLES + self.offsets[view]
        samples = samples[: np.searchsorted(samples, len(notes) * FRAME_SAMPLES)]
        # Behind the middle between the last two there is none to round up to.
        return notes[np.minimum(np.rint(samples / FRAME_SAMPLES).astype(np.int64), len(notes) - 1)]


def melody_store(cache_dir: Path, treatment: Treatment, stems: str) -> Store:
    """The store of melodies that were heard in these stems, by their key; made on first use."""
    trimmed = replace(treatment, loudness_lufs=None).key
    return Store(cache_dir / "melody" / f"chroma{VERSION}-{stems}{trimmed}", {"notes": pa.large_binary()})


def melody_keys(clips: Columns) -> list[str]:
    """The key in the store of each clip's melody."""
    contents, others = clips["content"], clips["melody_content"]
    return [f"{content}+{other}" if other else content for content, other in zip(contents, others, strict=True)]


def missing_melodies(store: Store, clips: Columns, *, rank: int = 0, world_size: int = 1) -> dict[str, list[int]]:
    """What a rank has to find: each melody of its share that the store lacks, with its rows; see `missing_rows`."""
    return missing_rows(store, melody_keys(clips), clips["seconds"], references(clips), rank, world_size)


def fill_melodies(
    store: Store,
    clips: Columns,
    stems: Stems,
    *,
    device: torch.device,
    show_progress: bool = True,
    rank: int = 0,
    world_size: int = 1,
) -> list[tuple[int, AudioFault]]:
    """Find the melodies that the store lacks; returns the rows whose sound could not be read, and why.

    clips  with the columns content, path_bytes, seconds, sample_rate_hz, first_frame and frames of the manifest, and
           with melody_content and melody_path_bytes where clips have melody files
    rank   of `world_size`: what it finds is its share, as in `cache.fill_codes`, which this resembles throughout
    """
    missing = missing_melodies(store, clips, rank=rank, world_size=world_size)
    if not missing:
        return []
    seconds = clips["seconds"][:]
    _check_room(store, clips, say=show_progress)
    faults: list[tuple[int, AudioFault]] = []
    hours = sum(seconds[rows[0]] for rows in missing.values()) / 3600
    what = "finding melodies" if world_size == 1 else f"finding melodies, the first of {world_size} shares"
    with hours_bar(what, hours, show_progress) as bar:

        def blocks(row: int) -> Iterator[np.ndarray]:
            return _sound(clips, row, stems)

        def count(block: np.ndarray) -> None:
            bar.update(min(len(block) / SAMPLE_RATE_HZ / 3600, hours - bar.n))  # as `fill_codes` does

        store.append_all(_melody_rows(missing, blocks, count, device, faults))
    return sorted(faults, key=lambda fault: fault[0])


def fate_of(fault: AudioFault, clips: Columns, row: int) -> tuple[FateKind, str]:
    """Fate and detail of a clip whose melody has a fault: with the name of the melody file, where it is that one's."""
    other = clips["melody_path_bytes"][row]
    if not other:
        return fault.fate, fault.detail
    name = display(os.fsdecode(os.path.basename(file_of(other))))
    return "melody unusable", f"its melody {name} is {fault.fate}: {fault.detail}"


def open_melodies(store: Store, clips: Columns, views: int) -> CachedMelodies:
    """The melodies of these clips, in this order. Raises StorageError where the store lacks some."""
    rows = store.open()
    return CachedMelodies(
        offsets=tuple(view_offsets(views, FRAME_SAMPLES)),
        _values=rows.binaries("notes"),
        _row_of_clip=stored_rows(store, rows, melody_keys(clips), "melodies"),
    )


def references(clips: Columns) -> list[bytes]:
    """Where each clip's melody lies (trainer/data/places.py)."""
    return [
        other or own for own, other in zip(clips["path_bytes"], clips["melody_path_bytes"], strict=True)
    ]


def _check_room(store: Store, clips: Columns, *, say: bool) -> None:
    """Say what all ranks will add to the cache. Raises StorageError where the disk lacks the room."""
    seconds = clips["seconds"][:]
    rows = [rows[0] for rows in missing_melodies(store, clips).values()]
    notes = sum(1 + max(int(seconds[row] * SAMPLE_RATE_HZ), 2 * NOTE_SAMPLES) // FRAME_SAMPLES for row in rows)
    what = f"finding the melodies of {duration(sum(seconds[row] for row in rows))} of audio"
    check_room(store.folder, notes + ROW_BYTES * len(rows), what, instead="train on fewer clips", say=say)


def _sound(clips: Columns, row: int, stems: Stems) -> Iterator[np.ndarray]:
    """The sound in which a clip's melody is heard; AudioFault at its end where it has another content by now."""
    other = clips["melody_content"][row]
    sound = sound_at(references(clips)[row])
    excerpt = Excerpt(first_frame=clips["first_frame"][row], frames=clips["frames"][row], gain=1.0)
    if other:  # made to be the melody: there is nothing to separate
        excerpt, stems = _at_rate(excerpt, clips["sample_rate_hz"][row], sound), Mix()
    yield from stems.blocks(sound, SAMPLE_RATE_HZ, BLOCK_SECONDS, excerpt)
    if audio.content_of(sound) != (other or clips["content"][row]):
        raise AudioFault("unreadable", "changed since it was inspected: run again with --rehash 1")


def _at_rate(excerpt: Excerpt, rate_hz: int, sound: Path | bytes) -> Excerpt:
    """The same seconds of another sound, of which there may be less."""
    with opened(sound) as decoder:
        first, end = (
            round(frame * decoder.rate_hz / rate_hz)
            for frame in (excerpt.first_frame, excerpt.first_frame + excerpt.frames)
        )
    return Excerpt(first_frame=first, frames=end - first, gain=excerpt.gain)


def _melody_rows(
    rows_of_key: Mapping[str, Sequence[int]],
    blocks: Callable[[int], Iterator[np.ndarray]],
    count: Callable[[np.ndarray], None],
    device: torch.device,
    faults: list[tuple[int, AudioFault]],
) -> Iterator[Row]:
    """The store's row of each melody. Where none of its files can be read, all of them are added to `faults`.

    blocks  of a row's sound; count: is given each block that is used
    """
    failed: dict[str, list[tuple[int, AudioFault]]] = defaultdict(list)
    waiting = deque((key, rows[0]) for key, rows in rows_of_key.items())
    in_hand: deque[tuple[str, int, Iterator[np.ndarray], NoteFinder]] = deque()
    with Decoders(SOUNDS_AT_ONCE) as decoders:
        while waiting or in_hand:
            while waiting and len(in_hand) < SOUNDS_AT_ONCE:
                key, row = waiting.popleft()
                in_hand.append((key, row, decoders.ahead(blocks(row)), NoteFinder(FRAME_SAMPLES, device)))
            key, row, coming, finder = in_hand.popleft()
            try:
                block = next(coming, None)
            except AudioFault as fault:
                failed[key].append((row, fault))
                if others := rows_of_key[key][len(failed[key]) :]:
                    waiting.appendleft((key, others[0]))
                else:
                    faults.extend(failed[key])
                continue
            if block is None:
                yield {KEY: key, "notes": finder.notes().tobytes()}
            else:
                finder.add(block)
                count(block)
                in_hand.append((key, row, coming, finder))
