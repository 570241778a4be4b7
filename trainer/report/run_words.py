"""What a page says of a run in words: its settings, the commands that go on with it, and what cannot be expected."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.report.run_facts import FAILED, FINISHED, RUNNING, Facts

TINY_PARAMETERS = 50_000_000  # Meta's smallest model has 420 million
MEANINGS = {
    1: "it failed: log.txt says why",
    2: "a flag could not work: log.txt says which",
    3: "no clip could be used",
    4: "a folder could not be written, or the disk was full",
    5: "a loss or gradient was not finite; no weight was changed by it",
    6: "the memory did not suffice",
}


def value_in_words(value: object) -> str:
    """A setting as it is typed."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(int(value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def settings_of(config: Mapping[str, Any], defaults: Mapping[str, object]) -> list[tuple[str, str, str]]:
    """Name, value and default of each setting; first those that differ, each part in the order of the file."""
    rows = [
        (str(name), value_in_words(value), value_in_words(defaults[name]) if name in defaults else "")
        for name, value in config.items()
    ]
    differs = [row for row in rows if row[1] != row[2]]
    return differs + [row for row in rows if row[1] == row[2]]


def commands_of(facts: Facts, defaults: Mapping[str, object]) -> list[tuple[str, str]]:
    """What to do next: a sentence, and a command or some lines of Python."""
    folder = str(facts.config.get("output_dir") or facts.root)
    made, done = [], facts.state == FINISHED
    exported = facts.finished.get("exported_step", facts.step) if done else None
    if facts.config:
        why = {
            FINISHED: "Train longer: the same command with more --epochs (or --max_steps) goes on from the last step.",
            RUNNING: "If it is stopped or killed, the same command goes on from the newest checkpoint.",
        }.get(facts.state, "Go on from the newest checkpoint.")
        if done and facts.finished.get("reason") == "early stop":
            why = "Train longer: the same command with a larger --early_stop, or without it, goes on."
        made.append((why, _start(facts, defaults)))
    asked, melody = _asked(facts), facts.start.get("melody") is True
    if done:
        why = "Listen to the result, with this prompt or another one."
        if melody:
            why = f"{why} --melody FILE besides names a sound whose melody the music follows."
        made.append((why, _listen(folder, asked)))
        why = "Hear what the training has changed: the same prompt and seed by the base model too, on one page."
        made.append((why, f"{_listen(folder, asked)} --compare"))
        made += _judging(facts, folder)
    if facts.checkpoint is not None and facts.checkpoint != exported:
        checkpoint = f"{folder}/checkpoints/step-{facts.checkpoint:08d}"
        made.append((f"Hear the checkpoint of step {facts.checkpoint:,}.", _listen(checkpoint, asked)))
    if len(facts.steps_of_sounds) > 1:
        why = "Judge by ear: a page that plays the sounds of two steps and does not say which is which."
        made.append((why, f"python scripts/report.py {shlex.quote(folder)} --blind"))
    if done and not facts.config.get("tune_text"):
        name = repr(f"{folder}/huggingface")
        kind = "MusicgenMelodyForConditionalGeneration" if melody else "MusicgenForConditionalGeneration"
        lines = f"from transformers import {kind}\nmodel = {kind}.from_pretrained({name})"
        made.append(("Load the exported model in Python.", lines))
    return made


def _judging(facts: Facts, folder: str) -> list[tuple[str, str]]:
    """The commands that judge a finished run by numbers, as far as this page does not show what they found."""
    made = []
    if not facts.recall:
        why = "Does it play its clips by heart? What this finds is shown on this page."
        made.append((why, f"python scripts/recall.py --run {shlex.quote(folder)}"))
    if not facts.score and facts.best is not None:  # a run that held no clips out is refused
        why = "Is what it makes closer to music that it never learned from? What this finds is shown on this page."
        made.append((why, f"python scripts/score.py {shlex.quote(folder)}"))
    return made


def _start(facts: Facts, defaults: Mapping[str, object]) -> str:
    """The command that starts this run, by its settings and the number of its processes."""
    words = ["python", "launch.py"]
    processes = facts.plan.get("world_size")
    if isinstance(processes, int) and processes > 1:
        words = ["accelerate", "launch", "--num_processes", str(processes), "launch.py"]
    flags = [(name, value) for name, value in facts.config.items() if name not in defaults or value != defaults[name]]
    for name, value in sorted(flags, key=lambda flag: flag[0] != "dataset_path"):
        words += ["--dataset" if name == "dataset_path" else f"--{name}", value_in_words(value)]
    return " ".join(word if word.startswith("--") else shlex.quote(word) for word in words)


def _listen(model: str, asked: str) -> str:
    return f"python scripts/generate.py --model {shlex.quote(model)} {asked}"


def _asked(facts: Facts) -> str:
    """The flags by which scripts/generate.py makes the first sound of the newest step that was made of a text alone."""
    for step in reversed(facts.steps_of_sounds):
        for sound in step.sounds:
            if sound.prompt.text and not sound.continued_seconds:
                flags = {"prompt": sound.prompt.text, "seed": sound.prompt.seed, "seconds": sound.seconds or 10.0}
                settings = {name: value for name, value in step.settings.items() if name != "weights"}
                words = {name: shlex.quote(value_in_words(value)) for name, value in (flags | settings).items()}
                return " ".join(f"--{name} {word}" for name, word in words.items())
    return "--prompt ... --seconds 10"


def limits_of(facts: Facts) -> list[str]:
    """What nobody should expect of this run's sounds."""
    parameters = facts.start.get("parameters")
    if str(facts.config.get("model_id")).startswith("debug"):
        return [
            "This is the debug model: random weights, and a codec of random weights too, through which even a clip's"
            " own codes are noise. It shows that training works on this machine. It cannot make music."
        ]
    fitted = facts.start.get("codec_fitted_clips")
    if isinstance(parameters, int) and isinstance(fitted, int) and fitted > 0:
        clips = f"the {fitted} clips" if fitted > 1 else "the one clip"
        return [
            f"This is the model of a demo (scripts/demo_model.py): {_size(parameters)} that began as random numbers,"
            f" and a codec that is fitted to {clips} it was made from and knows no other music. Whatever the prompt, it"
            " plays these clips, a mixture of them, or noise. It shows that training works on this machine. It is no"
            " model for music."
        ]
    if isinstance(parameters, int) and 0 < parameters < TINY_PARAMETERS:
        return [
            f"This is a tiny model: {_size(parameters)}. It can learn a few clips by heart and hardly more: other"
            " prompts give a mixture of them or noise. It shows that training works; it is no model for music."
        ]
    return []


def _size(parameters: int) -> str:
    return f"{parameters / 1e6:.1f} million parameters (Meta's smallest has 420 million)"


def end_in_words(facts: Facts) -> str:
    """Why the run is in the state in which it is."""
    left = "" if facts.checkpoint is None else f"; the newest checkpoint is that of step {facts.checkpoint:,}"
    if facts.state == FINISHED:
        exported, planned, rounds = map(facts.finished.get, ("exported_step", "steps", "early_stop"))
        words = []
        if facts.finished.get("reason") == "early stop":
            of_all = f" after step {facts.step:,} of {planned:,}" if isinstance(planned, int) else ""
            many = isinstance(rounds, int) and rounds > 1
            why = f"{rounds:,} validations in a row were" if many else "the last validation was"
            words.append(f"it ended early{of_all}: {why} no better than the best")
        if isinstance(exported, int) and exported != facts.step:
            words.append(f"what is exported is step {exported:,}, the best")
        return "; ".join(words)
    if facts.state == FAILED:
        return f"exit code {facts.exit_code}: {MEANINGS.get(facts.exit_code or 1, MEANINGS[1])}{left}"
    if facts.state == RUNNING:
        return ""
    return ("it was asked to stop" if facts.exit_code is not None else "killed, or stuck") + left


def differences(configs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """The settings in which runs differ, with the value of each run; but for the folder that each writes to."""
    names = dict.fromkeys(name for config in configs for name in config if name not in ("output_dir", "resume"))
    rows = [(name, [value_in_words(config[name]) if name in config else "" for config in configs]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]
