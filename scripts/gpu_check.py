"""Check on this machine's GPU what only a GPU can show, in order of value, within a number of minutes.

python scripts/gpu_check.py --minutes 5 --results docs
python scripts/gpu_check.py --dry_run

Each result is written to gpu_checks.json and gpu_checks.md as soon as it is there. What has passed on this GPU and this
code is not run again, so that the next call goes on where the time was over. No network is needed.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from gpu_checks import record
from gpu_checks.check import ROOT, Check
from gpu_checks.digest import digest
from gpu_checks.listed import CHECKS
from gpu_checks.record import Result
from gpu_checks.run import Ended, run_all

from trainer.errors import ConfigError, TrainerError

PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "bitsandbytes", "peft", "datasets", "safetensors")
PROBE = """
import json, torch
if torch.cuda.is_available():
    card, version = torch.cuda.get_device_properties(0), torch.cuda.nccl.version()
    print(json.dumps({"name": card.name, "gib": card.total_memory / 2**30, "CUDA": torch.version.cuda,
                      "NCCL": ".".join(map(str, version))}))
"""


def main(argv: Sequence[str]) -> int:
    """Run what is asked for; 0 if all that ran passed, 1 if not, 2 where nothing can run."""
    arguments = _parser().parse_args(argv)
    try:
        checks = _chosen(arguments.only)
        earlier = record.joined(*(record.read(folder) for folder in {ROOT / "docs", arguments.results}))
        if arguments.dry_run:
            _list(checks, earlier)
            return 0
        return _run(checks, earlier, arguments)
    except TrainerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _chosen(words: Sequence[str]) -> list[Check]:
    """The checks that `words` name, in the order of the words; all in their own order where there are none.

    Raises ConfigError where a word names none.
    """
    chosen = {} if words else {check.name: check for check in CHECKS}
    for word in words:
        found = [check for check in CHECKS if check.name == word] or [check for check in CHECKS if word in check.name]
        if not found:
            raise ConfigError(f"--only {word!r}: no check has such a name; --dry_run lists them")
        chosen |= {check.name: check for check in found if check.name not in chosen}
    return list(chosen.values())


def _run(checks: Sequence[Check], earlier: Sequence[Result], arguments: argparse.Namespace) -> int:
    card = _card()
    name, gib = str(card.pop("name")), float(card.pop("gib"))
    versions = _versions() | {key: str(value) for key, value in card.items()}
    chosen = []
    for check in checks:
        reason = _why_not(check, earlier, name, gib, arguments.again)
        if reason:
            print(f"-- {check.name}: {reason}")
        else:
            chosen.append(check)
    print(f"{len(chosen)} checks on {name}, {arguments.minutes:g} minutes", flush=True)
    results, failed, ran = list(earlier), 0, 0
    at_once = arguments.at_once or max(1, min(4, (os.cpu_count() or 1) // 4))
    for check, ended in run_all(chosen, seconds=60 * arguments.minutes, at_once=at_once, card_gib=gib):
        results = record.joined(results, [_result(check, ended, name, versions)])
        record.write(arguments.results, results, CHECKS)
        print(f"{ended.outcome:6} {check.name}, {ended.seconds:.0f} s: {ended.figure}", flush=True)
        if ended.outcome != "passed":
            print(ended.message, flush=True)
        failed, ran = failed + (ended.outcome == "failed"), ran + 1
    print(f"{ran} ran, {failed} failed, {len(chosen) - ran} had no time; written to {arguments.results}")
    return 1 if failed else 0


def _why_not(check: Check, earlier: Sequence[Result], card: str, gib: float, again: bool) -> str:
    """Why a check is not run here; empty if it is."""
    lacking = [name for name in check.needs if importlib.util.find_spec(name) is None]
    if lacking:
        return f"needs the package {', '.join(lacking)}"
    if check.gib > gib:
        return f"needs {check.gib:g} GiB of device memory, this GPU has {gib:.0f}"
    passed = None if again else record.has_passed(earlier, check, card, _digest(check))
    return f"passed on this code on {passed.date[:10]}" if passed else ""


def _list(checks: Sequence[Check], earlier: Sequence[Result]) -> None:
    """What would run, without looking for a GPU."""
    for check in checks:
        cards = {result.card for result in earlier if record.has_passed([result], check, result.card, _digest(check))}
        state = f"passed on this code: {', '.join(sorted(cards))}" if cards else "not shown on this code"
        needs = f"; needs {', '.join(check.needs)}" if check.needs else ""
        print(f"{check.name} (some {check.usual_seconds} s, {check.gib:g} GiB{needs}): {check.claim}\n    {state}")
    print(f"{len(checks)} checks, some {sum(check.usual_seconds for check in checks) / 60:.0f} minutes one by one")


def _result(check: Check, ended: Ended, card: str, versions: dict[str, str]) -> Result:
    return Result(
        check=check.name,
        outcome=ended.outcome,
        figure=ended.figure,
        message=ended.message,
        seconds=round(ended.seconds, 1),
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        card=card,
        digest=_digest(check),
        commit=_commit(),
        versions=versions,
    )


@cache
def _digest(check: Check) -> str:
    return digest(ROOT, check.file)


def _card() -> dict[str, str | float]:
    """Name and memory of the first GPU, asked for in another process: a context here would take of its memory."""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    if done.returncode or not done.stdout.strip():
        why = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "torch.cuda.is_available() says no"
        raise ConfigError(
            f"torch finds no GPU here ({why}). --dry_run lists the checks without one, and `bash scripts/test.sh`"
            " runs those of them that a CPU can run"
        )
    return json.loads(done.stdout.splitlines()[-1])


def _versions() -> dict[str, str]:
    installed = [name for name in PACKAGES if importlib.util.find_spec(name) is not None]
    return {"Python": sys.version.split()[0], **{name: importlib.metadata.version(name) for name in installed}}


@cache
def _commit() -> str:
    """The commit that lies here, with + where files differ from it; empty without a repository."""
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        changed = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:  # no git
        return ""
    return "" if head.returncode else head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5, help="no check is running after so many minutes")
    parser.add_argument("--results", type=Path, default=ROOT / "docs", help="folder of gpu_checks.json and .md")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help=(
        "these checks, in this order: one by its name, or all whose names contain the word"
    ))  # fmt: skip
    parser.add_argument("--again", action="store_true", help="also those that have passed on this code")
    parser.add_argument("--at_once", type=int, help="most checks beside each other; a quarter of the cores, 4 at most")
    parser.add_argument("--dry_run", action="store_true", help="list the checks and what is known of them")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
