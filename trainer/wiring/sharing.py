"""From a finished run's folder to a model repository of the hub: which files go there, and what its card says.

Of the folder only what we write there is read: the exported model or adapter, sounds of samples/, recall.json and
score.json. Flags, logs, checkpoints and captions of clips stay here, and so do sounds that begin with those of a clip.
"""

from __future__ import annotations

import base64
import json
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trainer.errors import ConfigError, TrainerError
from trainer.evaluation import samples
from trainer.exports import hub_upload
from trainer.exports.export import OUR_NAME
from trainer.exports.model_card import CardFacts, Shared, adapter_base, adapter_card, model_card
from trainer.exports.saved_models import run_of
from trainer.exports.shared_card import SoundRow, figures_of, sounds_section
from trainer.report.run_sounds import Sounds
from trainer.run.output_dir import HUB_DATASETS, OutputDir
from trainer.wiring.exporting import card_facts, made_in
from trainer.wiring.finished_run import config_of_run
from trainer.wiring.saved_steps import EXPORTED

if TYPE_CHECKING:
    from trainer.engine import Ranks
    from trainer.evaluation.samples import Sample, StepSamples
    from trainer.exports.hub_upload import Pushed
    from trainer.flags.config import Config

Part = Literal["model", "adapter"]
FOLDERS: dict[Part, str] = {"model": "huggingface", "adapter": "adapter"}
CARD = "README.md"
OUR_SOUND = re.compile(r"samples/\d{2,}_[a-z0-9_]*_(before|after)\.mp3")
ASKING_SECONDS = 600.0  # for which the other processes wait until the first one has asked the hub


def refuse_push(config: Config, ranks: Ranks) -> None:
    """Raise TrainerError, before anything is computed, for an upload at the end that the hub would refuse."""
    if config.push_to_hub is None:
        return
    if ranks.is_first:
        hub_upload.check(config.push_to_hub, public=config.public)
        ranks.say(f"at the end this run is uploaded to {config.push_to_hub}, on the Hugging Face hub")
    ranks.wait("asking the hub whether it may be written", limit_seconds=ASKING_SECONDS)


def push_at_end(config: Config) -> None:
    """Upload the finished run as --push_to_hub says. Where that fails it is a warning: the run is complete."""
    if config.push_to_hub is None:
        return
    again = f"python scripts/push_to_hub.py {shlex.quote(config.output_dir)} --repo {config.push_to_hub}"
    again += " --public" if config.public else ""
    try:
        push(Path(config.output_dir), config.push_to_hub, public=config.public)
    except (TrainerError, OSError) as error:
        print(f"warning: the run is complete, but not uploaded: {error}. To try again:\n  {again}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"the run is complete, but its upload was stopped. To go on with it:\n  {again}", file=sys.stderr)
        raise


def push(place: Path, repository: str, *, public: bool, part: Part | None = None) -> Pushed:
    """Make the model repository hold what the run has exported; says what was done. Raises TrainerErrors.

    part  the whole model, or a LoRA's adapter alone; None for the adapter where others find what it fits, else the
          model
    """
    content = content_of(place, repository, part)
    for name in content.unread:
        print(f"{content.exported.run / name} is left out of the card: it is none that this version writes")
    size = f"{content.size_bytes / 1e6:.1f} MB"
    message = f"{content.part} of {content.exported.in_words}"
    print(
        f"uploading the {message}, {size} with sounds and card, to {repository} ... (this may be stopped: what was sent"
        " is kept)"
    )
    done = hub_upload.upload(repository, content.files, is_ours=is_ours, public=public, message=message)
    seen = "a private repository" if done.private else "a public repository"
    print(f"{'uploaded' if done.changed else 'nothing to upload, all of it is there'}: {done.url} ({seen})")
    if done.private and public:
        print("it was private before, and --public changes only a new one: its page on the hub has the setting")
    return done


def is_ours(path: str) -> bool:
    """Whether an upload of a run writes a file of this path into a repository."""
    of_transformers = OUR_NAME.fullmatch(path) is not None and not path.endswith("state_dict.bin")
    return of_transformers or OUR_SOUND.fullmatch(path) is not None


@dataclass(frozen=True, kw_only=True)
class Content:
    """What a repository is to hold: files by path, of what they are, and what could not be told."""

    files: Mapping[str, Path | bytes]
    part: Part
    exported: Exported
    unread: tuple[str, ...]

    @property
    def size_bytes(self) -> int:
        return sum(len(file) if isinstance(file, bytes) else file.stat().st_size for file in self.files.values())


def content_of(place: Path, repository: str, part: Part | None = None) -> Content:
    """The files of a repository for a finished run, or for a folder in which scripts/export.py has put a step of one.

    Raises ConfigError for a folder that has no such.
    """
    exported = exported_at(place)
    run = exported.run
    folder, config = OutputDir(root=run), config_of_run(run, "RUN")
    part = _part_of(config, place, part)
    _check_step(place / FOLDERS[part] / CARD, exported)
    facts = card_facts(config, made_in(folder), exported.step, exported.validation_loss)
    facts = replace(facts, strength=None if exported.strength == 1 else exported.strength)
    # Sounds and figures of a run are of its models at full strength.
    sounds, section = ({}, "") if exported.strength != 1 else _sounds(folder.samples, exported.step, repository, facts)
    figures = figures_of(*(_judged(run / name, exported) for name in ("score.json", "recall.json")))
    losses = [] if facts.validation_loss is None else [
        {"type": "loss", "value": round(facts.validation_loss, 4), "name": "validation loss (nats)"}
    ]  # fmt: skip
    shared = Shared(
        repository=repository,
        sections="\n\n".join(filter(None, (section, figures.section))),
        datasets=_hub_datasets(folder),
        results=[*losses, *figures.results],
    )
    card = (adapter_card if part == "adapter" else model_card)(facts, shared)
    files = {path.name: without_paths(path) for path in _exported(place / FOLDERS[part])}
    return Content(
        files=files | sounds | {CARD: card.encode()}, part=part, exported=exported, unread=tuple(figures.unread)
    )


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What is in a folder of exports: of which run, after which step, and how strong (trainer/exports/strength.py)."""

    run: Path
    step: int
    strength: float
    validation_loss: float | None

    @property
    def in_words(self) -> str:
        return f"step {self.step}" + ("" if self.strength == 1 else f" at strength {self.strength:g}")


def exported_at(place: Path) -> Exported:
    """What a run's folder holds, or one of scripts/export.py. Raises ConfigError where that cannot be known."""
    folder = OutputDir(root=place)
    if (said := folder.read_json(EXPORTED)) and (run := run_of(place)) is None:
        raise ConfigError(
            f"{place} was exported to a place outside of its run's folder, where the run's files are, which the card"
            f" tells of: export step {said.get('step')} again without --output"
        )
    if not said:
        config_of_run(place, "RUN")
        run, said = place, folder.read_json(folder.finished.name) | {"step": folder.exported_step()}
    step, loss = said.get("step"), said.get("validation_loss")
    if run is None or not isinstance(step, int):
        raise ConfigError(f"{place} is not finished, so that nothing of it is exported: run its command again")
    return Exported(
        run=run,
        step=step,
        strength=float(str(said.get("strength", 1.0))),
        validation_loss=loss if isinstance(loss, float) else None,
    )


def _judged(path: Path, exported: Exported) -> object:
    """What a judging tool has found of just these weights; None where it has not, which is said."""
    values = _json(path)
    of_step = values.get("exported_step", exported.step) if isinstance(values, dict) else exported.step
    if values is None or (exported.strength == 1 and of_step == exported.step):
        return values
    print(f"{path} is left out of the card: it is of step {of_step}, and this is {exported.in_words}")
    return None


def _part_of(config: Config, run: Path, part: Part | None) -> Part:
    """What to upload. An adapter is a hundredth of the model, but of no use to others without what it fits."""
    is_lora = config.selection.lora is not None
    if part == "adapter" and not is_lora:
        raise ConfigError(f"--part adapter: {run} trained no adapter (--lora_rank): leave it out")
    if part is None:
        part = "adapter" if is_lora and adapter_base(config.model_id, config.init_from) else "model"
    if not (run / FOLDERS[part] / CARD).is_file():
        raise ConfigError(f"{run / FOLDERS[part]} is not there, or is none that a run has exported")
    return part


def _check_step(card: Path, exported: Exported) -> None:
    """Raise ConfigError where the card beside the weights says another step than the run: its figures are not theirs.

    A run that was killed between its last two files has such, and so has one in whose place something was copied.
    """
    found = re.search(r"^\| optimizer steps \| (\d+) \|$", card.read_text(encoding="utf-8"), re.MULTILINE)
    if found is not None and int(found[1]) != exported.step:
        raise ConfigError(
            f"{card.parent} is of step {found[1]}, and the run exported step {exported.step}: if it was stopped while"
            " it exported, run its command again"
        )


def _exported(folder: Path) -> list[Path]:
    """The files there that an export writes; what somebody has put beside them is theirs."""
    return sorted(path for path in folder.iterdir() if path.is_file() and OUR_NAME.fullmatch(path.name))


def without_paths(path: Path) -> Path | bytes:
    """The file, or its content without names of folders of this machine, as transformers keeps in a configuration."""
    if path.suffix != ".json" or path.stat().st_size > 1 << 20:
        return path
    values = json.loads(path.read_bytes())
    plain = _plain(values)
    return path if plain == values else (json.dumps(plain, indent=2) + "\n").encode()


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if not isinstance(value, dict):
        return value
    return {name: _plain(one) for name, one in value.items() if not _is_path(name, one)}


def _is_path(name: str, value: object) -> bool:
    """Whether an entry says where something came from, and that is a folder: T5's names are a word or user/name."""
    if not name.endswith("name_or_path") or not isinstance(value, str):
        return False
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", value) is None or Path(value).exists()


def _hub_datasets(folder: OutputDir) -> tuple[str, ...]:
    """The id of the data set that was trained on, where it is one of the hub."""
    found = folder.read_json(HUB_DATASETS).get("dataset")
    repo = found.get("repo") if isinstance(found, dict) else None
    return (repo,) if isinstance(repo, str) else ()


def _json(path: Path) -> object:
    """What the file holds; None where it is not there, and its text where it is no JSON."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        return ""


def _sounds(folder: Path, step: int, repository: str, facts: CardFacts) -> tuple[dict[str, Path | bytes], str]:
    """The sounds of the run as mp3, by their paths in the repository, and the section of the card that plays them.

    folder  samples/ of the run
    step    that is exported: its sounds, or the last before it, stand beside those before step 1
    """
    from huggingface_hub import constants

    heard = max((one for one in samples.finished_steps(folder) if one <= step), default=None)
    after = None if heard is None else samples.read(folder, heard)
    before = samples.read(folder, 0) if heard else None
    if after is None:
        return {}, ""
    pairs = list(_pairs(folder, before, after))
    sounds = Sounds()
    paths = [path for _, *both in pairs for path in both if path is not None]
    waves = sounds.waveforms(paths)
    made = sounds.embedded(paths, [], waves)
    files: dict[str, Path | bytes] = {}
    rows = []
    for sample, *both in pairs:
        names: list[str | None] = []
        for side, path in zip(("before", "after"), both, strict=True):
            there = path is not None and path in made
            names.append(f"samples/{path.stem}_{side}.mp3" if path is not None and there else None)
            if path is not None and there:
                files[str(names[-1])] = base64.b64decode(made[path].mp3)
        if any(names):
            note = "with the melody of a clip of the dataset" if sample.melody else ""
            rows.append(SoundRow(prompt=sample.prompt, before=names[0], after=names[1], note=note))
    cut = [one.seconds for path, one in made.items() if one.seconds < waves[path].seconds - 0.01]
    section = sounds_section(
        rows,
        address=f"{constants.ENDPOINT}/{repository}/resolve/main",
        before="before the training" if facts.started_from else "base",
        after="fine-tuned" if after.step == step else f"fine-tuned (step {after.step})",
        note=_how_made(after, before is not None, cut),
    )
    return files, section


def _pairs(
    folder: Path, before: StepSamples | None, after: StepSamples
) -> Iterator[tuple[Sample, Path | None, Path | None]]:
    """Each sound of a step that may be shown, and the paths of the same one before step 1, and its own."""
    def asked(one: Sample) -> tuple[object, ...]:
        return one.prompt, one.seed, one.origin, one.clip, one.continued_seconds, one.melody

    then = {} if before is None else {asked(one): one for one in before.samples}
    for sample in after.samples:
        if sample.continued_seconds == 0:  # else it begins with the sound of a clip, which is not ours to show
            former = then.get(asked(sample))
            yield sample, _path(folder, before, former), _path(folder, after, sample)


def _path(folder: Path, step: StepSamples | None, sample: Sample | None) -> Path | None:
    if step is None or sample is None or sample.file is None:
        return None
    return samples.step_folder(folder, step.step) / Path(sample.file).name


def _how_made(made: StepSamples, with_before: bool, cut: list[float]) -> str:
    words = "The same prompt and the same random draws, before and after. " if with_before else ""
    words += f"Guidance {made.guidance:g}, temperature {made.temperature:g}, top k {made.top_k}."
    return words + (f" Of each, the first {min(cut):.0f} s." if cut else "")
