"""Failures that the user of the program can mend, and the exit code of each.

The message of such a failure says what was given, why it fails and what would work. Any other exception is a defect of
the program and shows its traceback.
"""

from __future__ import annotations

import errno
import re

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_DATA = 3
EXIT_STORAGE = 4
EXIT_NOT_FINITE = 5
EXIT_OUT_OF_MEMORY = 6
EXIT_RESUME = 75  # EX_TEMPFAIL of sysexits.h: stopped on request, saved; run the same command again


class TrainerError(Exception):
    """A failure with a message for the user. `exit_code` is the exit code of a process that it ends."""

    exit_code = EXIT_FAILED


class ConfigError(TrainerError):
    """A flag, or a combination of flags, that cannot work."""

    exit_code = EXIT_USAGE


class DataError(TrainerError):
    """A dataset from which nothing can be trained."""

    exit_code = EXIT_DATA


class ModelError(TrainerError):
    """A model that cannot be found, read or trained here."""


class CheckpointError(TrainerError):
    """A checkpoint that is incomplete, or that belongs to another run."""


class StorageError(TrainerError):
    """A folder that cannot be written, or a disk that is full."""

    exit_code = EXIT_STORAGE


class NotFiniteError(TrainerError):
    """A loss or gradient norm that is NaN or infinite; no weight was changed by it."""

    exit_code = EXIT_NOT_FINITE


class MemoryShortError(TrainerError):
    """Device memory that does not suffice for the planned micro-batch."""

    exit_code = EXIT_OUT_OF_MEMORY


class PeerLostError(TrainerError):
    """Another process of the run is gone. Complete checkpoints stay valid, and the same command resumes."""


DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # full, over quota, read-only


def exit_code_of(error: BaseException) -> int:
    """The exit code of a process that `error` ends."""
    if isinstance(error, KeyboardInterrupt):
        return EXIT_RESUME
    if isinstance(error, TrainerError):
        return error.exit_code
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return EXIT_STORAGE
    return EXIT_FAILED


def in_words(error: BaseException) -> str:
    """What a library's error and the one that it came from say in their first lines, without signatures."""
    texts = [str(error)] if error.__cause__ is None else [str(error), str(error.__cause__)]
    lines = [line.strip().rstrip(".") for text in texts for line in text.splitlines()[:3] if line.strip()]
    return without_signatures("; ".join(lines)) or type(error).__name__


def without_signatures(text: str) -> str:
    """The text without what is behind a ? in its addresses: there are signatures, by which anybody may write or read
    the file at that address for an hour or so."""
    return _QUERY.sub(r"\1", text)


_QUERY = re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\"]*")
