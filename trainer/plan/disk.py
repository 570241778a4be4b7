"""What lies in a run's folders already and what their disks have free: the only place of this room that looks at disks.

Nothing here fails. Quotas, other users and files on the way are unknown: what it finds is good for a warning alone.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from trainer.plan.forecast import Disk, bytes_in_words


@dataclass(frozen=True, kw_only=True)
class Place:
    """A folder, which need not be there yet.

    free    bytes of its disk, None where that cannot be told
    device  tells its disk from others
    there   bytes of what lies in it, by name
    """

    folder: str
    free: int | None = None
    device: int | None = None
    there: Mapping[str, int] = field(default_factory=dict)


def place_of(folder: str, names: Iterable[str] = ()) -> Place:
    """What is known of `folder`, with the bytes of the files and folders of these names in it."""
    there = {name: size for name in names if (size := bytes_of(os.path.join(folder, name)))}
    above = os.path.abspath(folder)
    while not os.path.exists(above) and os.path.dirname(above) != above:
        above = os.path.dirname(above)
    try:
        return Place(folder=folder, free=shutil.disk_usage(above).free, device=os.stat(above).st_dev, there=there)
    except OSError:
        return Place(folder=folder, there=there)


def bytes_of(path: str) -> int:
    """Bytes of a file, or of all files below a folder; 0 where there is nothing, or nothing that can be read."""
    total = 0
    with suppress(OSError):
        if not os.path.isdir(path):
            return os.stat(path).st_size
    for folder, _, names in os.walk(path):
        for name in names:
            with suppress(OSError):
                total += os.lstat(os.path.join(folder, name)).st_size
    return total


def told(disk: Disk, output: Place, cache: Place, *, cached: bool) -> list[str]:
    """What a run puts onto its disks and what they have free, as a line, and a warning where that may not suffice.

    cached  whether the cache is full already, so that nothing more will be written there
    """
    line = f"disk: {disk.in_words()} in {output.folder}{_free(output)}; cache {bytes_in_words(disk.cache)}"
    if not cached:
        line += f" in {cache.folder}{_free(cache) if cache.device != output.device else ''}"
    return [one for one in (line + " (there)" * cached, _shortage(disk, output, None if cached else cache)) if one]


def _free(place: Place) -> str:
    return "" if place.free is None else f" ({bytes_in_words(place.free)} free)"


def _shortage(disk: Disk, output: Place, cache: Place | None) -> str:
    """A warning in one line where a disk has less free than the run will need of it; else "".

    cache  None where nothing more will be written there
    """
    of_output = disk.still_needed(output.there)
    of_cache = 0 if cache is None else max(0, disk.cache - sum(cache.there.values()))
    needs = [(of_output, output, "--output_dir"), (of_cache, cache or output, "--cache_dir")]
    if cache is not None and cache.device == output.device and of_cache:
        needs = [(of_output + of_cache, output, "--output_dir or --cache_dir")]
    short = [
        f"up to {bytes_in_words(needed)} will be needed in {place.folder}, whose disk has {bytes_in_words(place.free)}"
        f" free: make room, or give another {flag}"
        for needed, place, flag in needs
        if place.free is not None and needed > place.free
    ]
    return f"warning: the disk may not suffice. {'. '.join(short)}" if short else ""
