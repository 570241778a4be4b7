"""A run on a cluster is interrupted in every way that clusters know, and ends as if nothing had happened."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import numpy as np
import pytest

from tests.runs import assert_bit_equal, final_state
from tests.slurm.cluster import kill, processes_of
from tests.slurm.jobs import NEAR, STEPS, Run


def test_a_requeued_run_on_two_nodes_ends_with_the_weights_of_an_undisturbed_one(cluster, undisturbed, tmp_path):
    run = Run(cluster, tmp_path)
    job = run.submit("multi_node", "--nodes=2")
    run.wait_for_step(random.randint(1, STEPS // 3))
    cluster.slurm("scancel", "--batch", "--signal=USR1", job)
    ended = run.wait()
    assert (ended["JobId"], ended["Restarts"]) == (job, "1")
    assert (run.output_dir / "exit_code").read_text() == "0\n"
    (resumed,) = run.resumed_at()
    assert 0 < resumed < STEPS
    undisturbed.wait()
    assert run.assert_every_step_once() == undisturbed.assert_every_step_once()
    assert_bit_equal(final_state(run.folder), final_state(undisturbed.folder))
    logs = run.output_dir / "logs" / job
    assert {path.name for path in logs.glob("*/node-*")} == {"node-0-n1", "node-1-n2"}
    assert len(list(logs.rglob("stderr.log"))) == 4, "one for each process and start"


@pytest.mark.full
def test_a_requeue_that_finds_one_node_of_two_continues_there(cluster, undisturbed, tmp_path):
    undisturbed.wait()
    run = Run(cluster, tmp_path).with_the_cache_of(undisturbed)
    job = run.submit("multi_node", "--nodes=1-2")
    run.wait_for_step(5)
    assert cluster.job(job)["NumNodes"] == "2"
    try:
        cluster.slurm("scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=test")
        cluster.slurm("scancel", "--batch", "--signal=USR1", job)
        ended = run.wait()
    finally:
        cluster.slurm("scontrol", "update", "NodeName=n2", "State=RESUME")
    assert (ended["Restarts"], ended["NodeList"]) == ("1", "n1")
    plan = json.loads((run.output_dir / "plan.json").read_text())
    assert (plan["world_size"], plan["global_batch"]) == (1, 4)
    losses, wanted = run.assert_every_step_once(), undisturbed.assert_every_step_once()
    assert np.abs(np.array([losses[step] - wanted[step] for step in wanted])).max() < NEAR


def cancel(run: Run) -> None:
    """scancel, and the same job submitted again."""
    run.cluster.slurm("scancel", run.job)
    run.wait("CANCELLED", exit_code=None)  # 75, or the signal that ended the job's shell first
    assert (run.output_dir / "exit_code").read_text() == "75\n"
    run.submit("multi_node", "--nodes=2")


def preempt(run: Run) -> None:
    """What preemption with PreemptMode=REQUEUE does."""
    run.cluster.slurm("scontrol", "requeue", run.job)


def kill_tasks(run: Run) -> None:
    """The launcher and the process of the second node are gone."""
    kill(processes_of("n2", run.job))


def kill_first(run: Run) -> None:
    """Those of the first node, which write the exit code; the job's own shell lives."""
    kill(pid for pid in processes_of("n1", run.job) if b"launch.py" in Path(f"/proc/{pid}/cmdline").read_bytes())


def fail_node(run: Run) -> None:
    """The second node loses its power, and comes back."""
    run.cluster.kill_node("n2")
    time.sleep(3)
    run.cluster.start_node("n2")


@pytest.mark.full
@pytest.mark.timeout(900)
def test_five_interruptions_lose_nothing_beyond_the_last_save(cluster, undisturbed, tmp_path):
    """Each kind at a random step; checkpoints are written almost all the time, so that kills hit them too."""
    undisturbed.wait()
    run = Run(cluster, tmp_path).with_the_cache_of(undisturbed)
    often = ("--checkpoint_minutes", "0.01")
    run.submit("multi_node", "--nodes=2", flags=often)
    deaths = random.sample([kill_tasks, kill_first, fail_node], 3)
    first, second = random.sample([cancel, preempt], 2)  # which save; three deaths at one checkpoint would be too many
    kinds = [deaths[0], first, deaths[1], second, deaths[2]]
    for index, interrupt in enumerate(kinds):
        run.wait_for_step(run.saved() + random.randint(1, 6), start=index + 1)
        saved = run.saved()
        print(interrupt.__name__, "at step", run.steps(), "with step", saved, "saved")
        interrupt(run)
        run.wait_for_step(1, start=index + 2)
        assert max([0, *run.resumed_at()[-1:]]) >= saved
    run.wait()
    assert run.assert_every_step_once() == undisturbed.assert_every_step_once()
    assert_bit_equal(final_state(run.folder), final_state(undisturbed.folder))


@pytest.mark.full
@pytest.mark.timeout(600)
def test_a_process_that_is_lost_three_times_at_one_checkpoint_ends_the_job(cluster, undisturbed, tmp_path):
    undisturbed.wait()
    run = Run(cluster, tmp_path).with_the_cache_of(undisturbed)
    run.submit("one_node", flags=("--segment_seconds", "8"))  # slow enough to be killed before the first save
    for index in range(3):
        run.wait_for_step(2, start=index + 1)
        kill_first(run)
    assert run.wait("FAILED", exit_code=137)["Restarts"] == "2"
