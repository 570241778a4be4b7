"""One cluster for all tests of this folder, or a loud reason why there is none."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, Unavailable
from tests.slurm.jobs import Run


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    with contextlib.ExitStack() as stack:
        try:
            yield stack.enter_context(Cluster(tmp_path_factory.mktemp("slurm")))
        except Unavailable as reason:
            warnings.warn(f"SCRIPTS FOR SLURM ARE NOT TESTED: {reason}", stacklevel=1)
            pytest.skip(f"no SLURM here: {reason}")


@pytest.fixture(scope="session")
def undisturbed(cluster, tmp_path_factory) -> Run:
    """A run of multi_node.sbatch on both nodes: submitted, and done when `wait` returns."""
    run = Run(cluster, tmp_path_factory.mktemp("undisturbed"))
    run.submit("multi_node", "--nodes=2")
    return run
