"""Which files of a data set belong to a configuration and a split, by the Hub's conventions: names alone are looked at.

Source: https://huggingface.co/docs/hub/datasets-data-files-configuration, and the keywords of datasets 5.2
(datasets/data_files.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from trainer.errors import ConfigError

TRAIN, TEST, VALIDATION = "train", "test", "validation"
# What a folder or a part of a file's name says of its split.
KEYWORDS: Mapping[str, str] = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), TEST),
    **dict.fromkeys(("validation", "valid", "val", "dev"), VALIDATION),
}
SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\b.*")
SHOWN = 20  # names that a message lists


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One entry of `configs` in the README of a data set: glob patterns of its files, by split."""

    name: str
    is_default: bool
    patterns: Mapping[str, tuple[str, ...]]


def files_of_split(
    names: Sequence[str], split: str, *, config: str | None = None, configurations: Sequence[Configuration] = (),
    by_folder: bool = False,
) -> tuple[str, ...]:
    """The names, in order, that belong to the split; those of no split belong to "train".

    names           relative to the data set's folder, with slashes
    config          of --dataset_config; None is the only one, or the default
    configurations  that the README declares, which then decide; else a configuration is a folder of its name
    by_folder       whether folders alone name a split, since a song may well be named "test"

    Raises ConfigError, which lists what there is, where there is no such configuration or split.
    """
    split = KEYWORDS.get(split, split)
    if configurations:
        return _declared(names, split, _chosen(configurations, config))
    if config is not None:
        names = [name for name in names if config in name.split("/")[:-1]]
        if not names:
            raise ConfigError(f"--dataset_config {config}: there is no folder {config} with data in it")
    of_split = {name: split_of(name, by_folder=by_folder) for name in names}
    found = tuple(sorted(name for name in names if of_split[name] == split))
    if names and not found:
        raise ConfigError(_no_split(split, sorted(set(of_split.values()))))
    return found


def split_of(name: str, *, by_folder: bool = False) -> str:
    """The split that a file's name, or one of its folders, says; "train" for one that says none."""
    *folders, base = name.split("/")
    if not by_folder:
        shard = SHARD.fullmatch(base)
        if shard and shard["split"] != "data":  # data-00000-of-00001.arrow is what save_to_disk writes
            return _keyword(shard["split"]) or shard["split"]
        if found := _keyword(base.rpartition(".")[0]):
            return found
    for folder in reversed(folders):
        if found := _keyword(folder):
            return found
    return TRAIN


def missing_shards(names: Sequence[str]) -> list[str]:
    """The names of shards that are not among `names`, though these count them: x-00001-of-00002 beside the first."""
    there, lacking = set(names), []
    for name in names:
        folder, slash, base = name.rpartition("/")
        shard = SHARD.fullmatch(base)
        if shard:
            expected = (
                folder + slash + base.replace(f"-{shard['number']}-of-", f"-{number:05d}-of-", 1)
                for number in range(int(shard["count"]))
            )
            # Names may end in a hash of each shard's own, which cannot be foretold.
            if base == f"{shard['split']}-{shard['number']}-of-{shard['count']}.{base.rpartition('.')[2]}":
                lacking += [other for other in expected if other not in there]
    return sorted(set(lacking))


def configurations_of(readme: str) -> tuple[Configuration, ...]:
    """What the YAML at the head of a data set's README declares under `configs`; nothing where that is not readable."""
    import yaml

    head = re.match(r"\A\ufeff?---\s*\n(.*?)\n---\s*(?:\n|\Z)", readme, re.DOTALL)
    try:
        declared = yaml.safe_load(head[1]) if head else None
    except yaml.YAMLError:
        return ()
    configs = declared.get("configs") if isinstance(declared, dict) else None
    found = [_configuration(entry) for entry in configs] if isinstance(configs, list) else []
    return tuple(entry for entry in found if entry is not None)


def _configuration(entry: object) -> Configuration | None:
    if not isinstance(entry, dict) or "data_files" not in entry:
        return None
    files = entry["data_files"]
    patterns: dict[str, tuple[str, ...]] = {}
    for part in files if isinstance(files, list) else [files]:
        given = part if isinstance(part, dict) and "path" in part else {"path": part}
        paths = given["path"] if isinstance(given["path"], list) else [given["path"]]
        split = str(given.get("split", TRAIN))
        texts = tuple(path.removeprefix("./") for path in paths if isinstance(path, str))
        patterns[split] = patterns.get(split, ()) + texts
    folder = str(entry.get("data_dir") or "").strip("/")
    if folder:
        patterns = {split: tuple(f"{folder}/{path}" for path in paths) for split, paths in patterns.items()}
    return Configuration(
        name=str(entry.get("config_name", "default")), is_default=bool(entry.get("default")), patterns=patterns
    )


def _chosen(configurations: Sequence[Configuration], config: str | None) -> Configuration:
    by_name = {entry.name: entry for entry in configurations}
    if config is not None and config in by_name:
        return by_name[config]
    names = ", ".join(list(by_name)[:SHOWN])
    if config is not None:
        raise ConfigError(f"--dataset_config {config}: the data set has no such configuration; it has {names}")
    defaults = [entry for entry in configurations if entry.is_default or entry.name == "default"]
    if len(by_name) == 1 or defaults:
        return (defaults or list(configurations))[0]
    raise ConfigError(f"the data set has several configurations: name one with --dataset_config: {names}")


def _declared(names: Sequence[str], split: str, chosen: Configuration) -> tuple[str, ...]:
    patterns = {KEYWORDS.get(name, name): globs for name, globs in chosen.patterns.items()}
    if split not in patterns:
        raise ConfigError(_no_split(split, sorted(patterns)))
    return tuple(sorted(name for name in names if any(_fits(name, glob) for glob in patterns[split])))


def _fits(name: str, pattern: str) -> bool:
    """Whether a pattern with *, ? and ** names this file, or a folder that it lies in."""
    pattern = pattern.rstrip("/")
    parts, globs = name.split("/"), pattern.split("/")
    return _parts_fit(parts, globs) or any(_parts_fit(parts[:end], globs) for end in range(1, len(parts)))


def _parts_fit(parts: Sequence[str], globs: Sequence[str]) -> bool:
    reached = {0}  # how many of `globs` may be used up after the parts so far
    for part in parts:
        skipped = {at + 1 for at in _past_double_stars(reached, globs) if at < len(globs) and _same(part, globs[at])}
        reached = skipped | {at for at in _past_double_stars(reached, globs) if at < len(globs) and globs[at] == "**"}
    return len(globs) in _past_double_stars(reached, globs)


def _past_double_stars(reached: set[int], globs: Sequence[str]) -> set[int]:
    found = set(reached)
    for at in sorted(reached):
        while at < len(globs) and globs[at] == "**":
            at += 1
            found.add(at)
    return found


def _same(part: str, glob: str) -> bool:
    return glob != "**" and fnmatchcase(part, glob)


def _keyword(text: str) -> str | None:
    """The split that one of the words of `text` names; None for none."""
    words = re.split(r"[^a-z0-9]+", text.lower())
    return next((KEYWORDS[word] for word in words if word in KEYWORDS), None)


def _no_split(split: str, splits: Sequence[str]) -> str:
    return f"--dataset_split {split}: the data set has no such split; it has {', '.join(splits[:SHOWN]) or 'none'}"
