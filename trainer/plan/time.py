"""Seconds that an optimizer step should take, from FLOPs, bytes and rates of the hardware."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one optimizer step of full-length crops on the slowest process, and where they come from.

    compute        of forward and backward passes, what is computed a second time included
    update         of the norm, clipping and AdamW
    communication  of all collectives
    exposed        the part of `communication` that nothing is computed beside
    source         of the rates, in words: measured ones with their date, others as assumed
    """

    compute: float
    update: float
    communication: float
    exposed: float
    source: str

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return self.compute + self.update + self.exposed
