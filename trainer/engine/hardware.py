"""The hardware that this process finds: its own device, and what the plan needs to know of it."""

from __future__ import annotations

import os

import torch

from trainer.engine.compiled import compiles
from trainer.engine.torch_build import why_gpus_are_unused
from trainer.errors import ConfigError
from trainer.plan.host_memory import bytes_of_a_process, host_memory_bytes
from trainer.plan.launcher import START, Launch
from trainer.plan.network import network_gbps
from trainer.plan.strategies import BF16_CAPABILITY, Cluster


def own_device(launch: Launch) -> torch.device:
    """The GPU of this process, or the CPU where torch can use no GPU.

    Where each process is shown one GPU (srun --gpus-per-task=1, CUDA_VISIBLE_DEVICES set for each), it is that one,
    whatever its local rank; LOCAL_RANK is then set to 0, because Accelerate and DeepSpeed take it for the device's
    number. That no two processes have the same one is found when they meet (trainer/engine/meeting.py).

    Raises ConfigError where a machine has more processes than GPUs.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    if visible == 1:
        if launch.local_rank > 0:
            os.environ["LOCAL_RANK"] = "0"
        return torch.device("cuda", 0)
    if launch.local_world_size > visible:
        raise ConfigError(
            f"{launch.local_world_size} processes on a machine with {visible} GPU(s): one process needs one GPU;"
            f" {START}"
        )
    return torch.device("cuda", launch.local_rank)


def find_cluster(launch: Launch, *, compiler: bool = False) -> Cluster:
    """The hardware that this process was started on, as the plan needs it.

    Memory is what the device has, and not what is free now: that varies by megabytes, and with it the plan would.

    compiler  whether to find out if torch.compile works here, which takes seconds; if not, `compiles` is False

    Raises ConfigError where a machine has more processes than GPUs.
    """
    device = own_device(launch)
    cuda = device.type == "cuda"
    host = host_memory_bytes()
    return Cluster(
        nodes=launch.nodes,
        gpus_per_node=launch.local_world_size,
        device="cuda" if cuda else "cpu",
        gpu_memory_bytes=torch.cuda.get_device_properties(device).total_memory
        if cuda
        else bytes_of_a_process(host, launch.local_world_size),
        host_memory_bytes=host,
        # torch.cuda.is_bf16_supported() also says True where bf16 is emulated, and looks at the current device.
        supports_bf16=cuda and torch.cuda.get_device_capability(device) >= BF16_CAPABILITY,
        compiles=cuda and compiler and compiles(device),
        gpu_name=torch.cuda.get_device_properties(device).name if cuda else "",
        network_gbps=network_gbps() if cuda and launch.nodes > 1 else None,
        unused_gpu="" if cuda or launch.use_cpu else why_gpus_are_unused(),
    )


def card_of(device: torch.device) -> str:
    """What identifies the GPU on its machine, as nvidia-smi names it (GPU-<uuid>); empty for a CPU."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else ""
