"""What can be wrong with a sound file, said so that a person can mend it."""

from __future__ import annotations

import errno
from typing import Literal, get_args

# Each is also a kind of fate, which the file then has (trainer/data/fates.py).
FaultKind = Literal[
    "not a file", "unreadable", "unsupported format", "truncated", "empty", "not finite", "out of range", "silent"
]
FAULT_KINDS: tuple[FaultKind, ...] = get_args(FaultKind)

# What reading a file gives that a sync tool keeps online only; EDEADLK on macOS, where it may not be fetched.
FAILED_READS = (errno.EIO, errno.EINVAL, errno.ETIMEDOUT, errno.ENODATA, errno.EOPNOTSUPP, errno.EDEADLK)
ONLINE_ONLY = "If OneDrive, Dropbox, Google Drive or iCloud keeps it online only, download it first"
COPY_AGAIN = "copy or export it again"


class AudioFault(Exception):
    """A sound file that cannot be trained on; `detail` says what was found and what the user can do about it."""

    def __init__(self, fate: FaultKind, detail: str):
        super().__init__(f"{fate}: {detail}")
        self.fate: FaultKind = fate
        self.detail = detail


def unreadable(error: OSError) -> AudioFault:
    """The fault of a file at which the operating system failed."""
    reason = error.strerror or str(error)
    detail = f"cannot be opened or read ({reason}): check the link, rights and disk. {ONLINE_ONLY}"
    return AudioFault("unreadable", detail if error.errno in FAILED_READS else detail.removesuffix(f". {ONLINE_ONLY}"))


def not_here() -> AudioFault:
    """The fault of a file that has a size and no bytes: what a sync tool shows in place of one that it keeps online."""
    return AudioFault("unreadable", f"none of its bytes are on this disk. {ONLINE_ONLY}; else copy it again")


def damaged(seconds: float, reason: str) -> AudioFault:
    """The fault of a file that decodes up to so many seconds and no further."""
    where = f"decoding stops at {seconds:.1f} s ({reason})"
    return AudioFault("truncated", f"damaged or cut off, {where}: {COPY_AGAIN}")


def changes(seconds: float, then: tuple[int, int], now: tuple[int, int]) -> AudioFault:
    """The fault of a file whose sample rate or number of channels, given as a pair, changes after so many seconds."""
    (rate, channels), (other_rate, other_channels) = then, now
    what = f"changes from {rate:,} Hz, {channels} channels to {other_rate:,} Hz, {other_channels} channels"
    return AudioFault("unreadable", f"its sound {what} at {seconds:.1f} s: export it as one sound")
