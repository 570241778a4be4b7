"""One run at a time in an output_dir, on any file system and however the run before ended.

No single sign works on every file system, so two say that a run is alive:

- `.lock` is locked by flock. Local disks and NFSv4 keep such locks, and a lock ends with its process, so a killed run
  blocks nobody. Some mounts have no locks, or keep them to one machine.
- `.holder.json` says who runs there. The holder writes it anew every 10 s with a counter that is one higher.

A starting run that gets the lock, but finds a `.holder.json` that another machine wrote, watches the file for up to
60 s. If the counter changes, the other run is alive and this one is refused. If it does not, the other run was killed
and this one takes the folder over. Clocks of two machines are never compared, because they may differ. A run that ends
removes the file; so only a run that follows a killed run, on another machine or without locks, has to wait.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO

from trainer.atomic import check_operations, names_in, write_whole
from trainer.errors import EXIT_USAGE, ConfigError
from trainer.run.console import settle

HEARTBEAT_SECONDS = 10.0
# A holder whose counter stands still for so long was killed. Several heartbeats long, for slow network file systems.
STALE_SECONDS = 60.0
# Two runs may start at once where no lock works, and both write the file. The one whose file was written over finds
# that out at its first heartbeat, which therefore comes early.
FIRST_HEARTBEAT_SECONDS = 2.0
# NFS answers ESTALE where another machine renames a file over the one that was just looked up. The next look finds it.
STALE_LOOKS = 5
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# Environment variables that all ranks of one launch have in common. At least one of them differs in any other launch
# that runs at the same time.
LAUNCH_VARIABLES = (
    *("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT"),
    *("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"),
)


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The run that holds an output_dir, as `.holder.json` stores it; the names of the fields are the file's keys.

    machine  host name and boot id, so that it differs between machines of one name and after a restart of a machine
    job      SLURM's job id, or empty
    since    local time of the start with its offset, for messages only
    launch   what `launch_of` says
    token    random, differs between any two runs
    beat     grows by 1 with each heartbeat
    """

    host: str
    machine: str
    pid: int
    job: str
    since: str
    launch: str
    token: str
    beat: int = 0

    def __str__(self) -> str:
        job = f"SLURM job {self.job}, " if self.job else ""
        return f"{job}process {self.pid} on {self.host}, since {self.since}"


class RunLock:
    """Owns an output_dir until it is closed or its process ends."""

    def __init__(self, root: Path):
        """Take the folder; this may wait for STALE_SECONDS.

        Raises ConfigError, which names the holder, where another run is alive; OSError where nothing can be written, or
        where the file system lacks what a run needs of it.
        """
        self._root = root
        self._holder = _holder_of_this_process()
        self._closed = threading.Event()
        self._file = _try_to_lock(root)
        try:
            _wait_until_free(root, flock_is_held=self._file is not None, machine=self._holder.machine)
            check_operations(root)  # not before, so that a run which is refused has changed nothing here
            self._write_holder()
        except BaseException:
            if self._file is not None:
                self._file.close()
            raise
        self._thread = threading.Thread(target=self._send_heartbeats, daemon=True, name="lock")
        self._thread.start()

    def close(self) -> None:
        """Give the folder back. Calling it again does nothing."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._thread.join(HEARTBEAT_SECONDS)
        try:
            found = read_holder(self._root)
            if found is not None and found.token == self._holder.token:
                holder_path(self._root).unlink(missing_ok=True)
        except OSError as error:  # the run has ended as it has; the next one waits a minute more
            _say(f"{holder_path(self._root)} could not be removed ({error})")
        if self._file is not None:
            self._file.close()

    def _write_holder(self) -> None:
        write_whole(holder_path(self._root), json.dumps(asdict(self._holder), indent=1).encode(), shared=True)

    def _send_heartbeats(self) -> None:
        """Show that this run is alive, and end the process where another run has taken the folder over.

        Nothing that a disk or a console answers ends the thread: a run without heartbeats looks like a killed one.
        """
        pause = FIRST_HEARTBEAT_SECONDS
        while not self._closed.wait(pause):
            try:
                found = read_holder(self._root)
                if found is not None and found.token != self._holder.token:
                    _say(f"error: {_refusal(self._root, found)}")
                    settle()
                    os._exit(EXIT_USAGE)  # not an exception: this is a thread, and the main thread may be anywhere
                self._holder = replace(self._holder, beat=self._holder.beat + 1)
                self._write_holder()
            except OSError as error:  # a disk that stays like this ends the run when the run itself writes to it
                _say(f"{holder_path(self._root)} could not be renewed ({error})")
            pause = HEARTBEAT_SECONDS


def holder_path(root: Path) -> Path:
    """The file in `root` that names the run that holds it."""
    return root / ".holder.json"


def read_holder(root: Path) -> Holder | None:
    """The run that holds `root` or was killed there; None where nobody is named.

    Raises OSError where the disk does not answer: then nobody knows.
    """
    path = holder_path(root)
    for looks_left in reversed(range(STALE_LOOKS)):
        try:
            if path.name not in names_in(root):
                return None
            return Holder(**json.loads(path.read_text()))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, TypeError):  # empty or cut by a power loss, or written by another version of the program
            return None
        except OSError as error:
            if error.errno != errno.ESTALE or looks_left == 0:
                raise
    raise AssertionError("the last look returns or raises")


def launch_of(environment: Mapping[str, str]) -> str:
    """A text that is the same for all ranks of a launch, and differs from that of any other launch at the same time.

    The host's name is part of it only where all ranks are on one machine.
    """
    several_machines = environment.get("WORLD_SIZE", "1") != environment.get("LOCAL_WORLD_SIZE", "1")
    values = [environment.get(name, "") for name in LAUNCH_VARIABLES]
    return " ".join([*values, "" if several_machines else socket.gethostname()])


def _holder_of_this_process() -> Holder:
    return Holder(
        host=socket.gethostname(),
        machine=f"{socket.gethostname()} {BOOT_ID.read_text().strip() if BOOT_ID.exists() else ''}",
        pid=os.getpid(),
        job=os.environ.get("SLURM_JOB_ID", ""),
        since=time.strftime("%Y-%m-%d %H:%M:%S %z"),
        launch=launch_of(os.environ),
        token=secrets.token_hex(8),
    )


def _try_to_lock(root: Path) -> IO[str] | None:
    """The locked file, to be kept open; None where the file system has no locks.

    Raises ConfigError where another process holds the lock.
    """
    try:
        # Not for appending, which not every mount can do, and which check_operations then names.
        file = os.fdopen(os.open(root / ".lock", os.O_RDWR | os.O_CREAT, 0o666), "r+")
    except OSError:
        check_operations(root)  # says more, if it fails as well
        raise
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if error.errno in (errno.EAGAIN, errno.EACCES):  # some NFS servers answer with EACCES
            raise ConfigError(_refusal(root, _holder_if_readable(root))) from None
        return None
    return file


def _wait_until_free(root: Path, *, flock_is_held: bool, machine: str) -> None:
    """Return once the run that the folder names has ended, or has shown no heartbeat for STALE_SECONDS.

    flock_is_held  whether this process has the lock: then a holder on the same machine has ended, because its process
                   would have the lock otherwise

    Raises ConfigError where the other run shows a heartbeat.
    """
    found = read_holder(root)
    if found is None or (flock_is_held and found.machine == machine):
        return
    print(f"{root}: last used by {found}; waiting up to {STALE_SECONDS:.0f} s for a sign of life", flush=True)
    deadline = time.monotonic() + STALE_SECONDS
    unread: OSError | None = None
    while time.monotonic() < deadline:
        time.sleep(min(1.0, STALE_SECONDS / 4))
        try:
            now, unread = read_holder(root), None
        except OSError as error:
            unread = error
            continue
        if now is None:
            return
        if (now.token, now.beat) != (found.token, found.beat):
            raise ConfigError(_refusal(root, now))
    if unread is not None:  # a counter that cannot be read does not stand still
        raise unread


def _holder_if_readable(root: Path) -> Holder | None:
    with suppress(OSError):
        return read_holder(root)
    return None


def _say(text: str) -> None:
    """A line on the console, if there still is one."""
    with suppress(OSError, ValueError):
        sys.stderr.write(f"\n{text}\n")


def _refusal(root: Path, holder: Holder | None) -> str:
    by = "" if holder is None else f" ({holder})"
    return f"--output_dir {root} is in use by another run{by}: wait for its end, or choose another folder"
