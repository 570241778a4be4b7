"""Which objects nobody has freed."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def left_behind(*kinds: type) -> Iterator[list[str]]:
    """At the end of the block: the classes of the objects of these kinds that were made in it and are still there.

    Python does not look for cycles of references meanwhile, as it might not for long in a run.
    """
    gc.collect()
    # The objects too, so that no other one gets the id of one of them.
    before = {id(thing): thing for thing in gc.get_objects() if issubclass(type(thing), kinds)}
    found: list[str] = []
    gc.disable()
    try:
        yield found
        now = [thing for thing in gc.get_objects() if issubclass(type(thing), kinds)]
        found += [type(thing).__name__ for thing in now if id(thing) not in before]
    finally:
        gc.enable()
