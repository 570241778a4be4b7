"""Encode a data set once, into a folder that trains anywhere without the sound files.

python scripts/prepare_dataset.py my_music --output prepared
python scripts/prepare_dataset.py user/name --output prepared    (a data set of the Hugging Face hub)
python launch.py --dataset prepared

Run again with the same --output after a change of the music: what is there is not encoded again.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

try:
    from trainer.errors import EXIT_DONE, ConfigError, TrainerError
    from trainer.flags.config import Config, parse
    from trainer.flags.flag import Setting, settings
    from trainer.flags.paths import expanded
    from trainer.flags.script_parser import ScriptParser
    from trainer.preflight import check_folders, prepared_ones
    from trainer.run.console import Console
except ImportError as missing:
    sys.exit(f"error: {missing}. Install the project (bash scripts/setup.sh) and use its Python: .venv/bin/python")

if TYPE_CHECKING:
    from trainer.data.hub_dataset import HubDataset

# Flags of launch.py that decide what is encoded: those of its section data, and these of others.
ALSO_TAKEN = ("model_id", "stereo", "seed", "device", "stems")
# In that section, but of training alone.
NOT_TAKEN = ("dataset_path", "segment_seconds", "sample_by", "validation", "validation_split")
# Of this machine, or of what the prepared folder replaces: not for the training on it.
OF_HERE = (
    *("cache_dir", "rehash", "device"),
    *("dataset_config", "dataset_split", "dataset_revision", "audio_column"),
)


class Parser(ScriptParser):
    """A ScriptParser that knows which flags are launch.py's alone."""

    def refuse_unknown(self, flag: str) -> NoReturn:
        if flag.removeprefix("--").replace("-", "_") in settings(Config):
            raise ConfigError(f"{flag} has no effect on what is encoded: give it to launch.py.")
        super().refuse_unknown(flag)



def main(argv: Sequence[str]) -> int:
    """Run the program; returns its exit code (see trainer/errors.py)."""
    try:
        flags = read_flags(argv)
        prepare(flags, config_of(flags))
        return EXIT_DONE
    except TrainerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def read_flags(argv: Sequence[str]) -> argparse.Namespace:
    """The flags as they were typed; those of launch.py are texts, and None where they were not. Raises ConfigError."""
    parser = Parser(
        prog="prepare_dataset.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=expanded, metavar="DIR", help="the music: what --dataset of launch.py takes")
    parser.add_argument("--output", type=expanded, required=True, help="the folder to make, or to bring up to date")
    parser.add_argument("--anonymous", action="store_true", help="put numbers in place of the names of the files")
    parser.add_argument("--push_to_hub", metavar="USER/NAME", help="then upload it as a private data set of the hub")
    parser.add_argument("--public", action="store_true", help="with --push_to_hub: make a new data set a public one")
    group = parser.add_argument_group("flags of launch.py", "see docs/flags.md; training must be given the same")
    for setting in taken():
        names = [f"--{name}" for name in (setting.name, *setting.flag.aliases)]
        about = setting.flag.help.replace("%", "%%")
        group.add_argument(
            *names, dest=setting.name, nargs="?", const=setting.alone or "", metavar=setting.metavar, help=about
        )
    flags = parser.parse_args(argv)
    if flags.public and flags.push_to_hub is None:
        raise ConfigError("--public has no effect without --push_to_hub: add it, or remove --public.")
    return flags


def taken() -> list[Setting]:
    """The flags of launch.py that are understood here."""
    everything = settings(Config).values()
    return [s for s in everything if s.name in ALSO_TAKEN or (s.flag.group == "data" and s.name not in NOT_TAKEN)]


def config_of(flags: argparse.Namespace) -> Config:
    """What launch.py makes of the same flags; raises ConfigError for what it refuses."""
    given = {setting.name: getattr(flags, setting.name) for setting in taken()}
    texts = [f"--{name}={text}" for name, text in given.items() if text is not None]
    config, _ = parse([f"--dataset_path={flags.folder}", *texts])
    folder, output = Path(flags.folder).resolve(), Path(flags.output).resolve()
    if output.is_relative_to(folder) or folder.is_relative_to(output):
        raise ConfigError(f"--output {flags.output} and the music in {flags.folder} overlap: choose another place.")
    return config


def prepare(flags: argparse.Namespace, config: Config) -> None:
    """Encode the music into the cache, and write what a run needs of it into --output."""
    from trainer.data import dataset, prepared_writing
    from trainer.data.fates import BY_CHECKING
    from trainer.data.prepared_upload import push
    from trainer.evaluation.generation import device_of
    from trainer.model.source import open_model, quiet_libraries
    from trainer.model.stereo import in_stereo
    from trainer.plan.request import refuse_for_shape
    from trainer.wiring import fetched_data, find_hub_datasets

    output = Path(flags.output)
    refuse_prepared(config, {})
    check_folders(config)
    prepared_writing.check_place(output)
    quiet_libraries()
    hub = find_hub_datasets(config, {})
    refuse_prepared(config, hub)
    source, device = open_model(config.model_id), device_of(config.device)
    refuse_for_shape(config, frozenset(name for name in ("stems",) if getattr(flags, name) is not None), source.shape)
    if config.stereo:
        source = in_stereo(source)
    wanted = fetched_data(config, hub)
    prepared_writing.reuse(output, wanted, source)
    data = dataset.prepare(wanted, source, device)
    print(data.describe(rest=BY_CHECKING))
    written = prepared_writing.write(output, data, wanted, source, anonymous=flags.anonymous)
    about = written.prepared.about
    print(
        f"{output}: {about.clips:,} clips, {about.hours:.2f} hours, {written.size_bytes / 1e6:.1f} MB;"
        f" sounds that were not there before: {written.new:,}"
    )
    print(f"to train on it, here or elsewhere: {command(flags)}")
    if flags.push_to_hub is not None:
        print(f"uploaded: {push(written.prepared, flags.push_to_hub, private=not flags.public)}")


def refuse_prepared(config: Config, hub: Mapping[str, HubDataset]) -> None:
    """Raise ConfigError where what is to be prepared is so already, here or by what was found on the hub."""
    if prepared_ones(config, hub):
        raise ConfigError(f"{config.dataset_path} is a prepared folder already: give the music that it was made of")


def command(flags: argparse.Namespace) -> str:
    """How launch.py trains on the folder: with the flags that were typed here, but those of the music here."""
    kept = [setting.name for setting in taken() if setting.name not in OF_HERE]
    typed = [f"--{name} {shlex.quote(text)}" for name in kept if (text := getattr(flags, name)) is not None]
    return " ".join([f"python launch.py --dataset {shlex.quote(flags.output)}", *typed])


if __name__ == "__main__":
    with Console(shows_libraries=True):
        sys.exit(main(sys.argv[1:]))
