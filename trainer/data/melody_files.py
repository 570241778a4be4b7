"""A sound file that is the melody of a clip: ballad.melody.wav beside ballad.wav, and no clip of its own.

It is looked at as a clip is. Where it cannot be used, the clip is left out: its own sound would be another melody than
the one that was given for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from trainer.data.audio import AudioFacts
from trainer.data.audio_facts import Stamp, stamp_of
from trainer.data.audio_fault import AudioFault
from trainer.data.fates import Fate, display
from trainer.data.folder_walk import MELODY_END, loose, melodies_among, stem
from trainer.data.inventory import InspectedFile

SHORTER_SECONDS = 0.1  # than its clip, without a remark: what a codec leaves out at the end is less

Learnt = Mapping[str, AudioFacts | AudioFault]  # what inspecting found, by path


@dataclass(frozen=True, kw_only=True)
class MelodyFile:
    """The melody of a clip.

    name        relative to the data folder; path is the absolute one
    size_bytes  0 where it cannot be asked for, which inspecting it will say
    stamp       size and modification time; None where they cannot be asked for
    """

    name: str
    path: str
    size_bytes: int
    stamp: Stamp | None


def melody_file(root: str, name: str) -> MelodyFile | None:
    """The melody file of this name below the folder `root`; None for ""."""
    if not name:
        return None
    path = os.path.join(root, name)
    try:
        status = os.stat(path)
    except OSError:
        return MelodyFile(name=name, path=path, size_bytes=0, stamp=None)
    return MelodyFile(name=name, path=path, size_bytes=status.st_size, stamp=stamp_of(status))


def in_groups(names: Sequence[str]) -> list[list[str]]:
    """Names of sounds, with their folders, in their order but for this: a clip and the melodies beside it are one
    group, which stands where its first name does. Of all others each is a group of its own."""
    by_folder: dict[str, list[str]] = {}
    for name in names:
        by_folder.setdefault(os.path.dirname(name), []).append(os.path.basename(name))
    clip_of = {
        os.path.join(folder, melody): os.path.join(folder, clip)
        for folder, inside in by_folder.items() for melody, clip in melodies_among(inside).items()
    }  # fmt: skip
    paired = {loose(stem(clip)) for clip in clip_of.values()}
    groups: dict[str, list[str]] = {}
    for name in names:
        own = loose(stem(clip_of.get(name, name)))
        groups.setdefault(f"{own}." if own in paired else name, []).append(name)
    return list(groups.values())


def fate_of_clip(shown: str, melody: MelodyFile, fault: AudioFault) -> Fate:
    """The fate of a clip, as it is shown, whose melody cannot be used."""
    detail = f"its melody {_short(melody)} is {fault.fate}: {fault.detail}"
    return Fate(path=shown, fate="melody unusable", detail=detail)


def with_faults(fates: Iterable[Fate], melodies: Sequence[MelodyFile], learnt: Learnt) -> list[Fate]:
    """The fates, in which a melody file that cannot be used has its own fault."""
    faults = {display(one.name): said for one in melodies if isinstance(said := learnt[one.path], AudioFault)}

    def judged(fate: Fate) -> Fate:
        fault = faults.get(fate.path) if fate.fate == "melody" else None
        if fault is None:
            return fate
        return Fate(path=fate.path, fate=fault.fate, detail=f"{fault.detail} (melody {fate.detail})")

    return list(map(judged, fates))


def inspected_melodies(melodies: Iterable[MelodyFile], learnt: Learnt) -> list[InspectedFile]:
    """What was found in the melody files that are in order, each once, for the report."""
    distinct = {one.path: one for one in melodies}.values()
    return [
        InspectedFile(
            path=display(one.name), reference=os.fsencode(one.path), caption=None, caption_source="",
            caption_fields="", facts=facts,
        )
        for one in distinct
        if isinstance(facts := learnt[one.path], AudioFacts)
    ]  # fmt: skip


def remark_on_length(melody: MelodyFile | None, heard: AudioFacts | None, clip: AudioFacts) -> str:
    """What is said of a clip whose melody ends before it; else ""."""
    if melody is None or heard is None or heard.seconds >= clip.seconds - SHORTER_SECONDS:
        return ""
    return f"its melody {_short(melody)} ends after {heard.seconds:.2f} of its {clip.seconds:.2f} s"


def remark_on_name(name: str) -> str:
    """What is said of a clip that has the name of a melody; else ""."""
    own = stem(os.path.basename(name))
    if not loose(own).endswith(MELODY_END):
        return ""
    return f"no {display(own[: -len(MELODY_END)])}.* beside it whose melody it could be: a clip of its own"


def _short(melody: MelodyFile) -> str:
    return display(os.path.basename(melody.name))
