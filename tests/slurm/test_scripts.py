"""Each script of scripts/slurm on a real SLURM: what it starts, how its jobs end, what its check refuses."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.runs import ROOT
from tests.slurm.jobs import ENVIRONMENT, NEAR, STEPS, Run


def check(cluster, *words: str, **environment: str) -> str:
    return cluster.slurm("bash", "scripts/slurm/check.sh", *words, check=False, **(ENVIRONMENT | environment))


GOOD = ("--nodes=2", "--gpus-per-node=2", "--cpus-per-task=2", "scripts/slurm/multi_node.sbatch")
GOOD_FLAGS = ("--dataset", "examples", "--output_dir", "out")


def test_the_check_passes_a_good_request_and_submits_nothing(cluster):
    before = cluster.unfinished()
    answer = check(cluster, *GOOD, *GOOD_FLAGS)
    assert "wrong" not in answer
    assert "on nodes n[1-2]" in answer and "strategy zero2, 4 process(es) on 2 nodes" in answer
    assert cluster.unfinished() == before


@pytest.mark.parametrize(
    "words,environment,answer",
    [
        (("--nodes=3", *GOOD[1:], *GOOD_FLAGS), {}, "SLURM refuses this request"),
        ((GOOD[0], "--gpus-per-node=3", *GOOD[2:], *GOOD_FLAGS), {}, "SLURM refuses this request"),
        (("--signal=USR1@60", *GOOD, *GOOD_FLAGS), {}, "killed at its time limit"),
        (("--ntasks-per-node=1", *GOOD, *GOOD_FLAGS), {}, "leave them out"),
        ((*GOOD, *GOOD_FLAGS), {"PROCESSES_PER_NODE": "1"}, "2 GPU(s) of each node and PROCESSES_PER_NODE=1"),
        ((*GOOD, *GOOD_FLAGS), {"PYTHON": "absent/bin/python"}, "there is no absent/bin/python"),
        ((*GOOD, *GOOD_FLAGS, "--epoch", "3"), {}, "Did you mean --epochs?"),
        ((*GOOD, *GOOD_FLAGS, "--model_id", "large"), {"GPU_MEMORY_GIB": "12"}, "launch.py refuses the flags"),
        ((*GOOD, "--dataset", "absent", "--output_dir", "out"), {}, "--dataset absent cannot be read"),
        ((*GOOD, "--dataset", "examples"), {}, "no --output_dir"),
        (("scripts/slurm/absent.sbatch",), {}, "is no .sbatch file"),
    ],
)
def test_the_check_names_what_is_wrong(cluster, words, environment, answer):
    assert any(answer in line for line in check(cluster, *words, **environment).splitlines() if "wrong" in line)


@pytest.mark.full
def test_one_node_with_two_gpus_runs_two_processes(cluster, undisturbed, tmp_path):
    undisturbed.wait()
    run = Run(cluster, tmp_path).with_the_cache_of(undisturbed)
    run.submit("one_node", "--gpus-per-node=2")
    run.wait()
    plan = json.loads((run.output_dir / "plan.json").read_text())
    assert (plan["world_size"], plan["nodes"]) == (2, 1)
    losses, wanted = run.assert_every_step_once(), undisturbed.assert_every_step_once()
    assert np.abs(np.array([losses[step] - wanted[step] for step in wanted])).max() < NEAR


@pytest.mark.full
def test_near_the_time_limit_a_job_saves_and_is_requeued(cluster, tmp_path):
    """USR1 comes from SLURM itself, up to a minute early; the job's own limit of 2 minutes is not reached."""
    run = Run(cluster, tmp_path)
    run.submit("one_node", "--time=2", "--signal=B:USR1@75", flags=("--segment_seconds", "8", "--global_batch", "16"))
    ended = run.wait(seconds=280)
    assert int(ended["Restarts"]) >= 1
    assert "USR1: saving" in run.log() and "DUE TO TIME LIMIT" not in run.log()
    run.assert_every_step_once()


@pytest.mark.full
@pytest.mark.parametrize("script,nodes", [("multi_node", 2), ("one_node", 1)])
def test_a_dataset_without_clips_fails_the_job_with_the_trainers_code(cluster, tmp_path, script, nodes):
    run = Run(cluster, tmp_path)
    (tmp_path / "empty").mkdir()
    run.submit(script, f"--nodes={nodes}", flags=("--dataset", str(tmp_path / "empty")))
    ended = run.wait("FAILED", exit_code=3)
    assert ended["Restarts"] == "0"


@pytest.mark.full
def test_tasks_of_an_array_run_each_setting_and_are_requeued_alone(cluster, tmp_path):
    run = Run(cluster, tmp_path)
    array = run.submit("sweep", f"--output={tmp_path}/%A_%a.log")
    last = Run(cluster, tmp_path)
    last.job, last.output_dir = f"{array}_2", run.output_dir / "2"
    last.wait_for_step(3)
    cluster.slurm("scancel", "--batch", "--signal=USR1", last.job)
    restarts = []
    for task in range(3):
        last.job = f"{array}_{task}"
        restarts.append(last.wait()["Restarts"])
    assert restarts == ["0", "0", "1"]
    rates = [json.loads((run.output_dir / str(task) / "config.json").read_text())["lr"] for task in range(3)]
    assert rates == [3e-6, 1e-5, 3e-5]
    assert all((run.output_dir / str(task) / "lm_final.pt").is_file() for task in range(3))


@pytest.mark.full
def test_a_chain_goes_on_in_its_next_job_and_cancels_what_is_left(cluster, tmp_path):
    run = Run(cluster, tmp_path)
    links = [run.submit("chain", f"--job-name={tmp_path.name}") for _ in range(3)]
    run.job = links[0]
    run.wait_for_step(3)
    cluster.slurm("scancel", "--batch", "--signal=USR1", links[0])
    for link, state in zip(links, ("COMPLETED", "COMPLETED", "CANCELLED"), strict=True):
        run.job = link
        assert run.wait(state, exit_code=None if state == "CANCELLED" else 0)["Restarts"] == "0"
    assert 3 <= run.resumed_at()[0] < STEPS
    run.assert_every_step_once()


@pytest.mark.full
def test_a_failing_chain_ends_at_its_first_job(cluster, tmp_path):
    run = Run(cluster, tmp_path)
    (tmp_path / "empty").mkdir()
    flags = ("--dataset", str(tmp_path / "empty"))
    links = [run.submit("chain", f"--job-name={tmp_path.name}", flags=flags) for _ in range(2)]
    run.job = links[0]
    run.wait("FAILED", exit_code=3)
    run.job = links[1]
    run.wait("CANCELLED", exit_code=None)


@pytest.mark.full
def test_a_second_job_on_one_output_dir_is_refused_and_disturbs_nothing(cluster, tmp_path):
    first = Run(cluster, tmp_path)
    first.submit("one_node", "--nodes=1")
    first.wait_for_step(2)
    second = Run(cluster, tmp_path)
    second.submit("one_node", "--nodes=1")
    second.wait("FAILED", exit_code=2)
    assert f"SLURM job {first.job}" in (tmp_path / f"{second.job}.log").read_text()
    first.wait()
    first.assert_every_step_once()


def test_a_job_counts_its_losses_by_our_own_newest_checkpoint(tmp_path: Path) -> None:
    for name in ("step-00000002", "step-00000010", "step-00000010-best-2", "step-00000011.partial", "step-3"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "checkpoint.json").touch()
    function = f"source <(sed -n '/^newest_checkpoint/,/^}}/p' {ROOT / 'scripts/slurm/job.sh'}); newest_checkpoint"
    environment = {**os.environ, "output_dir": str(tmp_path)}
    done = subprocess.run(["bash", "-c", function], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"{tmp_path}/checkpoints/step-00000010/checkpoint.json\n"
