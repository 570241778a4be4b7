"""The flags by which a run shares its model on the Hugging Face hub when it is done."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated

from trainer.flags.flag import Flag

sharing = partial(Flag, "sharing")


@dataclass(frozen=True, kw_only=True)
class SharingFlags:
    """The section "sharing" of the flags; `Config` has all sections."""

    push_to_hub: Annotated[
        str | None,
        sharing(
            "At the end, upload the exported model, its sounds and a card to this model repository of the Hugging Face "
            "hub, user/name, a private one; none: nothing is uploaded."
        ),
    ] = None
    public: Annotated[
        bool, sharing("With --push_to_hub: make a new repository a public one, or use one that is public.")
    ] = False
