"""Each way of starting the trainer, for real: it trains as named, with the losses of one process."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.ranks.harness import free_port
from tests.rounding import LOSS
from tests.runs import ROOT, environ, few_clips, launch_here, metrics

ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
OLD_LAUNCHER = (sys.executable, "-m", "torch.distributed.launch")  # it adds --local-rank
# What `deepspeed --num_gpus 2` starts on each machine; itself it asks for GPUs. It adds --local_rank.
DEEPSPEED = (
    *(sys.executable, "-m", "deepspeed.launcher.launch"),
    f"--world_info={base64.urlsafe_b64encode(json.dumps({'localhost': [0, 1]}).encode()).decode()}",
    "--master_port=FREE_PORT",
)
CONFIGS = ROOT / "accelerate_configs"
FLAGS = [
    *("--code_views", "1", "--segment_seconds", "2", "--lr", "1e-3", "--max_steps", "3", "--warmup_steps", "1"),
    *("--global_batch", "4", "--batch_size", "2", "--use_cfg", "1", "--cfg_rate", "0.3"),
]
TRAIN = (str(ROOT / "launch.py"), "--dataset", "data", "--model_id", "debug", *FLAGS)
SECONDS = 150


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> Path:
    """The folder of `python launch.py`."""
    folder = tmp_path_factory.mktemp("one")
    few_clips(folder / "data")
    launch_here(folder, *FLAGS)
    return folder


def prepared(folder: Path, one_process: Path) -> Path:
    for name in ("data", "cache"):
        shutil.copytree(one_process / name, folder / name)
    return folder


def start(folder: Path, command: Sequence[str]) -> subprocess.Popen[str]:
    """The running launcher; it finds no settings of another one in the environment."""
    kept = {name: value for name, value in environ().items() if not name.startswith(("ACCELERATE_", "FSDP_"))}
    return subprocess.Popen(
        [*command], cwd=folder, env=kept, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen[str], expect: int = 0) -> str:
    try:
        output, _ = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    assert process.returncode == expect, f"exit code {process.returncode}, not {expect}:\n{output}"
    return output


def assert_trained(folder: Path, one_process: Path, strategy: str, processes: int) -> None:
    plan = json.loads((folder / "models/plan.json").read_text())
    assert (plan["strategy"], plan["world_size"]) == (strategy, processes)
    found, wanted = metrics(folder), metrics(one_process)
    assert found.keys() == wanted.keys() == {1, 2, 3}
    assert np.abs(np.array([found[step] - wanted[step] for step in wanted])).max() <= LOSS
    assert (folder / "models/lm_final.pt").is_file()


def by_file(name: str) -> tuple[str, ...]:
    return (*ACCELERATE, "--config_file", str(CONFIGS / f"{name}.yaml"))


@pytest.mark.parametrize(
    "launcher,strategy,processes",
    [
        pytest.param(by_file("zero2"), "zero2", 2, id="zero2"),
        pytest.param(by_file("fsdp"), "fsdp", 2, id="fsdp"),
        pytest.param(by_file("zero3"), "zero3", 2, id="zero3", marks=pytest.mark.full),
        pytest.param(by_file("default"), "single", 1, id="default", marks=pytest.mark.full),
        pytest.param(by_file("ddp"), "zero2", 2, id="a plain MULTI_GPU file names no strategy", marks=pytest.mark.full),
        pytest.param((*ACCELERATE, "--num_processes", "1"), "single", 1, id="accelerate 1", marks=pytest.mark.full),
        pytest.param(
            (*ACCELERATE, "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"),
            "zero2", 2, id="accelerate --multi_gpu", marks=pytest.mark.full,
        ),
        pytest.param(
            (*TORCHRUN, "--nproc_per_node", "2", "--standalone"), "zero2", 2, id="torchrun", marks=pytest.mark.full
        ),
        pytest.param(
            ("env", "ACCELERATE_USE_CPU=true", *TORCHRUN, "--nproc_per_node", "2", "--standalone"),
            "zero2", 2, id="torchrun on the CPU", marks=pytest.mark.full,
        ),
        pytest.param(
            (*OLD_LAUNCHER, "--nproc_per_node", "2", "--master_port", "FREE_PORT"),
            "zero2", 2, id="torch.distributed.launch", marks=pytest.mark.full,
        ),
        pytest.param(DEEPSPEED, "zero2", 2, id="the deepspeed launcher", marks=pytest.mark.full),
    ],
)  # fmt: skip
def test_each_launcher_trains_with_the_losses_of_one_process(launcher, strategy, processes, one_process, tmp_path):
    prepared(tmp_path, one_process)
    port = str(free_port())
    finish(start(tmp_path, [*(word.replace("FREE_PORT", port) for word in launcher), *TRAIN]))
    assert_trained(tmp_path, one_process, strategy, processes)


@pytest.mark.full
def test_ddp_is_obeyed_when_named(one_process, tmp_path):
    prepared(tmp_path, one_process)
    finish(start(tmp_path, [*by_file("ddp"), *TRAIN, "--strategy", "ddp"]))
    assert_trained(tmp_path, one_process, "ddp", 2)


@pytest.mark.full
def test_two_machines_meet_by_the_multi_node_file(one_process, tmp_path):
    """Both are this one; they differ in --machine_rank, and share the folder."""
    prepared(tmp_path, one_process)
    place = ("--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port()))
    machines = [
        start(tmp_path, [*by_file("multi_node"), *place, "--machine_rank", rank, *TRAIN]) for rank in ("0", "1")
    ]
    for machine in machines:
        finish(machine)
    assert_trained(tmp_path, one_process, "zero2", 2)
    assert json.loads((tmp_path / "models/plan.json").read_text())["nodes"] == 2


@pytest.mark.full
def test_the_cpu_launcher_that_starts_one_process_of_two_is_refused(one_process, tmp_path):
    prepared(tmp_path, one_process)
    output = finish(start(tmp_path, [*ACCELERATE, "--cpu", "--num_processes", "2", *TRAIN]), expect=1)
    assert "was asked for several processes and started one" in output
    assert not (tmp_path / "models").exists()


@pytest.mark.full
def test_a_killed_rank_ends_a_real_launch_with_a_message(one_process, tmp_path):
    prepared(tmp_path, one_process)
    process = start(tmp_path, [*by_file("zero2"), *TRAIN, "--max_steps", "1000"])
    while process.poll() is None and not (tmp_path / "models/metrics.jsonl").exists():
        time.sleep(0.01)
    listed = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True).stdout
    ranks = [int(line.split()[0]) for line in listed.splitlines()[1:] if int(line.split()[1]) == process.pid]
    os.kill(max(ranks), signal.SIGKILL)
    output = finish(process, expect=1)
    assert re.search(r"error: .*rank 1 on \S+.* the same command resumes", output), output


@pytest.mark.full
@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_a_run_that_torchrun_starts_again_goes_on_from_its_checkpoint(rendezvous, one_process, tmp_path):
    """A static rendezvous keeps its store, with the addresses of the processes that are gone."""
    prepared(tmp_path, one_process)
    shutil.copytree(tmp_path, tmp_path / "whole")
    steps = ("--max_steps", "40", "--checkpoint_minutes", "0.0001")
    place = ("--standalone",) if rendezvous == "c10d" else ("--master_port", str(free_port()))
    process = start(tmp_path, [*TORCHRUN, "--nproc_per_node", "2", *place, "--max_restarts", "1", *TRAIN, *steps])
    while process.poll() is None and not list((tmp_path / "models/checkpoints").glob("step-*/checkpoint.json")):
        time.sleep(0.01)
    os.kill(max(children(process.pid)), signal.SIGKILL)
    output = finish(process)
    assert "resuming from" in output and output.count("strategy zero2, 2 process(es)") == 2
    assert (tmp_path / "models/exit_code").read_text().strip() == "0"
    launch_here(tmp_path / "whole", *FLAGS, *steps)
    found, wanted = metrics(tmp_path), metrics(tmp_path / "whole")
    assert found.keys() == wanted.keys() == set(range(1, 41))
    assert np.abs(np.array([found[step] - wanted[step] for step in wanted])).max() <= LOSS


def children(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True).stdout
    return [int(line.split()[0]) for line in listed.splitlines()[1:] if int(line.split()[1]) == pid]


def test_the_files_hold_the_strategy_only():
    files = {path.stem: yaml.safe_load(path.read_text()) for path in CONFIGS.glob("*.yaml")}
    assert files.keys() == {"default", "ddp", "zero2", "zero3", "fsdp", "multi_node"}
    allowed = {"compute_environment", "distributed_type", "num_machines", "num_processes", "mixed_precision"}
    allowed |= {"main_process_port", "main_process_ip", "machine_rank", "deepspeed_config", "fsdp_config"}
    for name, values in files.items():
        assert values.keys() <= allowed, name
        assert values["mixed_precision"] == "no", name  # unquoted, YAML's no is False
