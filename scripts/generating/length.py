"""How long sounds are, how much of them the model makes at once, and what is said of that."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from generating.flags import WINDOW_SECONDS
from trainer.errors import ConfigError
from trainer.evaluation.windows import window_starts
from trainer.exports.saved_models import run_of
from trainer.wiring.finished_run import config_of_run


@dataclass(frozen=True, kw_only=True)
class Length:
    """In frames; see generate_long."""

    frames: int
    window_frames: int
    stride_frames: int

    @property
    def starts(self) -> range:
        """Where the windows begin."""
        return window_starts(self.frames, self.window_frames, self.stride_frames)


def length_of(flags: argparse.Namespace, frame_rate_hz: float) -> Length:
    """The lengths that the flags give in seconds."""
    return Length(
        frames=round(flags.seconds * frame_rate_hz),
        window_frames=round(flags.window_seconds * frame_rate_hz),
        stride_frames=round(flags.stride_seconds * frame_rate_hz),
    )


def tell(flags: argparse.Namespace, length: Length) -> None:
    """Say what the length means for the music, where it means anything."""
    if len(length.starts) > 1:
        overlap = flags.window_seconds - flags.stride_seconds
        print(
            f"note: {flags.seconds:g} s are made in {len(length.starts)} windows of at most {flags.window_seconds:g} s."
            f" Each goes on from the last {overlap:g} s of the one before it, and knows nothing of what was earlier"
        )
    trained = segment_seconds(flags.model)
    if min(flags.seconds, flags.window_seconds) > trained:
        whose = "Meta's models were" if trained == WINDOW_SECONDS else f"the run of {flags.model} was"
        print(
            f"note: {whose} trained on {trained:g} s at once; beyond that music may lose its thread."
            f" --window_seconds {trained:g} makes no more at once, and goes on from there"
        )


def segment_seconds(model: str) -> float:
    """How much the model was trained on at once: --segment_seconds of the run that it is of, 30 of any other."""
    run = run_of(Path(model).expanduser())
    if run is None:
        return WINDOW_SECONDS
    try:
        return config_of_run(run, "--model").segment_seconds
    except ConfigError:  # of a run by another version, whose flags this one does not know
        return WINDOW_SECONDS
