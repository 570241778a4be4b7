"""A dataclass of flags read from a command line and from a file, and shown as help (by tyro)."""

from __future__ import annotations

import dataclasses
import functools
import json
import shlex
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError
from trainer.flags.flag import Setting, Value, did_you_mean, settings

CONFIG_FLAG = "config"


def texts_of_command_line(schema: type, argv: Sequence[str]) -> tuple[dict[str, str], str | None]:
    """Split `--name value` and `--name=value` into texts by field name, and the path given as --config.

    Aliases and dashes for underscores are understood, and a switch without a value is 1. Nothing is converted. Raises
    ConfigError for an unknown flag (with the nearest one), another flag without a value, and an argument that belongs
    to no flag. Of a flag that is given twice the last value counts.
    """
    texts: dict[str, str] = {}
    strays: list[str] = []
    left = list(argv)
    while left:
        argument = left.pop(0)
        if not argument.startswith("--") or argument == "--":
            strays.append(argument)
            continue
        typed, equals, text = argument.partition("=")
        name = _resolve(schema, typed[2:], "--")
        if not equals:
            text = left.pop(0) if left and not left[0].startswith("--") else _alone(schema, name, typed)
        texts[name] = text  # the last one wins, so that a job script's flags can be followed by "$@"
    if strays:
        raise _refused_strays(schema, strays, texts)
    return texts, texts.pop(CONFIG_FLAG, None)


def texts_of_file(schema: type, path: str) -> dict[str, str]:
    """The texts by field name of a .yaml, .yml or .json file that maps flag names to single values.

    Values are taken as they are written, like on a command line: YAML's `no` stays "no", `1e-5` is a number.
    Raises ConfigError, which names the file, for a file that cannot be read, and for names and values that
    are not allowed.
    """
    texts: dict[str, str] = {}
    for key, text in _pairs_of_file(path):
        try:
            name = _resolve(schema, key, "")
            if name == CONFIG_FLAG:
                raise ConfigError("a file of flags cannot name another one: remove config.")
            if name in texts:
                raise ConfigError(f"{name} is given twice: leave one.")
            if text is None:
                raise ConfigError(f"{name} has a list, a group or nothing as its value: it takes one value.")
            settings(schema)[name].read(text)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
        texts[name] = text
    return texts


def values_of_texts(schema: type, texts: Mapping[str, str]) -> dict[str, Value]:
    """The values of all flags: read from `texts` by tyro, else the defaults. ConfigError for a bad value."""
    missing = [s for s in settings(schema).values() if s.required and s.name not in texts]
    if missing:
        names = [f"--{s.flag.aliases[0] if s.flag.aliases else s.name}" for s in missing]
        raise ConfigError(f"{' and '.join(names)} must be given. All flags: --help")
    groups = _run_tyro(schema, [f"--{name}={text}" for name, text in texts.items()], prog="", description="")
    return {s.name: getattr(getattr(groups, s.flag.group), s.name) for s in settings(schema).values()}


def print_help(schema: type, *, prog: str, description: str) -> None:
    """Print all flags by section, with their defaults, and leave by SystemExit(0)."""
    _run_tyro(schema, ["--help"], prog=prog, description=description)


def _resolve(schema: type, typed: str, prefix: str) -> str:
    """The field that `typed` means, or ConfigError with the nearest name."""
    by_name = {CONFIG_FLAG: CONFIG_FLAG}
    for setting in settings(schema).values():
        by_name |= dict.fromkeys((setting.name, *setting.flag.aliases), setting.name)
    name = typed.replace("-", "_")
    if name not in by_name:
        raise ConfigError(f"{prefix}{typed} is no flag.{did_you_mean(name, list(by_name), prefix)}")
    return by_name[name]


def _alone(schema: type, name: str, typed: str) -> str:
    """What a flag without a value means, or ConfigError with what it takes."""
    alone = None if name == CONFIG_FLAG else settings(schema)[name].alone
    if alone is None:
        takes = "the path of a file" if name == CONFIG_FLAG else settings(schema)[name].allowed
        raise ConfigError(f"{typed} has no value: it takes {takes}.")
    return alone


def _refused_strays(schema: type, strays: Sequence[str], texts: Mapping[str, str]) -> ConfigError:
    """What arguments that belong to no flag are told: which flag they want, or that spaces want quotes."""
    flags = [s.flag.aliases[0] if s.flag.aliases else s.name for s in settings(schema).values() if s.required]
    missing = [s.name for s in settings(schema).values() if s.required and s.name not in texts]
    shown = " ".join(strays)
    if missing and CONFIG_FLAG not in texts and not strays[0].startswith("-"):
        return ConfigError(f"'{shown}' belongs to no flag: write --{flags[0]} {shlex.quote(shown)}. All flags: --help")
    return ConfigError(
        f"'{strays[0]}' belongs to no flag: write --name value, and quote a value that holds spaces. All flags: --help"
    )


def _pairs_of_file(path: str) -> list[tuple[str, str | None]]:
    """Names and values as written; None for a value that is not a single one. ConfigError if unreadable."""
    suffix = Path(path).suffix.lower()
    if suffix not in (".yaml", ".yml", ".json"):
        raise ConfigError(f"--config {path} cannot be used: it takes a .yaml, .yml or .json file.")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config {path} is not a text in UTF-8: {error}.") from error
    return _json_pairs(path, text) if suffix == ".json" else _yaml_pairs(path, text)


def _json_pairs(path: str, text: str) -> list[tuple[str, str | None]]:
    class Pairs(list[tuple[str, Any]]):
        """An object of the file, with its repeated keys."""

    try:
        pairs = json.loads(text, object_pairs_hook=Pairs, parse_int=str, parse_float=str, parse_constant=str)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--config {path} is not JSON: {error}.") from error
    if not isinstance(pairs, Pairs):
        raise ConfigError(f'--config {path} must hold one object of flags: {{"lr": 1e-5, "epochs": 10}}.')
    spelled = {True: "true", False: "false", None: "none"}
    return [
        (key, value if isinstance(value, str) else None if isinstance(value, list) else spelled[value])
        for key, value in pairs
    ]


def _yaml_pairs(path: str, text: str) -> list[tuple[str, str | None]]:
    import yaml

    try:
        top = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path} is not YAML: {error}.") from error
    if top is None:
        return []
    if not isinstance(top, yaml.MappingNode):
        raise ConfigError(f"--config {path} must hold one flag a line, as in 'lr: 1e-5'.")
    return [(str(key.value), _yaml_text(value)) for key, value in top.value]


def _yaml_text(node: Any) -> str | None:
    if node.tag == "tag:yaml.org,2002:null":
        return "none"
    return node.value if isinstance(node.value, str) else None


def _run_tyro(schema: type, args: list[str], *, prog: str, description: str) -> Any:
    import tyro  # 0.2 s, and only a command line needs it

    return tyro.cli(
        _tyro_schema(schema),
        args=args,
        prog=prog,
        description=description,
        use_underscores=True,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff),
    )


@functools.cache
def _tyro_schema(schema: type) -> type:
    """A dataclass of one dataclass per group of `schema`: tyro shows each as a section of the help."""
    groups: dict[str, list[Any]] = {}
    for setting in settings(schema).values():
        groups.setdefault(setting.flag.group, []).append(_tyro_field(setting))
    made = [
        (group, dataclasses.make_dataclass(group, fields, kw_only=True)) for group, fields in groups.items()
    ]
    return dataclasses.make_dataclass(schema.__name__, made, kw_only=True)


def _tyro_field(setting: Setting) -> Any:
    import tyro

    spec = tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=setting.metavar,
        instance_from_str=lambda texts: setting.read(texts[0]),
        is_instance=lambda value: True,
        str_from_instance=lambda value: [_text(value)],
    )
    aliases = [f"--{alias}" for alias in setting.flag.aliases]
    hint = typing.Annotated[object, spec, tyro.conf.arg(help=setting.flag.help, aliases=aliases)]
    if setting.required:
        return (setting.name, hint)
    return (setting.name, hint, dataclasses.field(default=setting.default))


def _text(value: Value) -> str:
    if isinstance(value, bool):
        return str(int(value))
    return "none" if value is None else str(value)
