"""The flags that say what follows from the validations of a run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

from trainer.flags.flag import Flag

best = partial(Flag, "best")


@dataclass(frozen=True, kw_only=True)
class BestFlags:
    """The section "best" of the flags; `Config` has all sections."""

    keep_best: Annotated[
        bool,
        best(
            "With --validation: save the step of each validation that is better than all before, keep it besides the "
            "newest two checkpoints, and export it at the end."
        ),
    ] = False
    early_stop: Annotated[
        int | None,
        best(
            "With --validation: end the run after so many validations without improvement; none: after all its steps.",
            least=1,
        ),
    ] = None
    export: Annotated[
        Literal["best", "last"],
        best("With --keep_best 1: the step that is exported at the end; without it, that is the last."),
    ] = "best"
