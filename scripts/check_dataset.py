"""Look at a folder of music before training on it, and write a page that shows and plays what is in it.

python scripts/check_dataset.py my_music
python scripts/check_dataset.py my_music --validation 0.1 --embed --report report
"""

from __future__ import annotations

import json
import os
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    from trainer.data import fates, manifest
    from trainer.data.inventory import ScannedFolder, fates_of
    from trainer.data.progress import duration
    from trainer.errors import (
        EXIT_DATA,
        EXIT_DONE,
        EXIT_FAILED,
        ConfigError,
        DataError,
        ModelError,
        StorageError,
        TrainerError,
    )
    from trainer.flags import command_line
    from trainer.flags.config import Config, parse
    from trainer.flags.flag import settings
    from trainer.flags.paths import expanded
    from trainer.preflight import check_folders, prepared_ones
    from trainer.report import report
    from trainer.run.console import Console
except ImportError as missing:
    sys.exit(f"error: {missing}. Install the project (bash scripts/setup.sh) and use its Python: .venv/bin/python")

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trainer.data.hub_dataset import HubDataset
    from trainer.data.table_scan import TableSettings

REPORT_FOLDER = "dataset_report"
OTHER_FLAGS = ("model_id", "stereo", "seed")  # of launch.py, besides the data flags, on which the report depends
HELP = f"""python scripts/check_dataset.py DIR [flags]

Reads the music as launch.py would (DIR is what --dataset takes: a folder, a table, or user/name for a data set of the
Hugging Face hub, which is fetched), and writes dataset.csv (what became of each file), dataset.json (all
figures) and dataset.html (a page that shows them and plays the sounds). Nothing is trained, and no model is fetched.

  --report FOLDER  where the three files go (default: {REPORT_FOLDER}); outside of DIR
  --embed          put excerpts of 10 s into the page, so that it can be read on another machine
  --strict         exit code {EXIT_FAILED} where any sound file is left out
  --config FILE    the file of flags of a run

and of launch.py's flags (docs/flags.md), which mean the same here:
{{flags}}.

Exit codes: 0 fine, {EXIT_DATA} no clip to train on or, with --validation, none to validate on (the page is written
and says why), {EXIT_FAILED} with --strict, 2 a flag that cannot work, 4 a folder that cannot be written."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asks for."""

    config: Config
    report_folder: Path
    embed: bool
    strict: bool


def main(argv: Sequence[str]) -> int:
    """Run the program; returns its exit code (see trainer/errors.py)."""
    if any(argument in ("--help", "-h") for argument in argv):
        names = ", ".join(f"--{name}" for name in sorted(_allowed() - {"dataset_path"}))
        flags = textwrap.fill(names, 116, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
        print(HELP.format(flags=flags))
        return EXIT_DONE
    try:
        return check(read_request(argv))
    except TrainerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def read_request(argv: Sequence[str]) -> Request:
    """The request. Raises ConfigError for what cannot work, and for flags of launch.py that have no effect here."""
    left, switches, folder = list(argv), {"--embed": False, "--strict": False}, REPORT_FOLDER
    if left and not left[0].startswith("-"):
        left[:1] = ["--dataset", left[0]]
    rest: list[str] = []
    while left:
        argument = left.pop(0)
        name, equals, value = argument.partition("=")
        if argument in switches:
            switches[argument] = True
        elif name == "--report":
            if not equals and not left:
                raise ConfigError("--report has no value: it takes the folder for the report.")
            folder = value if equals else left.pop(0)
        else:
            rest.append(argument)
    texts, _ = command_line.texts_of_command_line(Config, rest)
    useless = sorted(set(texts) - _allowed())
    if useless:
        advice = "use --report FOLDER" if useless[0] == "output_dir" else "remove it"
        raise ConfigError(f"--{useless[0]} has no effect here, where nothing is trained: {advice}. All flags: --help")
    report_folder = Path(expanded(folder))
    config, _ = parse([*rest, "--output_dir", _outside(report_folder, texts)])
    _outside(report_folder, {"dataset_path": config.dataset_path})
    return Request(
        config=config, report_folder=report_folder, embed=switches["--embed"], strict=switches["--strict"]
    )


def _allowed() -> set[str]:
    """Flags of launch.py on which a report depends."""
    of_data = {one.name for one in settings(Config).values() if one.flag.group == "data"}
    return of_data | set(OTHER_FLAGS)


def _refuse_prepared(config: Config, hub: Mapping[str, HubDataset]) -> None:
    """Raise ConfigError for a prepared folder, here or by what was found on the hub."""
    for path in prepared_ones(config, hub).values():
        raise ConfigError(f"{path} is a prepared folder, which holds no sounds to look at: give the music itself")


def _outside(report_folder: Path, texts: dict[str, str]) -> str:
    """The report's folder; ConfigError where it lies in the dataset, and would count as data."""
    dataset = texts.get("dataset_path")
    if dataset is not None and report_folder.resolve().is_relative_to(Path(expanded(dataset)).resolve()):
        raise ConfigError(
            f"--report {report_folder} is inside the dataset folder {dataset}, so that the report would count as data:"
            " give a folder outside, as in --report ../report"
        )
    return str(report_folder)


def check(request: Request) -> int:
    """Scan, write the three files and say what is there; returns the exit code.

    Raises DataError, once they are written, where there is no clip to train on, or none to validate on.
    """
    from trainer import wiring

    config = request.config
    _refuse_prepared(config, {})
    check_folders(config)
    hub = wiring.find_hub_datasets(config, {})
    _refuse_prepared(config, hub)
    data = wiring.fetched_data(config, hub)
    channels = channels_of(config)
    folders = [_scanned(config, data.folder, data.tables, channels)]
    if data.validation_folder is not None:
        folders.append(_scanned(config, data.validation_folder, data.validation_tables, channels))
    settings_of_report = wiring.report_settings(config, embed=request.embed)
    load_tokenizer = None if config.no_label else tokenizer_at_hand(config.model_id)
    all_fates = fates_of(folders)
    fates.write_report(all_fates, request.report_folder / fates.REPORT)
    page = request.report_folder / report.PAGE
    try:
        report.write(folders, settings_of_report, request.report_folder, load_tokenizer=load_tokenizer)
    except OSError as error:
        raise StorageError(f"the page {page} cannot be written ({error.strerror}): give another --report") from error
    values: dict[str, Any] = json.loads((request.report_folder / report.FIGURES).read_bytes())
    ends_run = [f"{one['title']}. {one['advice']}" for one in values["mend_first"] if not one["key"]]
    if ends_run:
        lines = (*ends_run, fates.reasons(all_fates), f"What became of every file, and what to do: {page}")
        raise DataError("\n".join(filter(None, lines)))
    print(fates.summary(all_fates, rest=f"named in {request.report_folder / fates.REPORT}"))
    print(findings_in_words(values))
    print(f"the page with all of it: {page}")
    return exit_code_of(all_fates, strict=request.strict)


def exit_code_of(all_fates: Sequence[fates.Fate], *, strict: bool) -> int:
    """With `strict` EXIT_FAILED where a sound file is left out."""
    left_out = sum(fate.fate not in (*fates.IN_USE, "ignored") for fate in all_fates)
    if strict and left_out:
        print(f"error: {left_out:,} file(s) are left out (--strict)", file=sys.stderr)
        return EXIT_FAILED
    return EXIT_DONE


def findings_in_words(values: Mapping[str, Any]) -> str:
    """What to mend first, in five lines at most, of what dataset.json holds."""
    figures, found = values["figures"], values["mend_first"]
    melodies = f"; {figures['melodies']:,} of them with a melody file" if figures["melodies"] else ""
    lines = [f"{figures['clips']:,} clips, {duration(3600 * figures['hours'])}{melodies}"]
    others = [one for one in found if one["key"] and not one["key"].startswith("fate:")]  # those stand above already
    lines += [f"  {one['title']}: {one['clips']:,}" for one in others[:5]]
    if figures["captions"]["with_unknown_words"] is None and figures["captions"]["with"]:
        lines.append(f"  words that T5 does not know: not looked at, no tokenizer of {values['model']} on this machine")
    return "\n".join(lines)


def channels_of(config: Config) -> int:
    """Of the model, on which it depends which sounds are silent; 1 for one that nothing on this machine tells of.

    Raises ConfigError for --stereo 1 with a model that is stereo already.
    """
    from trainer.spec.shapes import shape_of, shape_to_train

    try:
        shape = shape_of(config.model_id)
    except (ConfigError, ModelError):
        return 2 if config.stereo else 1
    return shape_to_train(shape, stereo=config.stereo).audio_channels


def tokenizer_at_hand(model_id: str) -> Callable[[], PreTrainedTokenizerBase] | None:
    """How to load the tokenizer of --model_id; None where it is not on this machine. Nothing is fetched."""
    from huggingface_hub import try_to_load_from_cache

    from trainer.spec.model_folder import model_folder
    from trainer.spec.shapes import DEBUG_NAMES, hub_id_of

    if model_id not in DEBUG_NAMES and model_folder(model_id) is None:
        hub_id = hub_id_of(model_id) or model_id
        if hub_id.count("/") != 1 or not isinstance(try_to_load_from_cache(hub_id, "config.json"), str):
            return None
    from trainer.model.source import open_model, quiet_libraries

    quiet_libraries()
    try:
        return open_model(model_id, fetched=True).load_tokenizer
    except ModelError:
        return None


def _scanned(config: Config, folder: Path, tables: TableSettings, channels: int) -> ScannedFolder:
    from trainer import wiring

    found = manifest.look(
        folder,
        captions=wiring.caption_settings(config),
        treatment=wiring.treatment(config),
        tables=tables,
        min_seconds=config.min_seconds,
        facts_folder=Path(config.cache_dir) / "scan",
        rehash=config.rehash,
        channels=channels,
    )
    return ScannedFolder(root=os.path.abspath(folder), fates=found.fates, inspected=found.inspected)


if __name__ == "__main__":
    with Console(shows_libraries=True):
        sys.exit(main(sys.argv[1:]))
