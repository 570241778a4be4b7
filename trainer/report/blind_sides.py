"""What a listening page compares: the sounds that runs made of the same prompts and seeds, at some of their steps.

A run's sounds lie in output_dir/samples/step-00000120/, and samples.json there, written last, says what they are.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.data.fates import display
from trainer.errors import ConfigError, DataError

FORMAT, VERSION = "musicgen-trainer samples", 1
STEP_FOLDER = re.compile(r"step-(\d+)")
MOST_SIDES = 6  # of one prompt: more sounds than that nobody holds in memory while judging
SETTINGS = ("guidance", "temperature", "top_k")

Key = tuple[str, int, str, float, int]  # text, seed, continued clip and seconds, and how many like it came before


@dataclass(frozen=True, kw_only=True)
class Side:
    """The sounds of one run at one step.

    run      as it was given, for a person
    folder   where the sounds lie
    samples  samples.json's entries of the sounds that were made, by what was asked for
    settings guidance, temperature and top_k
    """

    run: str
    step: int
    weights: str
    folder: Path
    samples: Mapping[Key, Mapping[str, Any]]
    settings: Mapping[str, float]

    @property
    def name(self) -> str:
        """What tells it from the other sides."""
        before = " (before training)" if self.step == 0 else ""
        return f"{self.run}, step {self.step:,}{before}"


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What several sides were asked for.

    files  the sound of each side, in the order of the sides
    """

    text: str
    seed: int
    clip: str | None
    continued_seconds: float
    files: tuple[Path, ...]


def sides_of(runs: Sequence[Path], steps: Sequence[str] = ()) -> list[Side]:
    """The sides to compare: of each run those of `steps`, which are numbers, `best` or `last`.

    Without `steps`: of one run, its first step (0, the base model) and the one that it exports (finished.json's, before
    its end best.json's; where samples of it exist, else the newest); of several, the newest of each.

    Raises ConfigError for steps that are not there and for fewer than two sides; DataError for a samples.json that
    cannot be used.
    """
    names = _names(runs)
    found: list[Side] = []
    for run, name in zip(runs, names, strict=True):
        there = _steps_there(run)
        wanted = [_step(run, one, there) for one in steps] or _default_steps(run, there, alone=len(runs) == 1)
        found += [_side(name, there[step]) for step in dict.fromkeys(wanted)]
    if len(found) < 2:
        raise ConfigError(_why_one_side(found[0], _steps_there(runs[0])))
    if len(found) > MOST_SIDES:
        raise ConfigError(
            f"{len(found)} sounds of each prompt are too many to judge: give {MOST_SIDES} at most, by fewer runs or by"
            " fewer --steps"
        )
    return found


def matched(sides: Sequence[Side]) -> tuple[list[Prompt], list[str]]:
    """The prompts whose sounds all sides have, in the order of the first, and what a person must know about the rest.

    Raises DataError where the sides have none in common.
    """
    common = [key for key in sides[0].samples if all(key in side.samples for side in sides)]
    if not common:
        firsts = "; ".join(f"{side.name}: {_in_words(next(iter(side.samples)))}" for side in sides)
        raise DataError(
            f"no prompt has a sound on all sides with the same seed, so that nothing can be compared ({firsts}):"
            " compare runs with the same --sample_prompts and --seed"
        )
    notes = []
    left_out = len({key for side in sides for key in side.samples}) - len(common)
    if left_out:
        notes.append(f"{_count(left_out, 'prompt')} left out: not on all sides with the same seed")
    for name in SETTINGS:
        values = [side.settings[name] for side in sides]
        if len(set(values)) > 1:
            told = ", ".join(f"{value:g} for {side.name}" for value, side in zip(values, sides, strict=True))
            notes.append(f"the sides also differ in {name}: {told}")
    unlike = sum(len({side.samples[key].get("melody") is True for side in sides}) > 1 for key in common)
    if unlike:
        notes.append(f"not all sides follow a melody: {_count(unlike, 'prompt')}")
    return [_prompt(key, sides) for key in common], notes


def _names(runs: Sequence[Path]) -> list[str]:
    """Short names that differ: the folder's own, with as much of its path in front as that takes."""
    paths = [Path(os.path.abspath(run)) for run in runs]
    if len(set(paths)) < len(paths):
        twice = next(path for path, count in Counter(paths).items() if count > 1)
        raise ConfigError(f"{twice} is given twice: give each run once, and its steps by --steps")
    most = max(len(path.parts) for path in paths)
    for parts in range(1, most + 1):
        names = [display(str(Path(*path.parts[-parts:]))) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("different paths have different names")


def _steps_there(run: Path) -> dict[int, Path]:
    """The folders of a run's finished samples by step, in order. Raises ConfigError where there is none."""
    if not run.is_dir():
        raise ConfigError(f"{run} is no folder: give the output_dir of a run")
    folder = run / "samples"
    there = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        found = STEP_FOLDER.fullmatch(path.name)
        if found and (path / "samples.json").is_file():
            there[int(found[1])] = path
    if not there:
        raise ConfigError(
            f"{run} has no samples to listen to ({folder}/step-... with a samples.json): train with --sample_every N"
        )
    return dict(sorted(there.items()))


def _default_steps(run: Path, there: Mapping[int, Path], *, alone: bool) -> list[int]:
    last = max(there)
    if not alone:
        return [last]
    exported = _exported_step(run, last)
    return [min(there), exported if exported in there and exported is not None else last]


def _step(run: Path, wanted: str, there: Mapping[int, Path]) -> int:
    """The step that a word of --steps names. Raises ConfigError where there are no samples of it."""
    listed = ", ".join(map(str, there))
    if wanted == "last":
        return max(there)
    if wanted == "best":
        best = _best_step(run)
        if best is None:
            raise ConfigError(f"--steps best: {run} has no best.json, which --keep_best writes: name steps ({listed})")
        if best not in there:
            raise ConfigError(f"--steps best: {run} has no samples of its best step {best}, only of {listed}")
        return best
    if not (wanted.isascii() and wanted.isdecimal()):
        raise ConfigError(f"--steps {wanted!r} is no step: it takes numbers, best and last, with commas between them")
    if int(wanted) not in there:
        raise ConfigError(f"--steps {wanted}: {run} has no samples of that step, only of {listed}")
    return int(wanted)


def _exported_step(run: Path, last: int) -> int | None:
    """The step that a complete run has exported, or that an incomplete one would, where it keeps the best.

    last  of the steps with samples; a finished.json of a step before it is of an end after which the run went on
    """
    finished = run / "finished.json"
    exported = _told(finished, "exported_step") if (_told(finished, "step") or 0) >= last else None
    return _best_step(run) if exported is None else exported


def _best_step(run: Path) -> int | None:
    """The step of best.json; None where there is no such file."""
    return _told(run / "best.json", "step")


def _told(path: Path, name: str) -> int | None:
    """A number of a JSON file; None where there is none. Raises DataError where the file cannot be read."""
    try:
        values = json.loads(path.read_bytes())
        value = values.get(name)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{path} cannot be read ({error!r}): give the steps by number, as in --steps 0,120") from error
    return value if isinstance(value, int) else None


def _side(run: str, folder: Path) -> Side:
    """Raises DataError for a samples.json that is not as it should be, or that has no sound."""
    path = folder / "samples.json"
    try:
        values = json.loads(path.read_bytes())
        if (values["format"], values["version"]) != (FORMAT, VERSION):
            raise ValueError(f"format {values['format']!r}, version {values['version']!r}")
        settings = {name: float(values[name]) for name in SETTINGS}
        step, weights = int(values["step"]), str(values["weights"])
        samples: dict[Key, Mapping[str, Any]] = {}
        for one in values["samples"]:
            if one["file"] is not None:
                samples[_key(one, samples)] = one
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} is no list of samples in version {VERSION} ({error!r})") from error
    if not samples:
        raise DataError(f"{path} lists no sound: all of them failed, and log.txt of the run says why")
    return Side(run=run, step=step, weights=weights, folder=folder, samples=samples, settings=settings)


def _key(one: Mapping[str, Any], before: Mapping[Key, object]) -> Key:
    """What was asked for. Raises ValueError for a file outside of the folder."""
    name = one["file"]
    if not isinstance(name, str) or Path(name).name != name:
        raise ValueError(f"{name!r} is no name of a file")
    clip = str(one["clip"]) if one["origin"] == "continuation" else ""
    asked = (str(one["prompt"]), int(one["seed"]), clip, float(one["continued_seconds"]))
    if not math.isfinite(asked[3]):
        raise ValueError(f"continued_seconds {asked[3]}")
    return (*asked, sum(key[:4] == asked for key in before))


def _prompt(key: Key, sides: Sequence[Side]) -> Prompt:
    text, seed, clip, continued_seconds, _ = key
    files = tuple(side.folder / side.samples[key]["file"] for side in sides)
    return Prompt(text=text, seed=seed, clip=clip or None, continued_seconds=continued_seconds, files=files)


def _why_one_side(side: Side, there: Mapping[int, Path]) -> str:
    others = [str(step) for step in there if step != side.step]
    if others:
        return (
            f"there is only one side to listen to, {side.name}: name another step, as in"
            f" --steps {side.step},{others[-1]}, or another run"
        )
    return f"there is only one side to listen to, {side.name}, and no other step has samples: name another run as well"


def _in_words(key: Key) -> str:
    return f"{display(key[0]) or 'no prompt'!r} with seed {key[1]}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
