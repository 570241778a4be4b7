"""One run at a time in an output_dir, on any file system and however the run before ended.

Two signs say that a run is alive, because neither does everywhere. `.lock` is locked by flock, which local disks and
NFSv4 keep, and which ends with its process. Some mounts have no locks, or keep them to one machine: there
`.holder.json` tells, which the holder rewrites every 10 s. Who finds one of another machine waits 60 s for it to
change, and takes over if it does not; clocks are never compared. A run that ends removes it, so that only the
successor of a killed run, on another machine, has to wait.
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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO

from trainer.atomic import write_whole
from trainer.errors import EXIT_USAGE, ConfigError

BEAT_SECONDS = 10.0
STALE_SECONDS = 60.0
# Two that started at once where no lock works: the one whose file was written over sees it after this time.
FIRST_BEAT_SECONDS = 2.0
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# What all ranks of one launch have in common, and no other launch at the same time.
OF_A_LAUNCH = (
    *("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT"),
    *("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"),
)


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who runs in an output_dir, as `.holder.json` has it.

    machine  differs between machines of one name, and after a restart of the machine
    launch   see `launch_of`
    token    differs between any two runs
    beat     grows while the run is alive
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
        """Raises ConfigError, naming the holder, where another run is alive, OSError where nothing can be written."""
        self._root = root
        self._holder = _this_process()
        self._closed = threading.Event()
        self._file = _flocked(root)
        try:
            _await_silence(root, same_machine_is_free=self._file is not None, machine=self._holder.machine)
            self._write()
        except BaseException:
            if self._file is not None:
                self._file.close()
            raise
        self._thread = threading.Thread(target=self._beat, daemon=True, name="lock")
        self._thread.start()

    def close(self) -> None:
        """Let others in."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._thread.join(BEAT_SECONDS)
        found = read_holder(self._root)
        if found is not None and found.token == self._holder.token:
            holder_path(self._root).unlink(missing_ok=True)
        if self._file is not None:
            self._file.close()

    def _write(self) -> None:
        write_whole(holder_path(self._root), json.dumps(asdict(self._holder), indent=1).encode(), shared=True)

    def _beat(self) -> None:
        """Show that this run is alive, and end it where another one has taken the folder over."""
        pause = FIRST_BEAT_SECONDS
        while not self._closed.wait(pause):
            found = read_holder(self._root)
            if found is not None and found.token != self._holder.token:
                sys.stderr.write(f"\nerror: {_refusal(self._root, found)}\n")
                os._exit(EXIT_USAGE)
            self._holder = replace(self._holder, beat=self._holder.beat + 1)
            try:
                self._write()
            except OSError as error:  # the run itself ends where it has to write there
                sys.stderr.write(f"\n{holder_path(self._root)} could not be renewed ({error})\n")
            pause = BEAT_SECONDS


def holder_path(root: Path) -> Path:
    return root / ".holder.json"


def read_holder(root: Path) -> Holder | None:
    """Who runs in `root` or was killed there; None where nobody is named."""
    try:
        return Holder(**json.loads(holder_path(root).read_text()))
    except (FileNotFoundError, ValueError, TypeError):  # absent, or not of this version
        return None


def launch_of(environment: Mapping[str, str]) -> str:
    """One text for all ranks of a launch, which differs from those of other launches that run meanwhile."""
    several = environment.get("WORLD_SIZE", "1") != environment.get("LOCAL_WORLD_SIZE", "1")
    words = [environment.get(name, "") for name in OF_A_LAUNCH]
    return " ".join([*words, "" if several else socket.gethostname()])


def _this_process() -> Holder:
    return Holder(
        host=socket.gethostname(),
        machine=f"{socket.gethostname()} {BOOT_ID.read_text().strip() if BOOT_ID.exists() else ''}",
        pid=os.getpid(),
        job=os.environ.get("SLURM_JOB_ID", ""),
        since=time.strftime("%Y-%m-%d %H:%M:%S %z"),
        launch=launch_of(os.environ),
        token=secrets.token_hex(8),
    )


def _flocked(root: Path) -> IO[str] | None:
    """The locked file; None where the file system has no locks."""
    file = (root / ".lock").open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if error.errno in (errno.EAGAIN, errno.EACCES):  # the second by some NFS servers
            raise ConfigError(_refusal(root, read_holder(root))) from None
        return None
    return file


def _await_silence(root: Path, *, same_machine_is_free: bool, machine: str) -> None:
    """Return once the holder that the folder names has ended, or has given no sign of life for long enough."""
    found = read_holder(root)
    if found is None or (same_machine_is_free and found.machine == machine):
        return
    print(f"{root}: last used by {found}; waiting up to {STALE_SECONDS:.0f} s for a sign of life", flush=True)
    deadline = time.monotonic() + STALE_SECONDS
    while time.monotonic() < deadline:
        time.sleep(min(1.0, STALE_SECONDS / 4))
        now = read_holder(root)
        if now is None:
            return
        if (now.token, now.beat) != (found.token, found.beat):
            raise ConfigError(_refusal(root, now))


def _refusal(root: Path, holder: Holder | None) -> str:
    by = "" if holder is None else f" ({holder})"
    return f"--output_dir {root} is in use by another run{by}: wait for its end, or choose another folder"
