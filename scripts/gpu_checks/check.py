"""A claim that only a GPU can show, and the test that shows it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FIGURE = "FIGURE "  # how a test's output marks the line with what was measured


@dataclass(frozen=True, kw_only=True)
class Check:
    """One test of tests/gpu, run in a process of its own.

    name           what lists and tables call it; results are remembered by it
    claim          what a pass shows, in words
    test           pytest's name of it: file::function[parameters]
    usual_seconds  on an H100 or H200, with what starting the process takes; three times that and a minute end it
    gib            device memory that it needs; checks run beside each other while their sum fits
    alone          whether other checks would disturb it, because it measures time
    needs          packages without which it is left out
    """

    name: str
    claim: str
    test: str
    usual_seconds: int
    gib: float = 4.0
    alone: bool = False
    needs: tuple[str, ...] = ()

    @property
    def limit_seconds(self) -> int:
        return 3 * self.usual_seconds + 60

    @property
    def file(self) -> Path:
        """The test's file, relative to the project's root."""
        return Path(self.test.partition("::")[0])
