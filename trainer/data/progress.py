"""What encoding says while it runs and before it begins: a bar, and the room that it needs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tqdm import tqdm

from trainer.errors import StorageError

SECONDS_SHOWN_FROM = 2.0
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} {unit} [{elapsed}<{remaining}]"
HOURS_BAR = "{desc}: {percentage:3.0f}%|{bar}| {sound}, {real_time} [{elapsed}<{remaining}]"


class HoursBar(tqdm):
    """A bar of hours of sound, which says how many times as fast as the sound lasts they are done.

    It says minutes where there is less than an hour: its hundredths stand still for half a minute of sound.
    """

    @property
    def format_dict(self) -> dict[str, Any]:
        """tqdm's values for the bar's text, `real_time`, and `sound`: how much of it is done."""
        values = super().format_dict
        rate = values["rate"] or (self.n - self.initial) / values["elapsed"] if values["elapsed"] else None
        total = self.total or 0
        sound = f"{self.n:.2f}/{total:.2f} h" if total >= 1 else f"{60 * self.n:.1f}/{60 * total:.1f} min"
        return {**values, "sound": sound, "real_time": f"{3600 * rate:,.0f} x real time" if rate else "? x real time"}


def hours_bar(what: str, hours: float, show: bool) -> HoursBar:
    """A bar of so many hours of sound, which work of less than two seconds never shows."""
    return HoursBar(desc=what, total=hours, disable=not show, delay=SECONDS_SHOWN_FROM, bar_format=HOURS_BAR)


def counting_bar(what: str, total: float, unit: str, show: bool) -> tqdm:
    """A bar of things that are counted, which work of less than two seconds never shows."""
    return tqdm(desc=what, total=total, unit=unit, disable=not show, delay=SECONDS_SHOWN_FROM, bar_format=BAR)


def check_room(folder: Path, needed_bytes: int, what: str, *, instead: str, say: bool) -> None:
    """Say what will be added to the cache folder. Raises StorageError where its disk has less room than that.

    what     is added, in words; instead: what would need less room, for the message
    """
    place = folder
    while not place.exists():  # the folder is made with its first part
        place = place.parent
    try:
        free = shutil.disk_usage(place).free
    except OSError:  # a disk that cannot say how full it is will say so when it is written to
        return
    if needed_bytes > free:
        raise StorageError(
            f"{what} will add {size(needed_bytes)} to cache folder {folder}, whose disk has {size(free)} free: free"
            f" {size(needed_bytes - free)} there, or choose a folder on another disk with --cache_dir, or {instead}."
            " What is cached already is kept"
        )
    if say:
        tqdm.write(f"{what} will add {size(needed_bytes)} to cache")


def size(count: float) -> str:
    """A number of bytes for people: 12.3 MB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} bytes" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration(seconds: float) -> str:
    """A length of sound for people: 1.8 s, 12.3 minutes, 4.56 hours."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} minutes" if seconds < 3600 else f"{seconds / 3600:.2f} hours"
