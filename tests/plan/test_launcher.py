"""What a launcher left in the environment is read as what it means, and what would not do what it says is refused."""

from __future__ import annotations

import pytest

from trainer.errors import ConfigError
from trainer.flags.config import parse
from trainer.plan.launcher import read_launch, without_local_rank
from trainer.plan.request import request_of

# What torchrun sets for rank 3 of 2 x 2 processes, and what `accelerate launch` adds (accelerate 1.15).
TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "29500"}
ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}
DEEPSPEED = {**TORCHRUN, **ACCELERATE, "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
FSDP = {**TORCHRUN, **ACCELERATE, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "false"}
FSDP |= {"FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_ACTIVATION_CHECKPOINTING": "false"}


def test_no_launcher_is_one_process():
    launch = read_launch({})
    assert (launch.rank, launch.world_size, launch.nodes, launch.strategy) == (0, 1, 1, None)


def test_one_process_by_accelerate_is_one_process():
    assert read_launch(ACCELERATE).world_size == 1


@pytest.mark.parametrize("environment", [TORCHRUN, {**TORCHRUN, **ACCELERATE}])
def test_a_plain_launch_names_its_processes_and_no_strategy(environment):
    launch = read_launch(environment)
    assert (launch.rank, launch.local_rank, launch.world_size, launch.nodes) == (3, 1, 4, 2)
    assert (launch.strategy, launch.mixed_precision, launch.offload_optimizer) == (None, None, False)


@pytest.mark.parametrize(
    "environment,strategy,offload",
    [
        (DEEPSPEED, "zero3", False),
        ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, "zero2", False),
        ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "zero3", True),
        ({**DEEPSPEED, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}, "zero3", False),
        (FSDP, "fsdp", False),
    ],
)
def test_a_configuration_names_its_strategy(environment, strategy, offload):
    launch = read_launch(environment)
    assert (launch.strategy, launch.offload_optimizer) == (strategy, offload)


def test_a_configuration_that_says_cpu_is_heard():
    assert read_launch({**ACCELERATE, "ACCELERATE_USE_CPU": "true"}).use_cpu
    assert not read_launch({**ACCELERATE, "ACCELERATE_USE_CPU": "false"}).use_cpu


def test_a_configuration_names_its_precision():
    assert read_launch({**FSDP, "ACCELERATE_MIXED_PRECISION": "bf16"}).mixed_precision == "bf16"


@pytest.mark.parametrize(
    "environment,words",
    [
        # accelerate launch --cpu --num_processes 2: MASTER_PORT, and one process
        ({**ACCELERATE, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}, "asked for several processes"),
        ({**TORCHRUN, "WORLD_SIZE": "3"}, "3 processes in groups of 2"),
        ({**TORCHRUN, **ACCELERATE, "ACCELERATE_MIXED_PRECISION": "fp8"}, "mixed_precision fp8"),
        ({**TORCHRUN, **ACCELERATE, "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "dynamo_backend inductor"),
        ({**TORCHRUN, **ACCELERATE, "ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
        ({**FSDP, "ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "parallelism_config"),
        ({**FSDP, "FSDP_VERSION": "1"}, "FSDP version 1"),
        ({**FSDP, "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params"),
        ({**FSDP, "FSDP_RESHARD_AFTER_FORWARD": "false"}, "fsdp_reshard_after_forward false"),
        ({**FSDP, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "--gradient_checkpointing 1"),
        ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, "ZeRO stage 1"),
        ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"}, "deepspeed_config_file"),
        ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}, "offload_param_device"),
        ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "nvme"}, "offload_optimizer_device nvme"),
        ({**DEEPSPEED, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "use --grad_acc"),
        ({**DEEPSPEED, "ACCELERATE_GRADIENT_CLIPPING": "0.5"}, "use --max_grad_norm"),
    ],
)
def test_what_would_not_act_is_refused(environment, words):
    with pytest.raises(ConfigError, match=words):
        read_launch(environment)


@pytest.mark.parametrize(
    "environment,flags,words",
    [
        (FSDP, "--strategy zero2", "--strategy zero2 contradicts fsdp"),
        (DEEPSPEED, "--strategy fsdp", "--strategy fsdp contradicts zero3"),
        (
            {**FSDP, "ACCELERATE_MIXED_PRECISION": "bf16"},
            "--mixed_precision no",
            "--mixed_precision no contradicts bf16",
        ),
        (
            {**DEEPSPEED, "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"},
            "--offload_optimizer 0",
            "--offload_optimizer 0 contradicts",
        ),
    ],
)
def test_a_flag_that_contradicts_the_configuration_is_refused(environment, flags, words):
    config, typed = parse(["--dataset", "music", *flags.split()])
    with pytest.raises(ConfigError, match=words):
        request_of(config, typed, read_launch(environment), frame_rate_hz=50, deepspeed_available=True)


@pytest.mark.parametrize("added", [["--local_rank=1"], ["--local-rank=1"], ["--local_rank", "1"]])
def test_the_local_rank_that_launchers_add_is_accepted_where_it_is_true(added):
    """deepspeed adds --local_rank=1, torch.distributed.launch --local-rank=1 before the flags."""
    flags = ["--dataset", "music", "--lora_rank", "4"]
    assert without_local_rank([*added, *flags], TORCHRUN) == flags
    assert without_local_rank([*flags, *added], TORCHRUN) == flags


@pytest.mark.parametrize(
    "environment,words",
    [({}, "LOCAL_RANK is not set.*torchrun"), ({**TORCHRUN, "LOCAL_RANK": "0"}, "LOCAL_RANK is 0.*torchrun")],
)
def test_a_local_rank_that_is_not_true_is_refused_with_the_launcher_to_use(environment, words):
    with pytest.raises(ConfigError, match=words):
        without_local_rank(["--local_rank=1", "--dataset", "music"], environment)


def test_the_deepspeed_launcher_says_how_many_processes_a_node_has():
    """It sets LOCAL_SIZE (deepspeed 0.19, launcher/launch.py), and no LOCAL_WORLD_SIZE."""
    environment = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_SIZE": "2", "MASTER_PORT": "29500"}
    launch = read_launch(environment)
    assert (launch.local_world_size, launch.nodes) == (2, 2)
