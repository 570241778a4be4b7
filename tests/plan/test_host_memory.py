"""A container or a job may be allowed less memory than the machine has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.plan.host_memory import host_memory_bytes, limits

GIB = 2**30


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_the_limit_of_any_group_above_counts_in_version_2(tmp_path: Path) -> None:
    """SLURM: the job's group has the limit, the task's says max."""
    own = write(tmp_path / "cgroup", "0::/system.slice/job_7/step_0/task_0\n")
    write(tmp_path / "fs/system.slice/job_7/memory.max", f"{4 * GIB}\n")
    write(tmp_path / "fs/system.slice/job_7/step_0/task_0/memory.max", "max\n")
    assert limits(own, tmp_path / "fs") == [4 * GIB]


def test_version_1_keeps_the_controllers_apart(tmp_path: Path) -> None:
    own = write(tmp_path / "cgroup", "5:devices:/other\n4:cpu,memory:/docker/ab\n0::/\n")
    write(tmp_path / "fs/memory/docker/ab/memory.limit_in_bytes", str(2 * GIB))
    write(tmp_path / "fs/memory/memory.limit_in_bytes", str(2**63 - 4096))  # how version 1 says that there is none
    assert sorted(limits(own, tmp_path / "fs")) == [2 * GIB, 2**63 - 4096]


def test_a_container_that_shows_only_its_own_group_at_the_top_is_heard(tmp_path: Path) -> None:
    own = write(tmp_path / "cgroup", "0::/kubepods/pod1\n")
    write(tmp_path / "fs/memory.max", str(8 * GIB))
    assert limits(own, tmp_path / "fs") == [8 * GIB]


def test_without_control_groups_it_is_the_machines_memory(tmp_path: Path) -> None:
    assert limits(tmp_path / "absent", tmp_path) == []
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < host_memory_bytes() <= physical


GROUP = Path("/sys/fs/cgroup/memory")


@pytest.mark.skipif(not os.access(GROUP, os.W_OK), reason="needs the right to make a control group (version 1)")
def test_a_real_group_limits_what_a_process_in_it_sees() -> None:
    own = next(line.split(":")[2] for line in Path("/proc/self/cgroup").read_text().splitlines() if ":memory:" in line)
    parent = GROUP / own.lstrip("/")
    group = (parent if parent.is_dir() else GROUP) / f"test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(GIB))
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        program = (
            f"import os; open('{group}/cgroup.procs', 'w').write(str(os.getpid()))\n"
            "from trainer.plan.host_memory import host_memory_bytes; print(host_memory_bytes())"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
        assert done.stdout.strip() == str(GIB), done.stderr
    finally:
        group.rmdir()
