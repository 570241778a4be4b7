"""What the checks gave, kept in gpu_checks.json, and gpu_checks.md, which is made from it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from gpu_checks.check import Check
from trainer.atomic import write_whole
from trainer.errors import DataError

JSON, MARKDOWN = "gpu_checks.json", "gpu_checks.md"
Outcome = Literal["passed", "failed", "cut"]
MESSAGE_LINES = 40  # of a failed check, the last of its output


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one run of a check gave.

    outcome   cut: its time limit, or the end of the minutes, came first
    figure    what was measured, in words
    message   of one that did not pass: the end of its output
    card      the GPU's name; versions: of the packages that matter, by name
    commit    where the project lies in a git repository; with + where files differ from it
    digest    of the files that the check depends on (gpu_checks/digest.py)
    """

    check: str
    outcome: Outcome
    figure: str
    message: str
    seconds: float
    date: str
    card: str
    digest: str
    commit: str = ""
    versions: dict[str, str] = field(default_factory=dict)


def read(folder: Path) -> list[Result]:
    """The results in `folder`; [] where there are none. Raises DataError where the file is none of ours."""
    path = folder / JSON
    if not path.exists():
        return []
    try:
        return [Result(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} cannot be read ({error}): move it away, and the checks start anew") from error


def joined(*lists: Sequence[Result]) -> list[Result]:
    """All results, the oldest first. Of a check on a card, the last of each outcome is kept."""
    kept: dict[tuple[str, str, str], Result] = {}
    for result in sorted((result for results in lists for result in results), key=lambda result: result.date):
        key = (result.check, result.card, result.outcome)
        kept.pop(key, None)
        kept[key] = result
    return list(kept.values())


def has_passed(results: Sequence[Result], check: Check, card: str, digest: str) -> Result | None:
    """The result that shows `check` on this card and this code, if there is one."""
    for result in reversed(results):
        if (result.check, result.card, result.digest) == (check.name, card, digest) and result.outcome == "passed":
            return result
    return None


def write(folder: Path, results: Sequence[Result], checks: Sequence[Check]) -> None:
    """Write both files, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(asdict(result), ensure_ascii=False) for result in results)
    write_whole(folder / JSON, (f"[\n{lines}\n]\n" if lines else "[]\n").encode())
    write_whole(folder / MARKDOWN, markdown(results, checks).encode())


def markdown(results: Sequence[Result], checks: Sequence[Check]) -> str:
    """A table of all checks in their order, one row for each card; the messages of those that did not pass below it."""
    text = [
        "# What GPUs have shown",
        "",
        "Made by `python scripts/gpu_check.py`. Of each check the newest result on each GPU stands here. Which of them",
        "are of the code as it is now, `--dry_run` says; the next call goes on with the others.",
        "",
        "| check | what it shows | result | figure | card | date | commit |",
        "|---|---|---|---|---|---|---|",
    ]
    failures: list[str] = []
    for check in checks:
        newest = _newest_by_card(results, check)
        if not newest:
            text.append(_row(check.name, check.claim, "not run yet", "", "", "", ""))
        for result in newest:
            outcome = result.outcome if result.outcome == "passed" else f"**{result.outcome}**"
            cells = (outcome, result.figure, result.card, result.date[:10], result.commit)
            text.append(_row(check.name, check.claim, *cells))
            if result.outcome != "passed":
                quoted = "\n".join(f"    {line}" for line in result.message.splitlines())
                failures.append(f"### {check.name}: {result.outcome} after {result.seconds:.0f} s\n\n{quoted}\n")
    if failures:
        text += ["", "## What did not pass", "", *failures]
    versions = {f"{result.card}: " + _words(result.versions): None for result in results}
    if versions:
        text += ["", "## Versions", "", *(f"- {line}" for line in versions)]
    return "\n".join(text).rstrip() + "\n"


def last_lines(output: str) -> str:
    """The end of a check's output, as a result keeps it."""
    return "\n".join(output.rstrip().splitlines()[-MESSAGE_LINES:])


def _newest_by_card(results: Sequence[Result], check: Check) -> list[Result]:
    of_card = {result.card: result for result in results if result.check == check.name}
    return list(of_card.values())


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _words(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
