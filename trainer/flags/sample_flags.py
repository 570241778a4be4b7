"""The flags of the sounds that a run makes of some prompts while it trains."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated

from trainer.flags.flag import Flag

samples = partial(Flag, "samples")


@dataclass(frozen=True, kw_only=True)
class SampleFlags:
    """The section "samples" of the flags; `Config` has all sections."""

    sample_every: Annotated[
        int | None,
        samples(
            "Let the model play some prompts before step 1, every so many steps and at the end, into "
            "output_dir/samples; none: never.",
            least=1,
        ),
    ] = None
    sample_prompts: Annotated[
        str | None,
        samples(
            "With --sample_every: a text file with one prompt a line, or prompts with | between them, or `captions`, "
            "which are all captions of the dataset; none: three of these, drawn by --seed, and one prompt that it "
            "does not have."
        ),
    ] = None
    sample_seconds: Annotated[
        float, samples("With --sample_every: length of each sound in seconds.", least=0.1, most=300)
    ] = 10.0
    sample_guidance: Annotated[
        float, samples("With --sample_every: how strongly to follow the prompt; 1 is plain.", least=1, most=100)
    ] = 3.0
    sample_temperature: Annotated[
        float, samples("With --sample_every: higher is more varied.", least=0.01, most=100)
    ] = 1.0
    sample_top_k: Annotated[
        int, samples("With --sample_every: choose among the k most likely codes; 0 is all.", least=0)
    ] = 250
    sample_continue: Annotated[
        float | None,
        samples(
            "With --sample_every: one sound more, which goes on from the first so many seconds of a clip of the "
            "dataset; none: no such sound.",
            above=0,
            most=300,
        ),
    ] = None
