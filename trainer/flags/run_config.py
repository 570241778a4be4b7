"""The flags of a run that was started earlier, from the config.json in its folder."""

from __future__ import annotations

import json
from pathlib import Path

from trainer.errors import ConfigError
from trainer.flags.config import Config, config_from_dict


def read_config(run: Path, flag: str) -> Config:
    """The flags as the run was given them. Raises ConfigError where the folder holds none.

    flag  by which the person named the folder
    """
    try:
        return config_from_dict(json.loads((run / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{flag} {run} is no output_dir of a run: its config.json cannot be read ({error})"
        ) from error
