"""The command line of a script: argparse, whose refusals are ConfigErrors."""

from __future__ import annotations

import argparse
import re
from typing import NoReturn

from trainer.errors import ConfigError
from trainer.flags.flag import did_you_mean


class ScriptParser(argparse.ArgumentParser):
    """An ArgumentParser that raises ConfigError, with the nearest flag, where argparse would end the program."""

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        if unknown:
            self.refuse_unknown(unknown[1])
        raise ConfigError(f"{message}. All flags: --help")

    def refuse_unknown(self, flag: str) -> NoReturn:
        """Raise ConfigError for a flag that the script does not have."""
        names = [option for action in self._actions for option in action.option_strings]
        raise ConfigError(f"{flag} is no flag.{did_you_mean(flag, names, '')}")
