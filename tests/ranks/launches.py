"""Runs of launch.py on several ranks: each rank calls its main, as a process of its own, with its output in a file."""

from __future__ import annotations

import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.ranks.harness import RankProcesses
from tests.runs import few_clips

FLAGS = [
    *("--dataset", "data", "--model_id", "debug", "--code_views", "1", "--segment_seconds", "2", "--lr", "3e-3"),
    *("--global_batch", "4", "--batch_size", "2", "--use_cfg", "1", "--cfg_rate", "0.3", "--epochs", "1000"),
    # Saves almost all the time, so that kills hit saves too.
    *("--checkpoint_minutes", "0.0001"),
]


def start(
    folder: Path,
    *flags: str,
    world_size: int = 2,
    change: Callable[[], None] | None = None,
    of_rank: Sequence[Sequence[str]] = (),
    environments: Sequence[Mapping[str, str]] = (),
) -> RankProcesses:
    """The run in `folder`, which gets data/, cache/ and models/; started, not waited for.

    change   called on every rank before launch.py's main
    of_rank  further flags of each rank
    environments  variables of each rank besides (see RankProcesses)
    """
    if not (folder / "data").exists():
        few_clips(folder / "data")
    every = [[*FLAGS, *flags, *(of_rank[rank] if of_rank else ())] for rank in range(world_size)]
    return RankProcesses(world_size, launched, (str(folder), every, change), {}, environments)


def ends(running: RankProcesses, folder: Path, seconds: float = 60) -> list[tuple[int, str]]:
    """Exit code and output of each rank; a rank that has not ended by itself after `seconds` fails the test."""
    deadline = time.monotonic() + seconds
    for process in running.processes:
        process.join(max(0.0, deadline - time.monotonic()))
    hung = [rank for rank, process in enumerate(running.processes) if process.exitcode is None]
    codes = [int(value) for _, value in running.results(1)] if not hung else []
    outputs = [(folder / f"rank-{rank}.log").read_text() for rank in range(len(running.processes))]
    if hung:
        for process in running.processes:
            process.kill()
        raise AssertionError(f"rank {hung} did not end in {seconds:.0f} s:\n" + "\n".join(outputs))
    return list(zip(codes, outputs, strict=True))


def launch(folder: Path, *flags: str, world_size: int = 2, expect: int = 0) -> str:
    """Rank 0's output of a finished run, in which every rank's exit code must be `expect`."""
    ended = ends(start(folder, *flags, world_size=world_size), folder, 120)
    assert [code for code, _ in ended] == [expect] * world_size, "\n".join(output for _, output in ended)
    return ended[0][1]


def send(running: RankProcesses, rank: int, number: int) -> None:
    """A signal to one rank."""
    pid = running.processes[rank].pid
    assert pid is not None
    os.kill(pid, number)


def wait_until(running: RankProcesses, happened: Callable[[], object], seconds: float = 60) -> None:
    """Return once `happened()` is true; all ranks must live until then."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert all(process.is_alive() for process in running.processes), "a rank ended too soon"
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.001)


def steps_reported(folder: Path, since_ns: int = 0) -> int:
    """Lines of metrics.jsonl, if it was written since then."""
    path = folder / "models" / "metrics.jsonl"
    written = path.exists() and path.stat().st_mtime_ns > since_ns
    return len(path.read_text().splitlines()) if written else 0


def saving(folder: Path) -> bool:
    return any(folder.glob("models/checkpoints/*.partial"))


def with_the_cache_of(other: Path, folder: Path) -> Path:
    """A folder for a run on the same data that need not encode them again."""
    for name in ("data", "cache"):
        shutil.copytree(other / name, folder / name)
    return folder


def launched(folder: str, flags_of_rank: Sequence[Sequence[str]], change: Callable[[], None] | None) -> int:
    """launch.py's main in this rank: its exit code, 1 where it raised, as Python's own would be."""
    rank = int(os.environ.get("RANK", "0"))
    file = os.open(Path(folder) / f"rank-{rank}.log", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.chdir(folder)
    from launch import main

    if change is not None:
        change()
    try:
        return main(flags_of_rank[rank])
    except Exception:
        traceback.print_exc()
        return 1
