"""What is found of GPUs: each rank's own device, its precision and memory, and what holds the memory that it lacks.

The GPUs are simulated, by what torch.cuda would say of them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from launch import allocator_settings
from tests.plans import plan_for
from trainer.engine import Ranks, check_free_memory, find_cluster, own_device
from trainer.engine.accelerator import zero_config
from trainer.engine.free_memory import holders_in_words
from trainer.engine.meeting import Place, check_places
from trainer.errors import ConfigError, MemoryShortError
from trainer.plan.launcher import Launch
from trainer.plan.memory import GIB
from trainer.plan.plan import Plan

T4, A100, H100 = (7, 5), (8, 0), (9, 0)


@dataclass
class Gpu:
    capability: tuple[int, int] = H100
    memory: int = 80 * GIB
    free: int = 79 * GIB
    uuid: str = "11111111-2222"
    integrated: bool = False
    name: str = "NVIDIA H100 80GB HBM3"


@dataclass
class Machine:
    """The GPUs that this process is shown."""

    gpus: list[Gpu] = field(default_factory=lambda: [Gpu()])


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    shown = Machine()

    def gpu(device: torch.device | int | None = None) -> Gpu:
        return shown.gpus[0 if device is None else device if isinstance(device, int) else device.index]

    def properties(device: torch.device | int) -> SimpleNamespace:
        card = gpu(device)
        return SimpleNamespace(
            total_memory=card.memory, uuid=card.uuid, is_integrated=card.integrated, name=card.name
        )

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(shown.gpus))
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: gpu(device).capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (gpu(device).free, gpu(device).memory))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setenv("LOCAL_RANK", "0")
    return shown


def rank(local_rank: int, of: int) -> Launch:
    return Launch(rank=local_rank, local_rank=local_rank, world_size=of, local_world_size=of)


def test_bf16_is_planned_only_where_the_ranks_own_gpu_computes_in_it(machine: Machine) -> None:
    machine.gpus = [Gpu(capability=A100), Gpu(capability=T4), Gpu(capability=(7, 0)), Gpu(capability=(12, 0))]
    assert [find_cluster(rank(own, 4)).supports_bf16 for own in range(4)] == [True, False, False, True]


def test_memory_is_that_of_the_ranks_own_gpu_whatever_is_free_of_it(machine: Machine) -> None:
    machine.gpus = [Gpu(memory=80 * GIB), Gpu(memory=40 * GIB, free=GIB)]
    assert [find_cluster(rank(own, 2)).gpu_memory_bytes for own in range(2)] == [80 * GIB, 40 * GIB]


def test_the_name_is_that_of_the_ranks_own_gpu_and_the_network_is_asked_for_where_there_are_machines(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.engine.hardware.network_gbps", lambda: 400.0)
    machine.gpus = [Gpu(), Gpu(name="NVIDIA L4")]
    assert [find_cluster(rank(own, 2)).gpu_name for own in range(2)] == ["NVIDIA H100 80GB HBM3", "NVIDIA L4"]
    assert find_cluster(rank(0, 2)).network_gbps is None
    of_two = Launch(rank=0, local_rank=0, world_size=4, local_world_size=2)
    assert find_cluster(of_two).network_gbps == 400


def test_the_one_gpu_that_a_task_is_shown_is_its_own(machine: Machine) -> None:
    for own in range(4):
        assert own_device(rank(own, 4)) == torch.device("cuda", 0)
    assert os.environ["LOCAL_RANK"] == "0"  # Accelerate and DeepSpeed take it for the device's number
    cluster = find_cluster(rank(3, 4))
    assert (cluster.gpus_per_node, cluster.world_size) == (4, 4)


def test_more_processes_than_gpus_are_refused(machine: Machine) -> None:
    machine.gpus = [Gpu(), Gpu()]
    assert own_device(rank(1, 2)) == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match=r"4 processes on a machine with 2 GPU\(s\)"):
        own_device(rank(2, 4))


def place(card: str = "", host: str = "a", device: str = "cuda") -> Place:
    return Place(host=host, device=device, card=card)


def test_ranks_that_were_given_the_same_gpu_are_named() -> None:
    check_places([place("GPU-1"), place("GPU-2"), place("GPU-1", host="b")])
    check_places([place(device="cpu"), place(device="cpu")])
    with pytest.raises(ConfigError, match=r"ranks 0 and 2 on a were given the same GPU \(GPU-1\)"):
        check_places([place("GPU-1"), place("GPU-2"), place("GPU-1")])


def test_machines_on_which_torch_can_use_no_gpu_are_named() -> None:
    with pytest.raises(ConfigError, match=r"2 of 3 processes find no GPU .* rank 1; on b, c\)"):
        check_places([place("GPU-1"), place(host="b", device="cpu"), place(host="c", device="cpu")])


def planned(total_gib: float) -> Plan:
    """A plan for one GPU of which the process needs so much in all."""
    made = plan_for()
    most = made.memory.total - made.memory.reserve
    return replace(made, memory=replace(made.memory, reserve=round(total_gib * GIB) - most))


def nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """A program of this name, first in PATH, that prints this where it is asked for the GPU."""
    program = folder / "nvidia-smi"
    program.write_text(f'#!/bin/sh\ncase "$*" in *--id=GPU-11111111-2222*) printf "{text}";; *) exit 6;; esac\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_too_little_free_memory_is_refused_with_what_holds_it(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(tmp_path, monkeypatch, "4711, /usr/bin/python3, 20480\\n")
    with Ranks(timeout_seconds=60) as ranks:
        machine.gpus = [Gpu(free=59 * GIB)]
        check_free_memory(planned(60), torch.device("cuda", 0), ranks)  # CUDA's own GiB is taken already
        machine.gpus = [Gpu(free=59 * GIB - 1)]
        with pytest.raises(MemoryShortError) as caught:
            check_free_memory(planned(60), torch.device("cuda", 0), ranks)
        check_free_memory(planned(60), torch.device("cpu"), ranks)
    message = str(caught.value)
    assert all(
        part in message for part in ("cuda:0", "59.0 of its 80.0 GiB free", "needs 59.0 besides what CUDA")
    )
    assert "process 4711 (/usr/bin/python3) holds 20.0 GiB" in message and "--batch_size" in message


def test_a_missing_nvidia_smi_hides_no_lack_of_memory(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    machine.gpus = [Gpu(free=GIB)]
    with Ranks(timeout_seconds=60) as ranks, pytest.raises(MemoryShortError, match="nvidia-smi cannot be asked"):
        check_free_memory(planned(60), torch.device("cuda", 0), ranks)


def test_free_memory_is_not_asked_for_where_gpu_and_host_share_it(machine: Machine) -> None:
    machine.gpus = [Gpu(memory=120 * GIB, free=20 * GIB, integrated=True)]  # a hundred are kept copies of files
    with Ranks(timeout_seconds=1) as ranks:
        check_free_memory(planned(60), torch.device("cuda", 0), ranks)


def test_what_holds_a_gpu_is_told_without_this_process() -> None:
    listing = "17, python launch.py, 3000\n4711, /opt/a, b/python, 20480\n4712, [N/A], [N/A]\n"
    assert holders_in_words(listing, 17) == (
        "process 4711 (/opt/a, b/python) holds 20.0 GiB, process 4712 ([N/A]) holds an unknown part"
    )
    assert "does not list" in holders_in_words("17, python, 3000\n", 17)
    assert "does not list" in holders_in_words("", 17)
    many = "".join(f"{number}, python, 1024\n" for number in range(20, 27))
    assert holders_in_words(many, 17).endswith("and 3 more")


def test_deepspeed_is_asked_to_skip_steps_that_are_not_finite() -> None:
    assert zero_config(plan_for("zero2", precision="bf16"), 1.0)["bf16"]["check_grad_overflow"] is True


def test_the_allocator_lets_its_blocks_grow_unless_the_user_or_wsl_forbids_it() -> None:
    assert allocator_settings({}, "6.8.0-generic") == {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        assert allocator_settings({name: "max_split_size_mb:128"}, "6.8.0-generic") == {}
    assert allocator_settings({}, "5.15.153.1-microsoft-standard-WSL2") == {}
