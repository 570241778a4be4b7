"""The flags of stereo sound, and of the melodies that melody models read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

from trainer.flags.flag import Flag

sound = partial(Flag, "sound")


@dataclass(frozen=True, kw_only=True)
class SoundFlags:
    """The section "sound" of the flags; `Config` has all sections."""

    stereo: Annotated[
        bool, sound("Make a mono model a stereo one, whose two channels start as copies of its one; and train that.")
    ] = False
    stereo_init: Annotated[
        Literal["halved", "copied"],
        sound(
            "With --stereo 1: the embeddings that both channels start from. halved: by half of them the model predicts "
            "what it did where both channels are equal; copied: whole, as Meta made its stereo models."
        ),
    ] = "halved"
    melody_rate: Annotated[
        float | None,
        sound(
            "With a melody model: share of clips that are trained without their melody, so that it also makes music "
            "without one; none: 0.5, as Meta trained it.",
            least=0,
            most=1,
        ),
    ] = None
    stems: Annotated[
        Literal["auto", "demucs", "mix"],
        sound(
            "With a melody model: what a clip's melody is heard in. demucs: its voice and other instruments, without "
            "drums and bass; mix: all of it; auto: demucs on a GPU where it is installed and has its weights, else mix."
        ),
    ] = "auto"
