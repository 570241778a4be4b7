"""What a process allocates on a CPU: by PyTorch's own record, and by the C library's count."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def peak_bytes(function: Callable[[], object]) -> int:
    """The most that `function` holds at once of tensors, beside what was there before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        function()
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


class _MallInfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks"),
            *("uordblks", "fordblks", "keepcost"),
        )
    ]


def allocated_bytes() -> int:
    """What this process has allocated and not freed, tensors of any thread and library among it (glibc's mallinfo2).

    PyTorch's record misses what a thread of gloo frees. Python's own objects are mostly not among it, what its modules
    and oneDNN allocate for themselves is: some 100 KB a step in float32, megabytes in bf16.
    """
    gc.collect()
    library = ctypes.CDLL(None)
    library.mallinfo2.restype = _MallInfo
    found = library.mallinfo2()
    return int(found.uordblks + found.hblkhd)
