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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trainer.errors import ConfigError, TrainerError
from trainer.evaluation import samples
from trainer.exports import hub_upload
from trainer.exports.export import OUR_NAME
from trainer.exports.model_card import CardFacts, Shared, adapter_base, adapter_card, model_card
from trainer.exports.shared_card import SoundRow, figures_of, sounds_section
from trainer.report.run_sounds import Sounds
from trainer.run.output_dir import HUB_DATASETS, OutputDir
from trainer.wiring.exporting import card_facts, made_in
from trainer.wiring.finished_run import config_of_run

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
    try:
        push(Path(config.output_dir), config.push_to_hub, public=config.public)
    except TrainerError as error:
        again = f"python scripts/push_to_hub.py {shlex.quote(config.output_dir)} --repo {config.push_to_hub}"
        print(
            f"warning: the run is complete, but not uploaded: {error}. To try again:\n  {again}"
            f"{' --public' if config.public else ''}",
            file=sys.stderr,
        )


def push(run: Path, repository: str, *, public: bool, part: Part | None = None) -> Pushed:
    """Make the model repository hold what the run has exported; says what was done. Raises TrainerErrors.

    part  the whole model, or a LoRA's adapter alone; None for the adapter where others find what it fits, else the
          model
    """
    content = content_of(run, repository, part)
    for name in content.unread:
        print(f"{run / name} is left out of the card: it is none that this version writes")
    size = f"{content.size_bytes / 1e6:.1f} MB"
    print(f"uploading the {content.part} of step {content.step}, {size} with sounds and card, to {repository} ...")
    message = f"{content.part} of step {content.step}"
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
    """What a repository is to hold: files by path, whose part and step that is, and what could not be told."""

    files: Mapping[str, Path | bytes]
    part: Part
    step: int
    unread: tuple[str, ...]

    @property
    def size_bytes(self) -> int:
        return sum(len(file) if isinstance(file, bytes) else file.stat().st_size for file in self.files.values())


def content_of(run: Path, repository: str, part: Part | None = None) -> Content:
    """The files of a repository for the finished run. Raises ConfigError for a folder that has no such."""
    folder, config = OutputDir(root=run), config_of_run(run, "RUN")
    step = folder.exported_step()
    if step is None:
        raise ConfigError(f"{run} is not finished, so that nothing of it is exported: run its command again")
    part = _part_of(config, run, part)
    loss = folder.read_json(folder.finished.name).get("validation_loss")
    facts = card_facts(config, made_in(folder), step, loss if isinstance(loss, float) else None)
    sounds, section = _sounds(folder.samples, step, repository, facts)
    figures = figures_of(_json(run / "score.json"), _json(run / "recall.json"))
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
    files = {path.name: without_paths(path) for path in _exported(run / FOLDERS[part])}
    return Content(
        files=files | sounds | {CARD: card.encode()}, part=part, step=step, unread=tuple(figures.unread)
    )


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
