"""Runs checks, several at once where their memory allows, each until its time limit, all until the minutes are over."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gpu_checks.check import FIGURE, ROOT, Check
from gpu_checks.record import Outcome, last_lines

# The last line of pytest, which Python may still follow with warnings.
SUMMARY = re.compile(r"\d+ (?:passed|failed|skipped|errors?|xfailed|deselected)\b.* in [\d.]+s.*")
SHARE_OF_MEMORY = 0.9  # of the card's, for checks that run beside each other
SECONDS_TO_DIE = 30.0  # longest wait for killed processes; one that waits in a driver may take some


@dataclass(frozen=True, kw_only=True)
class Ended:
    """What a check's process gave."""

    outcome: Outcome
    figure: str
    message: str
    seconds: float


def run_all(
    checks: Sequence[Check],
    *,
    seconds: float,
    at_once: int,
    card_gib: float,
    run: Callable[[Check, float], Ended] | None = None,
) -> Iterator[tuple[Check, Ended]]:
    """Each check with what it gave, as it ends; those that do not fit into `seconds` are left out.

    They start in their order. One is left out where less time is left than it usually takes. One that measures time
    waits until no other runs, and none is started beside it.

    at_once   most checks at a time; card_gib: device memory, which those must share
    run       what runs a check within a number of seconds: `run_check`
    """
    run = run or run_check
    end = time.monotonic() + seconds
    waiting, running = list(checks), dict[Future[Ended], Check]()
    with ThreadPoolExecutor(at_once) as pool:
        while waiting or running:
            left = end - time.monotonic()
            waiting = [check for check in waiting if check.usual_seconds <= left]
            if waiting and _fits(waiting[0], list(running.values()), at_once, card_gib):
                check = waiting.pop(0)
                running[pool.submit(run, check, min(left, check.limit_seconds))] = check
                continue
            if running:
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(done), done.result()


def _fits(check: Check, beside: Sequence[Check], at_once: int, card_gib: float) -> bool:
    if not beside:
        return True
    if check.alone or any(other.alone for other in beside) or len(beside) >= at_once:
        return False
    return check.gib + sum(other.gib for other in beside) <= SHARE_OF_MEMORY * card_gib


def run_check(check: Check, seconds: float) -> Ended:
    """Run the check's test in a process group of its own, which is killed whole when the time is over."""
    command = [sys.executable, "-m", "pytest", check.test, "-q", "-s", "-rs", "--no-header", "-p", "no:cacheprovider"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "scripts"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    since = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    cut = False
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        cut = True
    finally:
        _kill_group(process.pid)  # a rank that outlived its test holds memory that the next check needs
    if cut:
        output, _ = process.communicate()
    figures = [line.removeprefix(FIGURE) for line in output.splitlines() if line.startswith(FIGURE)]
    outcome = _outcome(process.returncode, output, cut)
    return Ended(
        outcome=outcome,
        figure="; ".join(figures),
        message="" if outcome == "passed" else last_lines(output),
        seconds=time.monotonic() - since,
    )


def _outcome(code: int, output: str, cut: bool) -> Outcome:
    if cut:
        return "cut"
    # A test that skipped itself has shown nothing, though pytest's exit code is 0. Python may warn after the summary.
    summaries = [line for line in output.splitlines() if SUMMARY.fullmatch(line.strip(" ="))]
    last = summaries[-1] if summaries else ""
    return "passed" if code == 0 and " passed" in last and "skipped" not in last else "failed"


def _kill_group(leader: int) -> None:
    """Kill all processes of a group, and wait until none of them holds anything: a signal is only sent, not obeyed."""
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)
    end = time.monotonic() + SECONDS_TO_DIE
    while _lives(leader) and time.monotonic() < end:
        time.sleep(0.02)


def _lives(group: int) -> bool:
    """Whether a process of the group is there that is no zombie: those have given everything back."""
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it ended meanwhile
            # Before the last bracket stands the command's name, which may hold anything.
            state, _, its_group = entry.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state not in "ZX":
                return True
    return False
