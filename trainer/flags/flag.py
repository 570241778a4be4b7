"""Flags declared by an annotated dataclass: what each one takes, and the check of its values.

`lr: Annotated[float, Flag("training", "Learning rate.", above=0)] = 1e-5` is all that declares a flag;
trainer/flags/command_line.py reads it.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, TypeGuard, Union, get_args, get_origin

from trainer.errors import ConfigError
from trainer.flags.paths import expanded

Value = bool | int | float | str | None


@dataclass(frozen=True)
class Flag:
    """A flag's section in the help, its help with the unit, its other names, and the range of its numbers.

    A number x is allowed where least <= x, above < x, x <= most and x < below, as far as these are given. Of a flag
    that may be a path, `~` and environment variables are expanded where it is read (trainer/flags/paths.py).
    """

    group: str
    help: str
    _: KW_ONLY
    aliases: tuple[str, ...] = ()
    path: bool = False
    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One field of a dataclass of flags: how its values are read and which are allowed."""

    name: str
    flag: Flag
    kind: type  # bool, int, float or str
    choices: tuple[str | int, ...]  # what a str or int is restricted to; empty for no restriction
    optional: bool  # None is a value, written none
    required: bool
    default: Value

    @property
    def allowed(self) -> str:
        """The values that the flag takes, in words: "a number above 0, or none"."""
        if self.kind is bool:
            text = "0 or 1 (or false, true)"
        elif self.choices:
            *others, last = map(str, self.choices)
            text = ", ".join(others) + f" or {last}"
        elif self.kind is str:
            text = "a text that is not empty"
        else:
            text = ("a whole number" if self.kind is int else "a number") + _range_in_words(self.flag)
        return text + (", or none" if self.optional else "")

    @property
    def metavar(self) -> str:
        """The values in the short form of a help text: "{0,1}", "INT|none"."""
        if self.kind is bool:
            return "{0,1}"
        short = "{" + ",".join(map(str, self.choices)) + "}" if self.choices else self.kind.__name__.upper()
        return short + ("|none" if self.optional else "")

    @property
    def alone(self) -> str | None:
        """What the flag means without a value: 1 for a switch, and for a choice of which 0 and 1 are two; else None."""
        return "1" if self.kind is bool or {"0", "1"} <= set(self.choices) else None

    def read(self, text: str) -> Value:
        """The value written as `text`, or ConfigError naming the flag, the text and what is allowed."""
        if self.optional and text.lower() in ("none", "null"):
            return None
        if self.flag.path:
            try:
                text = expanded(text)
            except ConfigError as error:
                raise ConfigError(f"--{self.name} {error}") from None
        try:
            value: Value = _switch(text) if self.kind is bool else self.kind(text)
        except ValueError:
            raise self.refusal(text) from None
        if not self.admits(value):
            raise self.refusal(text)
        return value

    def check(self, value: object) -> Value:
        """`value` if the flag may have it (a whole number is a number), or ConfigError as in `read`."""
        if self.kind is float and type(value) is int:
            value = float(value)
        if not self.admits(value):
            raise self.refusal(value)
        return value

    def admits(self, value: object) -> TypeGuard[Value]:
        """Whether `value` is of the flag's type, and one of its choices or in its range."""
        if value is None:
            return self.optional
        if type(value) is not self.kind:
            return False
        if self.choices:
            return value in self.choices
        if isinstance(value, str):
            return bool(value.strip())
        return isinstance(value, (int, float)) and _in_range(value, self.flag)

    def refusal(self, value: object) -> ConfigError:
        shown = repr(value) if not isinstance(value, str) or not value.strip() else value
        return ConfigError(f"--{self.name} {shown} cannot be used: it takes {self.allowed}.")


@functools.cache
def settings(schema: type) -> dict[str, Setting]:
    """The flags that the dataclass `schema` declares, by field name, in the order of the fields."""
    hints = typing.get_type_hints(schema, include_extras=True)
    return {field.name: _setting(field, hints[field.name]) for field in dataclasses.fields(schema)}


def defaults_of(schema: type) -> dict[str, Value]:
    """The default of each flag that has one, by name."""
    return {name: setting.default for name, setting in settings(schema).items() if not setting.required}


def checked_values(schema: type, values: Mapping[str, object]) -> dict[str, Value]:
    """`values` by field name, each of an allowed type and range; else, or for unknown names, ConfigError."""
    known = settings(schema)
    for name in values:
        if name not in known:
            raise ConfigError(f"{name} is no flag.{did_you_mean(name, list(known), '')}")
    return {name: known[name].check(value) for name, value in values.items()}


def did_you_mean(name: str, names: list[str], prefix: str) -> str:
    """The end of a refusal of `name`: " Did you mean --batch_size?", or where all names are listed."""
    close = difflib.get_close_matches(name, names, n=1)
    return f" Did you mean {prefix}{close[0]}?" if close else " All flags: --help"


def _setting(field: dataclasses.Field[Any], hint: Any) -> Setting:
    plain, flag = get_args(hint)
    options = get_args(plain) if get_origin(plain) in (Union, types.UnionType) else (plain,)
    (kind,) = [option for option in options if option is not types.NoneType]
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    return Setting(
        name=field.name,
        flag=flag,
        kind=type(choices[0]) if choices else kind,
        choices=choices,
        optional=types.NoneType in options,
        required=field.default is dataclasses.MISSING,
        default=None if field.default is dataclasses.MISSING else field.default,
    )


def _switch(text: str) -> bool:
    if text.lower() in ("1", "true"):
        return True
    if text.lower() in ("0", "false"):
        return False
    raise ValueError(text)


def _range_in_words(flag: Flag) -> str:
    if flag.least is not None and flag.most is not None:
        return f" from {flag.least} to {flag.most}"
    limits = []
    if flag.least is not None:
        limits.append(f"of {flag.least} or more")
    if flag.above is not None:
        limits.append(f"above {flag.above}")
    if flag.most is not None:
        limits.append(f"of {flag.most} or less")
    if flag.below is not None:
        limits.append(f"below {flag.below}")
    return " " + " and ".join(limits) if limits else ""


def _in_range(value: float, flag: Flag) -> bool:
    return (
        (type(value) is int or math.isfinite(value))
        and (flag.least is None or value >= flag.least)
        and (flag.above is None or value > flag.above)
        and (flag.most is None or value <= flag.most)
        and (flag.below is None or value < flag.below)
    )
