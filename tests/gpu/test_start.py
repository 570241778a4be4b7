"""How a run starts on GPUs: what meeting costs, which device a process takes, what is refused and what is warned of."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.gpu.one_card import SHARED, gib, run_ranks, say_figure
from tests.plans import plan_for
from tests.ranks.cases import steps
from tests.ranks.harness import RankProcesses
from tests.ranks.test_zero_overflow import changed_by_a_spoiled_step
from tests.runs import command, environ
from trainer.errors import EXIT_DONE, EXIT_OUT_OF_MEMORY, EXIT_USAGE
from trainer.plan.memory import COMMUNICATOR_BYTES, CONTEXT_BYTES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.full,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MINUTES = 2.0  # --timeout_minutes of tests/ranks/cases.py
HOLD = """
import sys, torch
free, _ = torch.cuda.mem_get_info()
block = torch.empty(free - int(sys.argv[1]), dtype=torch.uint8, device="cuda")
print("held", flush=True)
sys.stdin.read()
"""


class Outside:
    """After a step, what the card holds beside PyTorch's own, and every group's limit in seconds, into a file."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self, engine) -> None:
        from torch.distributed import distributed_c10d

        reserved = sum(engine.ranks.gather(torch.cuda.memory_reserved()))
        free, total = torch.cuda.mem_get_info()
        outside = (total - free - reserved) // engine.ranks.world_size
        device = torch.device("cuda")
        limits = [
            group._get_backend(device).options._timeout.total_seconds() for group in distributed_c10d._world.pg_map
        ]
        (self.folder / str(engine.ranks.rank)).write_text(f"{outside} {' '.join(map(str, limits))}")


@pytest.mark.parametrize("strategy,ranks,nodes", [("fsdp", 2, 1), ("zero2", 2, 1), ("zero3", 2, 1), ("hsdp", 4, 2)])
def test_groups_and_their_memory_are_those_of_the_plan(strategy: str, ranks: int, nodes: int, tmp_path: Path) -> None:
    if strategy.startswith("zero"):
        pytest.importorskip("deepspeed")
    run_ranks(ranks, steps, strategy, 1, count=1, nodes=nodes, watch=Outside(tmp_path))
    planned = plan_for(strategy, world_size=ranks, nodes=nodes, on_gpu=True).layout.communicators
    for rank in range(ranks):
        outside, *limits = (tmp_path / str(rank)).read_text().split()
        if rank == 0:
            say_figure(f"{gib(int(outside))} a rank outside PyTorch, with {len(limits)} groups")
        assert len(limits) == planned
        assert {float(limit) for limit in limits} == {60 * MINUTES + 120}
        assert int(outside) <= CONTEXT_BYTES + planned * COMMUNICATOR_BYTES


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_a_bf16_step_with_nan_gradients_on_one_rank_changes_nothing_on_any(strategy: str) -> None:
    pytest.importorskip("deepspeed")
    assert run_ranks(2, changed_by_a_spoiled_step, strategy, "bf16") == [[], []]


def device_and_meeting() -> str:
    """This process's device, and what came of meeting the other."""
    from trainer.engine import meet, own_device
    from trainer.errors import ConfigError
    from trainer.plan.launcher import read_launch

    device = own_device(read_launch(os.environ))
    try:
        meet(device, 1.0)
    except ConfigError as error:
        return f"{device}: {error}"
    return f"{device}: met"


def test_a_process_that_is_shown_one_gpu_takes_it_and_two_with_the_same_one_are_refused() -> None:
    shown = SHARED | {"LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "0"}
    apart = [shown | {"LOCAL_RANK": str(rank), "NCCL_HOSTID": f"host{rank}"} for rank in range(2)]
    found = RankProcesses(2, device_and_meeting, (), {}, apart).results()
    assert [value for _, value in found] == ["cuda:0: met"] * 2, found
    together = [shown | {"LOCAL_RANK": str(rank)} for rank in range(2)]
    for _, value in RankProcesses(2, device_and_meeting, (), {}, together).results():
        assert "cuda:0" in value and "the same GPU" in value


@contextmanager
def all_but(count: int) -> Iterator[int]:
    """Another process holds the card's memory but `count` bytes; its process id."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(count)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline().strip() == "held"
        yield holder.pid


def run_of(folder: Path, *flags: str, **environment: str) -> tuple[int, str]:
    """Exit code and output of launch.py; a --model_id among the flags counts instead of debug."""
    done = subprocess.run(
        command(folder, "--max_steps", "1", *flags),
        cwd=folder,
        env=environ(**environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    return done.returncode, done.stdout


def test_a_card_that_another_process_fills_is_refused_by_name(tmp_path: Path) -> None:
    with all_but(1 * 2**30) as holder:
        code, output = run_of(tmp_path)
    last = output.split("error: ")[-1]
    say_figure(" ".join(last.split())[:240])
    assert code == EXIT_OUT_OF_MEMORY, output
    assert "free" in last and (str(holder) in last or "nvidia-smi" in last), output


def test_a_gpu_that_is_hidden_is_warned_of_and_a_real_model_is_refused(tmp_path: Path) -> None:
    code, output = run_of(tmp_path, CUDA_VISIBLE_DEVICES="")
    warnings = [line for line in output.splitlines() if line.startswith("warning: ")]
    say_figure(" ".join(warnings)[:240])
    assert code == EXIT_DONE and len(warnings) == 1 and "CUDA_VISIBLE_DEVICES" in warnings[0], output
    code, output = run_of(tmp_path, "--model_id", "small", "--output_dir", "other", CUDA_VISIBLE_DEVICES="")
    assert code == EXIT_USAGE and "add --device cpu" in output, output


def fragmentation() -> tuple[int, int]:
    """Most bytes allocated and most bytes reserved over steps of clips of many lengths."""
    import numpy as np
    from benchmarks.random_models import random_source

    from tests.gpu.cases import work_of
    from trainer.engine import Engine, Ranks, build_accelerator
    from trainer.flags.config import Config
    from trainer.wiring import engine_settings

    work, settings = work_of("small", "single", 8, "compiled"), engine_settings(Config(dataset_path="unused"))
    plan = work.plan(gpu_memory_bytes=torch.cuda.get_device_properties(0).total_memory)
    accelerator = build_accelerator(plan, settings, Path("."))
    engine = Engine(accelerator, Ranks(timeout_seconds=600), random_source("small"), plan, settings)
    whole = work.batch().to(engine.device)
    draw = np.random.default_rng(0)
    for step in range(40):
        batches = []
        for _ in range(work.accumulation):
            frames = int(draw.integers(200, 1501))
            inputs, labels = whole.inputs_BKT[..., :frames], whole.labels_BKT[..., :frames]
            batches.append(replace(whole, inputs_BKT=inputs, labels_BKT=labels))
        engine.step(batches, np.full(4, 8 * 2 * 800), step=step, learning_rate=1e-5)
    return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


def test_blocks_that_may_grow_lose_less_memory_to_lengths() -> None:
    shares = {}
    for setting in ("expandable_segments:True", "expandable_segments:False"):
        environment = {"PYTORCH_CUDA_ALLOC_CONF": setting}
        [(kind, value)] = RankProcesses(1, fragmentation, (), {}, [environment]).results(400)
        assert kind == "returned", value
        shares[setting] = value[1] / value[0]
    say_figure("; ".join(f"{setting}: reserved {share:.3f} of allocated" for setting, share in shares.items()))
    assert shares["expandable_segments:True"] <= 1.06  # FRAGMENTATION of trainer/plan/memory.py
