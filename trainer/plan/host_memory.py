"""How much main memory a run may use on this machine, and how much of it a process may plan with on a CPU."""

from __future__ import annotations

import os
from pathlib import Path

# Of a machine's memory, what the processes of a run on its CPU may plan with: the rest is for the system, for other
# programs, and for Python and its libraries, about 0.5 GiB a process. Assumed, not measured.
PLANNED_SHARE = 0.8
CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")


def host_memory_bytes() -> int:
    """The memory of this machine, or less where a container or a job of SLURM is allowed less."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([physical, *limits(OWN_CGROUP, CGROUPS)])


def bytes_of_a_process(host_bytes: int, processes: int) -> int:
    """What each of the processes on a machine may plan with where they compute on its CPU."""
    return int(PLANNED_SHARE * host_bytes) // processes


def limits(own: Path, root: Path) -> list[int]:
    """The limits of memory in bytes that Linux keeps this process's control group to, in any order; [] for none.

    Those of all groups above count too: SLURM limits the job, of which a task's group is a child.

    own   the file that names this process's groups, as /proc/self/cgroup: lines of id:controllers:path
    root  where groups are mounted: version 2 at once, version 1 in the folder memory/
    """
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:  # not Linux
        return []
    found = []
    for _, controllers, path in lines:
        if controllers == "":
            top, name = root, "memory.max"
        elif "memory" in controllers.split(","):
            top, name = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = top / path.lstrip("/")
        # Inside a container the path may be that of the host, of which only the container's own group is shown: at top.
        for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(top))):
            found += _limit(folder / name)
    return found


def _limit(file: Path) -> list[int]:
    """The limit in the file, as a list of one; [] where the file is absent or says that there is none."""
    try:
        return [int(file.read_text())]
    except (OSError, ValueError):  # ValueError: "max"
        return []
