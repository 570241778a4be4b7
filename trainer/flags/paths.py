"""Paths as they are typed: `~` and environment variables stand for what a shell would put there.

A shell does this only to a word that begins with `~`, so not in --output_dir=~/models, and never in a file of flags, in
the arguments of a container or of an editor. Without this, such a run would make a folder named `~`.
"""

from __future__ import annotations

import os
import re

from trainer.errors import ConfigError

VARIABLE = re.compile(r"\$(?:\$|(?P<plain>[A-Za-z_][A-Za-z0-9_]*)|\{(?P<braced>[A-Za-z_][A-Za-z0-9_]*)\})")


def expanded(text: str) -> str:
    """The path that `text` means: ~/x and ~user/x, then $NAME and ${NAME}; $$ is a dollar sign.

    ./~ is a folder named ~. Text without them is returned as it is, and so is the path of something that is there where
    a variable in it is not set: a folder may be named A$AP.

    Raises ConfigError for another variable that is not set and for an unknown user: where a shell would put nothing, or
    leave the name, a run would write into a folder that nobody meant.
    """
    home = os.path.expanduser(text) if text.startswith("~") else text
    if home.startswith("~"):
        user = text.partition("/")[0]
        raise ConfigError(f"{text}: the home folder {user} is not known here; ./{text} is a folder of that name.")
    if "$" not in text:
        return home
    rest = text.partition("/")[1] + text.partition("/")[2] if text.startswith("~") else text
    start = home[: len(home) - len(rest)]  # a home folder is as it is, whatever signs are in it
    names = [found["plain"] or found["braced"] for found in VARIABLE.finditer(rest)]
    if any(name and not os.environ.get(name) for name in names) and os.path.lexists(home):
        return home
    return start + VARIABLE.sub(lambda found: _value(found, text), rest)


def _value(found: re.Match[str], text: str) -> str:
    name = found["plain"] or found["braced"]
    if name is None:
        return "$"
    if not os.environ.get(name):
        state = "is not set" if name not in os.environ else "is empty"
        raise ConfigError(f"{text}: the environment variable {name} {state}. In single quotes, $$ is a dollar sign.")
    return os.environ[name]
