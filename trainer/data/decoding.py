"""Sounds decoded by threads ahead of their use. soundfile and soxr let other threads run while they work."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np


class Decoders:
    """Threads that decode for several tracks at once, one for each core but no more than there are tracks."""

    def __init__(self, most_tracks: int):
        threads = min(most_tracks, len(os.sched_getaffinity(0)))
        self._pool = ThreadPoolExecutor(max(1, threads), thread_name_prefix="decode")

    def __enter__(self) -> Decoders:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Where something was raised, what was not begun is not decoded any more."""
        self._pool.shutdown(cancel_futures=True)

    def ahead(self, blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """The same blocks, the first decoded from now on and each other while the one before is in use.

        What `blocks` raises is raised where its block would have come.
        """
        return self._rest(blocks, self._pool.submit(next, blocks, None))

    def _rest(self, blocks: Iterator[np.ndarray], coming: Future[np.ndarray | None]) -> Iterator[np.ndarray]:
        while (block := coming.result()) is not None:
            coming = self._pool.submit(next, blocks, None)
            yield block
