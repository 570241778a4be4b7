"""Which transformers a melody model can generate with. Training one needs no newer version than any other model."""

from __future__ import annotations

import re
from importlib import metadata

from trainer.errors import ConfigError

LEAST_TRANSFORMERS = (5, 18)


def check_melody_generation(asked: str, instead: str = "") -> None:
    """Raise ConfigError where the installed transformers leaves a melody model's melody and text out of `generate`.

    asked    what cannot be had then, as "--sample_every 100 with --model_id melody"
    instead  what else would work, as ", or leave --sample_every out"

    Versions before 5.18 read only the last code once there is a cache, and so nothing of what stands in front of the
    codes: huggingface/transformers issue 48679.
    """
    found, least = metadata.version("transformers"), ".".join(map(str, LEAST_TRANSFORMERS))
    if tuple(map(int, re.findall(r"\d+", found)[:2])) < LEAST_TRANSFORMERS:
        raise ConfigError(
            f"{asked} needs transformers {least} or newer, and {found} is installed, with which a melody model hears"
            f" neither melody nor text: pip install 'transformers>={least}'{instead}"
        )
