"""Writes tables of sounds, as people have them, for tests."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import soundfile

from tests.audio_files import noise

AUDIO = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def sound_bytes(seed: int, seconds: float = 1.0, form: str = "WAV") -> bytes:
    """The bytes of a file of noise that `seed` makes."""
    memory = io.BytesIO()
    soundfile.write(memory, noise(seconds, seed=seed), 8_000, format=form)
    return memory.getvalue()


def rows_of(seeds: Sequence[int], **more: Sequence[Any]) -> pa.Table:
    """A table with the columns audio and text, and those of `more`."""
    audio = [{"bytes": sound_bytes(seed), "path": f"{seed}.wav"} for seed in seeds]
    texts = pa.array([f"caption {seed}" for seed in seeds])
    others = {name: pa.array(values) for name, values in more.items()}
    return pa.table({"audio": pa.array(audio, AUDIO), "text": texts, **others})


def write_parquet(path: Path, table: pa.Table, group_rows: int = 3) -> Path:
    """The table at `path`, in row groups of so many rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path, row_group_size=group_rows)
    return path
