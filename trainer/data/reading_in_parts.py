"""Reads a data set of the hub that is larger than the disk, part by part, into the cache of codes and melodies.

What is left are stand-ins for its files (trainer/data/stand_ins.py). A scan of them gives the clips, captions and fates
that one of the whole data set gives, and the cache has the codes of all clips, and for a melody model their melodies: a
run starts from there as on a full cache, and opens no sound.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cache as once
from functools import partial
from typing import TYPE_CHECKING

import torch
from transformers import EncodecModel

from trainer.atomic import remove
from trainer.data import cache, clip_table, manifest, melodies, prepared
from trainer.data.audio_facts import inspect_all
from trainer.data.audio_fault import AudioFault
from trainer.data.hub_dataset import HubDataset
from trainer.data.hub_parts import (
    PartFolder,
    alone_with,
    beside_sounds,
    free_bytes,
    is_sound_name,
    next_part,
    record,
    stand_ins_of,
)
from trainer.data.manifest import PATHS, Columns, Manifest
from trainer.data.melody_files import in_groups
from trainer.data.peers import Peers
from trainer.data.places import forget_tables
from trainer.data.progress import size
from trainer.data.stand_ins import is_table_name
from trainer.data.stems import Demucs, Mix, stems_of, tell
from trainer.data.table_scan import TableRow, TableSettings, scan_tables
from trainer.errors import StorageError
from trainer.model.source import Source, load_codec

if TYPE_CHECKING:
    from trainer.data.dataset import DataSettings

READING = "reading"  # what is known of the sounds of the part that is being read, for a run that goes on with it


def read_all(
    hub: Mapping[str, HubDataset], settings: DataSettings, source: Source, device: torch.device, peers: Peers
) -> DataSettings:
    """Read those of the data sets that are larger than the disk; returns the settings to go on with.

    hub  what the flags dataset and validation name on the hub, by these names

    Where melodies were heard as --stems auto has it, which was said then, the settings have what that came to.
    """
    tables = {"dataset": settings.tables, "validation": settings.validation_tables}
    in_parts = {name: found for name, found in hub.items() if found.in_parts}
    stems: Mix | Demucs | None = None
    if in_parts and source.melody:
        folders = [folder for folder in (settings.folder, settings.validation_folder) if folder is not None]
        made = {of_folder.about.stems for of_folder in prepared.find(folders, peers).values()} - {""}
        stems = stems_of(settings.stems, device, peers, made=made)
        unsaid = stems.unsaid
    for name, found in in_parts.items():
        read_in_parts(found, tables[name], settings, source, device, peers, f"--{name}", stems)
    if stems is None or stems.unsaid == unsaid:
        return settings
    return replace(settings, stems=stems.key.partition("-")[0])


def read_in_parts(
    found: HubDataset, tables: TableSettings, settings: DataSettings, source: Source, device: torch.device,
    peers: Peers, flag: str, stems: Mix | Demucs | None = None,
) -> None:
    """Have stand-ins for all files of the data set, and codes and melodies of all its clips, in the cache.

    tables  which rows and columns of its tables are used
    flag    which one named the data set, for messages
    stems   what melodies are heard in; None for a text model

    The first process inspects and decides; on each machine one process fetches; each encodes its share. What was read
    before is not fetched again, unless its codes are asked for in another way (as with other --code_views).

    Raises DataError where a file cannot be fetched, StorageError where a disk has no room, ConfigError where another
    run reads the same data set.
    """
    reader = _Reader(found, tables, settings, source, device, peers, flag, stems)
    waiting = reader.unread()
    if not waiting:
        return
    with alone_with(reader.stand_ins) if peers.rank == 0 else nullcontext():
        reader.read(waiting)


class _Reader:
    """One reading of a data set by one process; all processes call `read`, and wait for each other in it."""

    def __init__(
        self, found: HubDataset, tables: TableSettings, settings: DataSettings, source: Source, device: torch.device,
        peers: Peers, flag: str, stems: Mix | Demucs | None,
    ):
        self._found, self._tables, self._settings, self._flag = found, tables, settings, flag
        self._source, self._device, self._peers = source, device, peers
        self.stand_ins = stand_ins_of(found, settings.cache_dir)
        self._beside = beside_sounds(found)
        self._folder = PartFolder(found, settings.cache_dir)
        self._store = cache.code_store(
            settings.cache_dir, source.codec_identity(), settings.code_views, settings.treatment, source.channels
        )
        self._stems = stems
        self._load_codec: Callable[[], EncodecModel] = once(lambda: load_codec(source).to(device))
        self._hosts = [""]

    def unread(self) -> list[str]:
        """The files that have to be read, as the first process finds it."""
        found = self._unread() if self._peers.rank == 0 else []
        self._peers.wait("parts")
        return self._peers.gather(found)[0]

    def read(self, waiting: list[str]) -> None:
        """Read these files, part by part. The first process says what each part is."""
        peers = self._peers
        self._hosts = peers.gather(socket.gethostname())
        total, number = len(waiting), 0
        self._on_each_machine("removing parts that are read", partial(self._folder.keep_only, set(waiting)))
        while waiting:
            part, number = self._next_part(waiting), number + 1
            if peers.rank == 0:
                self._say(part, number, total - len(waiting), total)
            self._on_each_machine("fetching a part", partial(self._folder.fetch, part, self._flag))
            if peers.rank == 0:
                self._take_in(part)
            self._encode(part)
            self._on_each_machine("removing a part", partial(self._folder.remove, part))
            waiting = [name for name in waiting if name not in set(part)]
        self._on_each_machine("removing parts", self._folder.clear)
        if peers.rank == 0:
            self._check_complete()
            record(self._found, self._tables.config, self._tables.split, self._settings.cache_dir)

    def _unread(self) -> list[str]:
        """The files that must be read: no stand-in is there, or something of their sounds is not known or encoded."""
        known = self.stand_ins.names() & set(self._found.files)
        if not known:
            return list(self._found.files)
        channels = self._source.channels
        lacking = [one for one in self._references(known) if self.stand_ins.lacks(one, channels)]
        unknown = {self.stand_ins.name_of(one) for one in lacking}
        clips = self._clips(known - unknown)
        missing = [*cache.missing_codes(self._store, clips).values()]
        if self._stems:
            missing += melodies.missing_melodies(self._melody_store(self._stems), clips).values()
        unknown |= {self.stand_ins.name_of(clips["path_bytes"][rows[0]]) for rows in missing}
        waiting = {name for name in self._found.files if name not in known or name in unknown}
        # A clip is read together with the melodies beside it.
        groups = in_groups([name for name in self._found.files if is_sound_name(name)])
        waiting.update(name for group in groups if waiting & set(group) for name in group)
        return [name for name in self._found.files if name in waiting]

    def _check_complete(self) -> None:
        unread = self._unread()
        if unread:
            raise StorageError(
                f"{self._flag} {self._found.repo}: of {len(unread):,} file(s) that were read in parts, such as"
                f" {unread[0]}, the cache {self._settings.cache_dir} lacks something: was it removed? Run again"
            )

    def _next_part(self, waiting: Sequence[str]) -> Sequence[str]:
        peers = self._peers
        peers.wait("a part")
        free = min(peers.gather(free_bytes()))
        part: Sequence[str] = ()
        if peers.rank == 0:
            # Another machine may lack what this one has.
            here = self._folder.here(waiting) if len(set(self._hosts)) == 1 else {}
            part = next_part(self._found, waiting, here, free, self._flag)
        peers.wait("the next part")
        return peers.gather(part)[0]

    def _say(self, part: Sequence[str], number: int, done: int, total: int) -> None:
        sizes = dict(zip(self._found.files, self._found.sizes, strict=True))
        print(
            f"{self._found.repo}, part {number}: {len(part):,} file(s), {size(sum(sizes[name] for name in part))};"
            f" {done:,} of {total:,} file(s) are done",
            flush=True,
        )

    def _on_each_machine(self, what: str, action: Callable[[], object]) -> None:
        """Do it on the first process, then on the first one of each other machine, which may share the disk."""
        rank = self._peers.rank
        first_here = self._hosts.index(self._hosts[rank]) == rank
        for turn in (rank == 0, first_here and rank != 0):
            if turn:
                action()
            self._peers.wait(what)

    def _take_in(self, part: Sequence[str]) -> None:
        """Make what stands in for the files of the part, and learn what is known of their sounds."""
        here = self._folder.here(part)
        for name in part:
            self.stand_ins.place(name, here[name])
        there = {one: self.stand_ins.leading_to(here, one) for one in self._references(part)}
        paths, channels = [os.fsdecode(place) for place in there.values()], self._source.channels
        learnt = inspect_all(paths, self.stand_ins.kept / READING, channels=channels)
        forget_tables()
        self.stand_ins.keep(part, {one: learnt[os.fsdecode(place)] for one, place in there.items()})

    def _references(self, names: Collection[str]) -> list[bytes]:
        """Of all sounds of these files, into the stand-ins."""
        tables = frozenset(filter(is_table_name, names))
        rows = scan_tables(str(self.stand_ins.folder), replace(self._tables, files=tables)).items if tables else ()
        files = [os.fsencode(self.stand_ins.folder / name) for name in names if is_sound_name(name)]
        return [*(os.fsencode(row.reference) for row in rows if isinstance(row, TableRow)), *files]

    def _clips(self, names: Collection[str]) -> Columns:
        """The clips of these files, as the run's settings have it."""
        settings = self._settings
        return manifest.look(
            self.stand_ins.folder,
            min_seconds=settings.min_seconds,
            facts_folder=self.stand_ins.kept,
            show_progress=False,
            captions=settings.captions,
            treatment=settings.treatment,
            tables=replace(self._tables, files=frozenset(names) | self._beside),
            channels=self._source.channels,
        ).columns

    def _encode(self, part: Sequence[str]) -> None:
        """Encode what the cache lacks of the part's clips; what cannot be encoded is known as a fault from then on."""
        peers = self._peers
        clips = self._shared(self._clips(part) if peers.rank == 0 else None)
        if self._stems:
            tell(self._stems, clips["melody_content"], peers)
        references = clips["path_bytes"]
        here = self._folder.here(part)
        paths = [name for name in ("path_bytes", "melody_path_bytes") if name in clips]
        places = {name: [one and self.stand_ins.leading_to(here, one) for one in clips[name]] for name in paths}
        there = {**clips, **places}
        faults = cache.fill_codes(
            self._store,
            there,
            self._load_codec,
            sample_rate_hz=self._source.sample_rate_hz,
            views=self._settings.code_views,
            channels=self._source.channels,
            device=self._device,
            show_progress=peers.rank == 0,
            rank=peers.rank,
            world_size=peers.world_size,
        )
        found_in = [(references[row], fault) for row, fault in faults]
        if self._stems:
            of_melodies = melodies.fill_melodies(
                self._melody_store(self._stems),
                there,
                self._stems,
                device=self._device,
                show_progress=peers.rank == 0,
                rank=peers.rank,
                world_size=peers.world_size,
            )
            found_in += [(melodies.references(clips)[row], fault) for row, fault in of_melodies]
        forget_tables()
        peers.wait("codes of a part")
        of_ranks = peers.gather([(reference, fault.fate, fault.detail) for reference, fault in found_in])
        found = {one: AudioFault(fate, detail) for of_rank in of_ranks for one, fate, detail in of_rank}
        if peers.rank == 0:
            if found:
                self.stand_ins.keep_faults(found)
            remove(self.stand_ins.kept / READING)

    def _melody_store(self, stems: melodies.Stems) -> cache.Store:
        return melodies.melody_store(self._settings.cache_dir, self._settings.treatment, stems.key)

    def _shared(self, clips: Columns | None) -> Columns:
        """The first process's clips, on every process, with references into this one's stand-ins."""
        peers, folder = self._peers, self._settings.cache_dir / "scan"
        if peers.world_size == 1 and clips is not None:
            return clips
        handed = None
        if clips is not None:
            handed = clip_table.write(Manifest(columns=clips, fates=()), folder), self.stand_ins.start
        peers.wait("clips of a part")
        names, start = peers.gather(handed)[0]
        read = clip_table.read(names, folder).columns
        own = self.stand_ins.start
        moved = {name: [one and own + one.removeprefix(start) for one in read[name]] for name in PATHS}
        return {**read, **moved}
