"""What is known of a piece beside its caption (key, tempo, genre and so on), and how it is merged into the caption.

Source: audiocraft 1.3.0, audiocraft/data/music_dataset.py (augment_music_info_description) and info_audio_dataset.py.
There, each batch draws anew; here, each of a caption's variants is a function of (seed, caption, fields, variant), so
that T5 reads each once, into the cache.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Fields = tuple[tuple[str, str], ...]  # (name, value) in the order of NAMES

NAMES = ("key", "bpm", "genre", "moods", "keywords", "instrument")  # the order of audiocraft's MusicInfo
OTHER_NAMES = {"instruments": "instrument", "mood": "moods"}  # as they stand in some files
LONGEST_VALUE = 500  # characters; a longer one is no keyword


@dataclass(frozen=True, kw_only=True)
class MergeRates:
    """How often a clip's fields are merged into its caption; probabilities in [0, 1].

    merge         of a variant to have fields; 0 for never (audiocraft's merge_text_p)
    drop_caption  of such a variant to lose its caption (drop_desc_p)
    drop_field    of each field of such a variant to be left out (1 - drop_other_p, which in audiocraft is the
                  probability to be kept)
    """

    merge: float = 0.0
    drop_caption: float = 0.0
    drop_field: float = 0.0

    @property
    def on(self) -> bool:
        return self.merge > 0

    def describe(self) -> str:
        return f"{self.merge}, captions dropped {self.drop_caption}, fields dropped {self.drop_field}"


@dataclass(frozen=True, kw_only=True)
class Decisions:
    """What was drawn for a variant that has fields.

    kept          whether each field is in it
    order         the places, among the kept ones, of those that come first, second and so on
    drop_caption  whether the caption is left out
    """

    kept: Sequence[bool]
    order: Sequence[int]
    drop_caption: bool


def fields_of(values: Mapping[str, Any]) -> Fields:
    """The fields among the values of a .json file or a row of metadata, as audiocraft reads them.

    Names are compared without regard to case. A value that is missing, empty or of another kind is left out.
    """
    lower = {str(name).strip().lower(): value for name, value in values.items()}
    for other, name in OTHER_NAMES.items():
        lower.setdefault(name, lower.get(other))
    read = {name: _value(name, lower.get(name)) for name in NAMES}
    return tuple((name, value) for name, value in read.items() if value)


def merged(caption: str | None, fields: Fields, decisions: Decisions | None) -> str | None:
    """A caption with fields behind it: "Slow rock. bpm: 90.0. genre: rock"; None where nothing is left.

    decisions  None for a variant without fields. As in audiocraft, its caption then ends in one full stop.
    """
    pairs = []
    if decisions is not None:
        kept = [f"{name}: {value}" for (name, value), keep in zip(fields, decisions.kept, strict=True) if keep]
        pairs = [kept[place] for place in decisions.order]
        if decisions.drop_caption:
            caption = None
    metadata = ". ".join(pairs)
    if caption is None:
        return metadata or None
    return ". ".join([caption.rstrip("."), metadata]).strip() or None


def merged_variant(caption: str | None, fields: Fields, rates: MergeRates, seed: int, variant: int) -> str | None:
    """One of a caption's variants: a function of (seed, caption, fields, variant)."""
    return merged(caption, fields, drawn(caption, fields, rates, seed, variant))


def drawn(caption: str | None, fields: Fields, rates: MergeRates, seed: int, variant: int) -> Decisions | None:
    """What is drawn for a variant; None for one without fields."""
    name = json.dumps([caption, fields])
    key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")
    draws = np.random.SeedSequence((seed, key, variant)).generate_state(2 + 2 * len(fields), np.uint64)
    merge, drop, *others = (int(draw) / 2**64 for draw in draws)
    if merge >= rates.merge:
        return None
    kept = [draw >= rates.drop_field for draw in others[: len(fields)]]
    places = others[len(fields) :][: sum(kept)]
    order = sorted(range(len(places)), key=lambda place: places[place])
    return Decisions(kept=kept, order=order, drop_caption=drop < rates.drop_caption)


def as_text(fields: Fields) -> str:
    """The fields as they stand in the table of clips; "" for none."""
    return json.dumps(fields, ensure_ascii=False) if fields else ""


def of_text(text: str) -> Fields:
    """The fields that `as_text` wrote."""
    return tuple((name, value) for name, value in json.loads(text)) if text else ()


def _value(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return ""
    if name == "bpm":
        return _tempo(value)
    if name in ("moods", "keywords") and isinstance(value, str):
        value = re.split(r"[,\s]", value)
    words = value if isinstance(value, list) else [value]
    text = ", ".join(filter(None, map(_keyword, words)))
    if name == "key" and "," in text:
        return ""  # several keys are none
    return text if len(text) <= LONGEST_VALUE else ""


def _keyword(value: Any) -> str:
    if not isinstance(value, str) or value.strip() in ("None", "nan"):
        return ""
    text = " ".join(value.split()).lower()
    return text if text.isprintable() else ""  # half a character, as JSON may hold it, is not printable either


def _tempo(value: Any) -> str:
    try:
        tempo = float(value)
    except (TypeError, ValueError, OverflowError):
        return ""
    return str(tempo) if math.isfinite(tempo) and tempo > 0 else ""
