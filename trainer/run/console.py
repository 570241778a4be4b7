"""The console, and log.txt, which says the same where the console cannot: writing to either never ends a run.

While a `Console` is entered it stands in for sys.stdout and sys.stderr:

- Characters that the console's encoding lacks are escaped.
- A console that is gone (a closed terminal, a pipe without a reader) is written to no more; all else goes on.
- Every whole line goes to the log file too (trainer/run/log_file.py); frames of progress bars do not.
- Addresses in what libraries log lose what is behind a ?, where signatures are.
- Warnings of libraries go to the log file alone, because a person who looks at a run can do nothing about them. Their
  errors are shown.

What C code prints by itself (gloo, NCCL, CUDA) does not come this way.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import sys
import threading
import traceback
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO, cast

from trainer.errors import without_signatures
from trainer.run.log_file import LogFile

GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO)  # pipe without a reader, closed terminal, closed descriptor
OWN_LOGGERS = "trainer"
# How long the end of a process waits for its last lines to be in the log file, whose disk may not answer.
SETTLE_SECONDS = 5.0

_FORMAT = logging.Formatter("%(levelname)s of %(name)s: %(message)s")

# The one that is entered. Loggers of libraries are made once in a process, and must find the console of the moment.
_entered: Console | None = None


class Console:
    """Stands in for sys.stdout and sys.stderr while entered; see the module."""

    def __init__(self, *, shows_libraries: bool = False) -> None:
        """shows_libraries: leave their warnings on the console, for a program that has no log file."""
        self.shows_libraries = shows_libraries
        self._log = LogFile()
        self._bar_on: object = None  # the console whose cursor stands behind a frame of a progress bar

    def log_to(self, path: Path) -> None:
        """Open the log file, with what was said so far; to be called once this run holds the folder. Again: nothing."""
        self._log.open(path)

    def __enter__(self) -> Console:
        global _entered
        _open_standard_descriptors()
        self._records = logging.getLogRecordFactory()
        logging.setLogRecordFactory(self._record)
        self._before = sys.stdout, sys.stderr, warnings.showwarning, logging.getLoggerClass()
        self._streams = [_Stream(sys.stdout, self), _Stream(sys.stderr, self)]
        sys.stdout, sys.stderr = (cast(TextIO, stream) for stream in self._streams)
        if not self.shows_libraries:
            warnings.showwarning = self._log_warning
            logging.setLoggerClass(_Logger)
        _entered = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _entered
        if error is not None and not isinstance(error, (SystemExit, KeyboardInterrupt)):
            self.log("".join(traceback.format_exception(error)))  # Python shows it on the console
        for stream in self._streams:
            stream.leave()
        self._log.close(SETTLE_SECONDS)
        sys.stdout, sys.stderr, warnings.showwarning, loggers = self._before
        logging.setLoggerClass(loggers)
        logging.setLogRecordFactory(self._records)
        _entered = None

    def log(self, text: str) -> None:
        """Say it in the log file alone."""
        for line in text.splitlines():
            self._log.add(line)

    def settle(self, seconds: float) -> None:
        """Return once the log file holds what was said, or cannot, or after so many seconds."""
        self._log.settle(seconds)

    def separated(self, text: str, place: object) -> str:
        """`text` as it is to be written: on a line of its own where a progress bar stands in the current one.

        place  the same value for stdout and stderr where both are the same console
        """
        if is_frame(text):
            self._bar_on = place if text.strip() else None
            return text
        behind_bar = bool(text) and self._bar_on == place
        if behind_bar:
            self._bar_on = None
        return f"\n{text}" if behind_bar and not text.startswith("\n") else text

    def _record(self, *given: Any, **named: Any) -> logging.LogRecord:
        """What is logged. huggingface_hub names the whole address of a file when it asks for it again."""
        record = self._records(*given, **named)
        try:
            text = record.getMessage()
        except (TypeError, ValueError, KeyError):  # the library's arguments do not fit its own text
            return record
        if (plain := without_signatures(text)) != text:
            record.msg, record.args = plain, ()
        return record

    def _log_warning(self, message: Warning | str, category: type[Warning], filename: str, lineno: int,
                     file: TextIO | None = None, line: str | None = None) -> None:  # fmt: skip
        self.log(f"{category.__name__}: {message} ({filename}:{lineno})")


def is_frame(text: str) -> bool:
    """Whether one call of write() with `text` draws a progress bar, or moves or ends one, as tqdm does."""
    return text.startswith(("\r", "\x1b")) and "\n" not in text[:-1]


def settle(seconds: float = SETTLE_SECONDS) -> None:
    """For a process that is about to end by os._exit: return once the log file holds what was said, or cannot.

    seconds  the most that it may take
    """
    if _entered is not None:
        _entered.settle(seconds)


class _Stream:
    """sys.stdout or sys.stderr: what is written goes to the console that was there before, and by lines to the log.

    Written without locks and buffers, because signal handlers write too, and may interrupt a write.
    """

    def __init__(self, console: TextIO | None, owner: Console):
        self._console, self._owner = console, owner
        self._descriptor = _descriptor_of(console)
        self._place = _place_of(self._descriptor)
        self._begun: dict[int, str] = {}  # by thread: the line that it has not ended yet
        self.encoding = getattr(console, "encoding", None) or "utf-8"
        self.errors = "backslashreplace"
        if console is not None and self._descriptor is not None:
            _flush(console)  # what is in its buffer comes first

    def write(self, text: str) -> int:
        self._to_console(self._owner.separated(text, self._place))
        if not is_frame(text):
            thread = threading.get_ident()
            *lines, begun = (self._begun.get(thread, "") + text).split("\n")
            self._begun[thread] = begun
            for line in lines:
                # What precedes a carriage return was written over on the console.
                self._owner.log(line.rsplit("\r", 1)[-1])
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if self._console is not None and self._descriptor is None:
            _flush(self._console)

    def isatty(self) -> bool:
        return self._descriptor is not None and os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        """fileno, buffer and what else a library asks for: those of the console."""
        if name == "_console":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self._console, name)

    def leave(self) -> None:
        """Log what is left of a line; see that Python's own last writes to a console that is gone do not fail.

        They would make the exit code 120.
        """
        for text in self._begun.values():
            self._owner.log(text)
        if self._descriptor is not None and _has_no_reader(self._descriptor):
            _discard(self._descriptor)

    def _to_console(self, text: str) -> None:
        if self._descriptor is not None:
            _write_all(self._descriptor, text.encode(self.encoding, self.errors))
        elif self._console is not None:
            try:
                self._console.write(text)
                self._console.flush()
            except (OSError, ValueError):  # ValueError: it was closed
                self._console = None


class _Logger(logging.Logger):
    """What loggers of libraries are: what they would show below an error goes to the log file instead.

    Handlers that do not write to the console get every record: wandb's files, for example, and the one by which torch
    learns that nobody traces its compiler. Without that it would describe all of its work at every compilation.
    """

    def callHandlers(self, record: logging.LogRecord) -> None:
        is_own = record.name.split(".")[0] == OWN_LOGGERS
        if _entered is None or _entered.shows_libraries or is_own or record.levelno >= logging.ERROR:
            super().callHandlers(record)
            return
        willing = [handler for handler in _handlers_of(self) if record.levelno >= handler.level]
        for handler in willing:
            if not _shows(handler):
                handler.handle(record)
        # logging itself shows a warning for which there is no handler at all.
        if any(map(_shows, willing)) or (not self.hasHandlers() and record.levelno >= logging.WARNING):
            try:
                text = _FORMAT.format(record)
            except (TypeError, ValueError, KeyError):  # the library's arguments do not fit its own text
                text = f"{record.name}: {record.msg} {record.args}"
            _entered.log(text)


def _handlers_of(logger: logging.Logger) -> list[logging.Handler]:
    """The handlers that a record of this logger comes to."""
    found: list[logging.Handler] = []
    source: logging.Logger | None = logger
    while source is not None:
        found += source.handlers
        source = source.parent if source.propagate else None
    return found


def _shows(handler: logging.Handler) -> bool:
    """Whether a handler writes to the console."""
    stream = getattr(handler, "stream", None)
    return isinstance(stream, _Stream) or (stream is not None and stream in (sys.__stdout__, sys.__stderr__))


def _write_all(descriptor: int, data: bytes) -> None:
    """Write to the console, waiting for it where it is full; where it is gone, discard this and all that follows."""
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except BlockingIOError:  # another program has set the shared terminal or pipe to not block
            _poll(descriptor, timeout_ms=None)
        except OSError as error:
            if error.errno in GONE:
                _discard(descriptor)
            return  # a full disk behind `> file`, for example: this is lost, later lines may not be


def _discard(descriptor: int) -> None:
    """Let all that is written to the descriptor vanish, by C code too."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, descriptor)
    finally:
        os.close(nowhere)


def _has_no_reader(descriptor: int) -> bool:
    return bool(_poll(descriptor, timeout_ms=0) & (select.POLLERR | select.POLLHUP | select.POLLNVAL))


def _poll(descriptor: int, *, timeout_ms: int | None) -> int:
    """The events of a descriptor that can be written or has none to read from it; 0 after the timeout."""
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return next((events for _, events in poll.poll(timeout_ms)), 0)


def _descriptor_of(console: TextIO | None) -> int | None:
    try:
        return None if console is None else console.fileno()
    except (AttributeError, OSError, ValueError):  # a stream in memory
        return None


def _place_of(descriptor: int | None) -> object:
    """Equal for descriptors of one terminal, pipe or file."""
    if descriptor is None:
        return object()
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def _flush(console: TextIO) -> None:
    try:
        console.flush()
    except (OSError, ValueError):
        return


def _open_standard_descriptors() -> None:
    """Where this process was started without stdin, stdout or stderr, give it /dev/null for them.

    Otherwise the next file that is opened, a checkpoint for example, becomes what C code takes for its console.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
