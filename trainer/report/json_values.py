"""Values from JSON that somebody may have cut, garbled or written with another version: taken only where they fit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def number(value: object) -> float | None:
    """A finite number; None for all else, true and false included."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        made = float(value)
    except OverflowError:  # a whole number of more than 300 digits
        return None
    return made if math.isfinite(made) else None


def share(value: object) -> float | None:
    """A number in [0, 1]."""
    made = number(value)
    return made if made is not None and 0 <= made <= 1 else None


def count(value: object) -> int | None:
    """A whole number, 0 or more."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53 else None


def text(value: object) -> str:
    """"" for what is no text. Half a surrogate pair, which no file can hold in UTF-8, becomes a sign."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else ""


def table(value: object) -> Mapping[str, Any]:
    """A JSON object; {} for all else."""
    return value if isinstance(value, dict) else {}


def rows(value: object) -> list[Mapping[str, Any]]:
    """The objects of a list; [] for all else."""
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def texts(value: object) -> list[str]:
    """The texts of a list that say something."""
    return [one for one in map(text, value) if one] if isinstance(value, list) else []
