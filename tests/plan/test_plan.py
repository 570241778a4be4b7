"""The plan: a strategy by size, then what memory forces, the global batch kept to the clip, and every reason told."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

from scripts.plan_table import FILE, ONE_GPU_GIB, modes_of, page, plan_of
from trainer.errors import EXIT_OUT_OF_MEMORY, EXIT_USAGE, ConfigError, MemoryShortError, TrainerError
from trainer.flags.config import Config, parse
from trainer.plan.dry_run import cluster_of, cluster_of_listing, dry_run
from trainer.plan.host_memory import bytes_of_a_process
from trainer.plan.launcher import Launch
from trainer.plan.layout import Workload
from trainer.plan.memory import COMMUNICATOR_BYTES, GIB, PARTS
from trainer.plan.plan import Plan, make_plan
from trainer.plan.request import BatchFlags, Request, batch_flags, request_of
from trainer.plan.strategies import Cluster
from trainer.spec.shapes import KNOWN, PUBLISHED_NAMES
from trainer.spec.trainable import count as parameters_of
from trainer.spec.trainable import selection_of

ROOT = Path(__file__).resolve().parents[2]
SHARDING = ["single", "ddp", "zero2", "zero3", "hsdp", "fsdp"]


def gpus(count: int, gib: float | None = 80, nodes: int = 1, host_gib: float | None = None) -> Cluster:
    return Cluster(
        nodes=nodes,
        gpus_per_node=count,
        device="cuda",
        gpu_memory_bytes=None if gib is None else round(gib * GIB),
        host_memory_bytes=None if host_gib is None else round(host_gib * GIB),
        supports_bf16=True,
    )


def cpus(processes: int) -> Cluster:
    return replace(gpus(processes, None), device="cpu", supports_bf16=False)


def batch(batch_size: int = 4, grad_acc: int = 2, global_batch: int | None = None, typed: bool = False) -> BatchFlags:
    return BatchFlags(batch_size=batch_size, grad_acc=grad_acc, global_batch=global_batch, grad_acc_typed=typed)


def asked(**changes: object) -> Request:
    """The request of flags by default, with these fields of it or of its workload changed."""
    of_workload = {name: changes.pop(name) for name in [field.name for field in fields(Workload)] if name in changes}
    workload = replace(Workload(segment_frames=1500), **of_workload)  # type: ignore[arg-type]
    return Request(workload=workload, **changes)  # type: ignore[arg-type]


def plan(cluster: Cluster, model: str = "small", flags: BatchFlags | None = None, **changes: object) -> Plan:
    """The plan of a user who typed --device cpu where there is no GPU."""
    device = {"device": "cpu"} if cluster.device == "cpu" else {}
    return make_plan(cluster, KNOWN[model], flags or batch(), asked(**{**device, **changes}))


def refusal(cluster: Cluster, model: str = "small", flags: BatchFlags | None = None, **changes: object) -> str:
    with pytest.raises(TrainerError) as caught:
        plan(cluster, model, flags, **changes)
    return str(caught.value)


def test_strategy_follows_number_of_gpus_and_size_of_the_model() -> None:
    expected = {"small": "zero2", "medium": "zero2", "large": "fsdp", "debug": "zero2"}
    for model, strategy in expected.items():
        assert plan(gpus(1), model).strategy == "single"
        for cluster in (gpus(2), gpus(8), gpus(8, nodes=2), cpus(2)):
            assert plan(cluster, model).strategy == strategy
        assert plan(gpus(4), model, deepspeed_available=False).strategy == "fsdp"
        assert plan(gpus(4), model, mixed_precision="fp16").strategy == "ddp"
    assert plan(cpus(1), "debug").strategy == "single"


@pytest.mark.parametrize(
    ("cluster", "strategy"), [(gpus(1), "single"), (gpus(2, 40), "fsdp"), (gpus(4, 24), "fsdp"), (gpus(8, 24), "fsdp")]
)
def test_large_runs_on_the_clusters_that_people_have(cluster: Cluster, strategy: str) -> None:
    made = plan(cluster, "large")
    assert made.strategy == strategy and made.global_batch == 8 * cluster.world_size
    assert made.memory.total <= (cluster.gpu_memory_bytes or 0)
    assert not made.offload_optimizer


def test_large_runs_on_two_nodes_also_sharded_within_a_node() -> None:
    across = plan(gpus(8, 40, nodes=2), "large")
    within = plan(gpus(8, 40, nodes=2), "large", strategy="hsdp")
    assert (across.strategy, within.strategy) == ("fsdp", "hsdp")
    assert within.memory.weights == pytest.approx(2 * across.memory.weights, rel=1e-6)
    assert within.world_size == across.world_size == 16


def test_memory_lowers_the_micro_batch_then_recomputes_then_shards_more() -> None:
    made = [plan(gpus(4, gib), "medium") for gib in (80, 24, 16, 12)]
    assert [(p.strategy, p.micro_batch, p.gradient_checkpointing) for p in made] == [
        ("zero2", 4, False),
        ("zero2", 2, False),
        ("zero2", 4, True),
        ("fsdp", 4, True),
    ]
    assert {p.global_batch for p in made} == {32}


def test_on_one_gpu_the_optimizer_is_offloaded_when_nothing_else_helps() -> None:
    made = plan(gpus(1, 24), "large")
    assert (made.strategy, made.offload_optimizer, made.memory.optimizer) == ("zero2", True, 0)
    assert any("offloaded because memory is short" in reason for reason in made.reasons)
    assert not plan(gpus(1, 80), "large").offload_optimizer
    for change in ({"deepspeed_available": False}, {"offload_optimizer_typed": True}, {"mixed_precision": "fp16"}):
        assert "does not fit" in refusal(gpus(1, 24), "large", **change)
    assert "host memory" in refusal(gpus(1, 24, host_gib=32), "large")


def test_memory_never_lowers_the_sharding() -> None:
    for model, count in itertools.product(("small", "medium", "large"), (2, 3, 8)):
        strategies = []
        for gib in (80, 48, 40, 32, 24, 20, 16, 12, 11, 10):
            try:
                strategies.append(SHARDING.index(plan(gpus(count, gib), model).strategy))
            except MemoryShortError:
                break
        assert strategies == sorted(strategies)


def test_the_global_batch_is_kept_to_the_clip_and_nothing_exceeds_the_flags() -> None:
    draw = random.Random(0)
    made = 0
    for _ in range(600):
        cluster = gpus(draw.randint(1, 9), draw.choice([8, 12, 16, 24, 40, 80]), nodes=draw.randint(1, 2))
        flags = batch(draw.randint(1, 9), draw.randint(1, 4), draw.choice([None, draw.randint(1, 100)]))
        try:
            result = plan(cluster, draw.choice(["small", "medium", "large"]), flags)
        except MemoryShortError:
            continue
        made += 1
        wanted = flags.global_batch or flags.batch_size * flags.grad_acc * cluster.world_size
        rows = result.world_size * result.accumulation * result.micro_batch
        assert result.global_batch == wanted
        assert 1 <= result.micro_batch <= flags.batch_size
        # Enough rows for all clips, and not so many that one micro-batch less would do.
        assert wanted <= rows and (result.accumulation - 1) * result.micro_batch * result.world_size < wanted
        assert result.memory.total <= (cluster.gpu_memory_bytes or 0)
    assert made > 300


def test_eight_clips_a_process_are_not_split_into_three_times_three() -> None:
    for gib in range(8, 41):
        try:
            made = plan(gpus(1, gib), "small")
        except MemoryShortError:
            continue
        assert made.micro_batch * made.accumulation == 8


def test_more_gpus_or_larger_ones_never_make_a_run_impossible() -> None:
    for model in ("small", "medium", "large"):
        for gib in (10, 12, 16, 24, 40):
            runs = []
            for count in range(2, 12):
                try:
                    runs.append(plan(gpus(count, gib), model, batch(1, 1)).memory.total)
                except MemoryShortError:
                    runs.append(None)
            assert runs == sorted(runs, key=lambda total: total is not None)


def test_a_plan_of_the_same_layout_never_needs_more_with_more_gpus_but_for_nccl() -> None:
    for model, strategy in itertools.product(("small", "medium", "large"), ("ddp", "zero2", "zero3", "fsdp")):
        plans = [
            plan(gpus(count, None), model, batch(4, 2), strategy=strategy, gradient_checkpointing_typed=True)
            for count in (1, 2, 3, 4, 8, 16)
        ]
        totals = [made.memory.total - COMMUNICATOR_BYTES * made.layout.communicators for made in plans]
        assert totals == sorted(totals, reverse=True)


def test_what_is_unknown_refuses_nothing_for_memory() -> None:
    made = plan(cpus(2), "large", strategy="ddp")
    assert (made.strategy, made.micro_batch, made.mixed_precision) == ("ddp", 4, "no")
    assert made.gpu_memory_bytes is None and made.memory.reserve == 0
    assert any("nothing is refused for memory" in reason for reason in made.reasons)


def host(gib: float, processes: int = 1) -> Cluster:
    """The CPU of a machine of so much memory."""
    size = round(gib * GIB)
    memory = bytes_of_a_process(size, processes)
    return replace(cpus(processes), gpu_memory_bytes=memory, host_memory_bytes=size)


def test_a_plan_on_a_cpu_is_held_against_the_hosts_memory() -> None:
    """AdamW holds 16 bytes a parameter, a checkpoint's copy takes another 12, and a fifth of the memory is left."""
    needed = 28 * KNOWN["large"].parameters / 0.8 / GIB
    message = refusal(host(needed - 1), "large")
    assert all(part in message for part in ("on CPUs", f"{needed - 1:.1f} GiB of host memory", "checkpoint's copy"))
    for suggestion in ("--lora_rank 16", "--model_id medium", "--optimizer adamw8bit"):
        assert suggestion in message
    assert "GPUs" not in message and "offload" not in message
    assert plan(host(needed - 1), "medium") and plan(host(needed - 1), "large", selection=selection_of(lora_rank=16))
    made = plan(host(needed + 30), "large")
    assert 28 * KNOWN["large"].parameters < made.memory.total <= made.gpu_memory_bytes
    assert made.memory.checkpoint == 12 * KNOWN["large"].parameters and plan(gpus(1)).memory.checkpoint == 0


def test_processes_of_a_machine_share_its_memory() -> None:
    assert plan(host(18), "small").strategy == "single"
    message = refusal(host(18, 2), "small", strategy="ddp")
    assert "2 process(es) on CPUs" in message and "--strategy auto" in message
    assert plan(host(18, 2), "small").strategy == "fsdp"
    assert "one process for each machine; or" in refusal(host(18, 8), "small")


def test_a_small_machine_still_tries_out_the_debug_model_on_four_processes() -> None:
    assert plan(host(2, 4), "debug", segment_frames=200)


def test_a_real_model_on_a_cpu_wants_the_flag() -> None:
    cause = "1 GPU(s) (RTX 3060) in this machine, but torch is a build without CUDA"
    without = replace(host(1000), unused_gpu=cause)
    message = refusal(without, "small", device="auto")
    assert all(part in message for part in ("420 million parameters", cause, "add --device cpu"))
    assert "torch finds no NVIDIA GPU" in refusal(host(1000), "small", device="auto")
    assert plan(without, "small", device="cpu") and plan(without, "debug", device="auto")
    assert cause in refusal(without, "debug", device="cuda")
    assert plan(gpus(1), "small", device="cuda") == plan(gpus(1), "small", device="auto")


def test_the_launchers_cpu_counts_like_the_flag() -> None:
    assert asked_by(launch=Launch(use_cpu=True)).device == asked_by("--device", "cpu").device == "cpu"
    with pytest.raises(ConfigError, match="--device cuda contradicts"):
        asked_by("--device", "cuda", launch=Launch(use_cpu=True))


def test_a_dry_run_for_the_cpu_plans_with_this_machines_memory(capsys: pytest.CaptureFixture[str]) -> None:
    config, typed = parse(["--dataset", "music", "--dry_run", "--model_id", "debug", "--device", "cpu"])
    assert dry_run(config, typed) == 0
    assert "on the CPU of this machine" in capsys.readouterr().out


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3", "fsdp"])
def test_a_named_strategy_is_obeyed_on_one_process_too(strategy: str) -> None:
    for cluster in (gpus(1), gpus(2), cpus(1), cpus(3)):
        made = plan(cluster, "small", strategy=strategy, strategy_named_by="a file")
        assert made.strategy == strategy
        assert made.reasons[0] == f"strategy {strategy} from a file"


@pytest.mark.parametrize(
    ("cluster", "changes", "parts"),
    [
        (gpus(2), {"strategy": "single"}, ["single, named by --strategy", "2 were started", "zero2"]),
        (gpus(1), {"strategy": "hsdp"}, ["hsdp", "one process", "fsdp"]),
        (gpus(1, nodes=2), {"strategy": "hsdp"}, ["each node has one", "fsdp or zero2"]),
        (gpus(2), {"strategy": "zero2", "deepspeed_available": False}, ["zero2", "pip install deepspeed", "fsdp"]),
        (gpus(2), {"strategy": "fsdp", "mixed_precision": "fp16"}, ["fsdp", "fp16", "bf16", "ddp"]),
        (gpus(2), {"strategy": "zero3", "mixed_precision": "fp16"}, ["zero3", "fp16"]),
        (gpus(2), {"strategy": "fsdp", "offload_optimizer": True}, ["fsdp", "offload", "zero2 or zero3"]),
        (gpus(2), {"offload_optimizer": True, "deepspeed_available": False}, ["pip install deepspeed"]),
        (gpus(2), {"strategy": "fsdp", "eight_bit_moments": True}, ["fsdp", "adamw8bit", "--strategy ddp"]),
        (gpus(2), {"strategy": "zero2", "eight_bit_moments": True}, ["zero2", "adamw8bit", "--strategy ddp"]),
        (gpus(1), {"offload_optimizer": True, "eight_bit_moments": True}, ["adamw8bit", "--offload_optimizer"]),
        (gpus(1), {"offload_optimizer": True, "mixed_precision": "fp16"}, ["--offload_optimizer 1", "fp16"]),
        (cpus(2), {"offload_optimizer": True}, ["--offload_optimizer 1 has no effect on a CPU"]),
        (cpus(1), {"mixed_precision": "fp16"}, ["fp16 needs a GPU"]),
        (replace(gpus(1), supports_bf16=False), {"mixed_precision": "bf16"}, ["no bf16", "fp16 or no"]),
    ],
)
def test_what_contradicts_the_hardware_is_refused(
    cluster: Cluster, changes: dict[str, object], parts: list[str]
) -> None:
    message = refusal(cluster, **changes)
    assert all(part in message for part in parts), message


def test_moments_of_eight_bits_take_six_bytes_a_parameter_less_and_are_never_sharded() -> None:
    for cluster, strategy in ((gpus(1), "single"), (gpus(4), "ddp"), (cpus(2), "ddp")):
        made = plan(cluster, "medium", eight_bit_moments=True)
        plain = plan(cluster, "medium", strategy=strategy)
        assert made.strategy == strategy
        saved = plain.memory.optimizer - made.memory.optimizer
        assert saved == pytest.approx(6 * KNOWN["medium"].parameters, rel=0.01)


def test_a_typed_flag_is_not_overruled_by_memory() -> None:
    message = refusal(gpus(2, 12), "small", batch(1, 1), gradient_checkpointing_typed=True, segment_frames=15000)
    assert "--gradient_checkpointing 1" in message
    assert not plan(gpus(4, 24), "medium", gradient_checkpointing_typed=True).gradient_checkpointing
    assert plan(gpus(4, 80), "medium", gradient_checkpointing=True).gradient_checkpointing


def test_a_refusal_names_memory_by_part_and_what_would_fit() -> None:
    with pytest.raises(MemoryShortError) as caught:
        plan(gpus(2, 12), "large")
    message = str(caught.value)
    assert caught.value.exit_code == EXIT_OUT_OF_MEMORY
    assert all(part in message for part in (*PARTS, "of 12.0 GiB a GPU", "--offload_optimizer 1", "6 such GPUs"))
    # What it says is true, and one GPU fewer would not do.
    assert plan(gpus(2, 12), "large", offload_optimizer=True).offload_optimizer
    assert plan(gpus(6, 12), "large").world_size == 6
    assert "does not fit" in refusal(gpus(5, 12), "large")
    assert "--optimizer adamw8bit" in refusal(gpus(1, 32), "medium", offload_optimizer_typed=True)
    assert plan(gpus(1, 32), "medium", eight_bit_moments=True).strategy == "single"
    assert "no --ema_decay" in refusal(gpus(1, 36), "medium", ema=True, offload_optimizer_typed=True)
    named = refusal(gpus(2, 24), "medium", strategy="ddp")
    assert "--strategy auto" in named and "ddp, micro-batch 1" in named
    longest = refusal(gpus(1, 12), "small", segment_frames=15000, gradient_checkpointing_typed=True)
    seconds = int(longest.split("--segment_seconds ")[1].split(";")[0])
    assert plan(gpus(1, 12), "small", segment_frames=50 * seconds, gradient_checkpointing_typed=True)


def test_no_suggestion_is_made_where_only_larger_gpus_help() -> None:
    assert "only larger GPUs" in refusal(gpus(2, 1.5), "large")


def test_batch_flags_that_contradict_each_other_or_the_checkpoint_are_refused() -> None:
    message = refusal(gpus(2), flags=batch(4, 2, 10, typed=True))
    assert "--global_batch 10 contradicts" in message and "= 16" in message
    assert plan(gpus(2), flags=batch(4, 2, 10)).global_batch == 10
    with pytest.raises(ConfigError, match="--global_batch 10 contradicts the checkpoint's 16"):
        make_plan(gpus(2), KNOWN["small"], batch(4, 2, 10), asked(), 16)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 16])
def test_a_resumed_run_keeps_its_global_batch_on_any_number_of_gpus(world_size: int) -> None:
    made = make_plan(gpus(world_size), KNOWN["small"], batch(4, 2), asked(), 16)
    assert made.global_batch == 16
    assert made.world_size * made.accumulation * made.micro_batch >= 16
    assert any("16 from the checkpoint" in reason for reason in made.reasons)


def test_fillers_are_told() -> None:
    made = plan(gpus(3), flags=batch(4, 2, 16))
    fillers = made.world_size * made.accumulation * made.micro_batch - 16
    assert fillers == 2 and any(reason.startswith("2 filler rows") for reason in made.reasons)


def test_precision_is_chosen_and_told() -> None:
    assert plan(gpus(1)).mixed_precision == "bf16"
    assert plan(replace(gpus(1), supports_bf16=False)).mixed_precision == "no"
    assert plan(cpus(1), mixed_precision="bf16").mixed_precision == "bf16"


def test_the_description_names_every_part() -> None:
    made = plan(gpus(1, 24), "large")
    text = made.describe()
    named = ("strategy zero2 with the optimizer offloaded", "precision bf16", "activation checkpointing on", "of 24.0")
    assert all(part in text for part in (*PARTS, *named, "global batch 8 = 1 x 2 x 4", "codec", "host memory"))
    assert all(reason in text for reason in made.reasons)
    assert "on 2 nodes" in plan(gpus(8, nodes=2)).describe()
    values = json.loads(json.dumps(made.to_dict()))
    assert set(PARTS) < set(values["memory"]) and values["micro_batch"] == made.micro_batch


def asked_by(*words: str, launch: Launch | None = None) -> Request:
    config, typed = parse(["--dataset", "music", *words])
    return request_of(config, typed, launch or Launch(), frame_rate_hz=50, deepspeed_available=True)


def test_flags_become_a_request() -> None:
    assert asked_by() == asked()
    words = "--strategy zero3 --offload_optimizer 1 --gradient_checkpointing 0 --mixed_precision bf16"
    assert asked_by(*words.split()) == asked(
        strategy="zero3",
        offload_optimizer=True,
        offload_optimizer_typed=True,
        gradient_checkpointing_typed=True,
        mixed_precision="bf16",
    )
    config, typed = parse(["--dataset", "music", "--batch_size", "3", "--grad_acc", "5", "--global_batch", "15"])
    assert batch_flags(config, typed) == batch(3, 5, 15, typed=True)


def test_what_the_launchers_configuration_names_counts_like_a_flag() -> None:
    launch = Launch(strategy="zero3", offload_optimizer=True, mixed_precision="bf16")
    got = asked_by(launch=launch)
    assert (got.strategy, got.offload_optimizer, got.mixed_precision) == ("zero3", True, "bf16")
    assert "accelerate configuration" in got.strategy_named_by
    assert asked_by("--strategy", "zero3", launch=launch).strategy_named_by == "--strategy"
    for words in ("--strategy fsdp", "--mixed_precision no", "--offload_optimizer 0"):
        with pytest.raises(ConfigError, match="contradicts"):
            asked_by(*words.split(), launch=launch)


def test_the_table_in_the_docs_is_what_the_plan_says() -> None:
    assert FILE.read_text(encoding="utf-8") == page(), "python scripts/plan_table.py writes it anew"


def test_stereo_and_melody_models_fit_where_the_readme_says() -> None:
    """Stereo models where the mono ones do, melody models where text models of their width do and in a little less."""
    modes = modes_of(Config(dataset_path="music"))

    def fitting(model: str) -> set[tuple[str, int]]:
        return {(name, g) for name, mode in modes.items() for g in ONE_GPU_GIB if plan_of(KNOWN[model], mode, 1, g)}

    fits = {name: fitting(name) for name in PUBLISHED_NAMES}
    for name in ("small", "medium", "large", "melody", "melody-large"):
        assert fits[f"stereo-{name}"] == fits[name], name
    assert fits["melody"] - fits["medium"] == {("all", 12)} and fits["medium"] <= fits["melody"]
    assert fits["melody-large"] - fits["large"] == {("LoRA 16", 8), ("a new word", 8)}
    assert fits["large"] <= fits["melody-large"]


@pytest.mark.parametrize(
    ("model", "smaller"),
    [("stereo-large", "stereo-medium"), ("melody-large", "melody"), ("stereo-melody-large", "stereo-melody")],
)
def test_a_refusal_suggests_a_smaller_model_of_the_same_kind(model: str, smaller: str) -> None:
    """On a CPU with the memory of the smaller one, and 2 GiB more."""
    needed = (28 * KNOWN[smaller].parameters + 2 * GIB) / 0.8 / GIB
    message = refusal(host(needed), model)
    assert f"--model_id {smaller}" in message and message.count("--model_id") == 1, message


def run_dry(*words: str) -> subprocess.CompletedProcess[str]:
    script = (
        "import sys; sys.path.insert(0, '.')\n"
        "from trainer.flags.config import parse; from trainer.plan.dry_run import dry_run\n"
        "code = dry_run(*parse(sys.argv[1:])); heavy = {'torch', 'numpy', 'transformers', 'accelerate'}\n"
        "assert not heavy & set(sys.modules); sys.exit(code)"
    )
    words = ("--dataset", "no/such/folder", "--dry_run", "1", *words)
    return subprocess.run([sys.executable, "-c", script, *words], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_a_dry_run_prints_the_plan_without_loading_anything_heavy() -> None:
    done = run_dry("--model_id", "large", "--nodes", "2", "--gpus", "8", "--gpu_memory_gib", "40")
    assert done.returncode == 0, done.stderr
    assert "strategy fsdp, 16 process(es) on 2 nodes" in done.stdout
    assert "large: 3257.0 M parameters" in done.stdout and "imagined" in done.stdout


@pytest.mark.parametrize("words", ["--gpus 1 --gpu_memory_gib 80", "--gpus 4", "--gpu_memory_gib 24", "--nodes 2"])
def test_dry_runs_of_imagined_clusters_end_with_a_plan_or_a_reason(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for model in KNOWN:
        config, typed = parse(["--dataset", "music", "--dry_run", "1", "--model_id", model, *words.split()])
        try:
            assert dry_run(config, typed) == 0
            assert "strategy " in capsys.readouterr().out
        except MemoryShortError as error:
            assert "What would fit" in str(error)


def test_a_refused_dry_run_says_why() -> None:
    config, typed = parse(["--dataset", "a", "--dry_run", "1", "--gpus", "2", "--strategy", "single"])
    with pytest.raises(ConfigError) as caught:
        dry_run(config, typed)
    assert caught.value.exit_code == EXIT_USAGE


def test_found_gpus_are_planned_for_unless_flags_imagine_others() -> None:
    found = cluster_of_listing("81559, 9.0, NVIDIA H100 80GB HBM3\n40960, 8.0, new card\n")
    assert found is not None
    assert (found.gpus_per_node, found.gpu_memory_bytes, found.supports_bf16) == (2, 40960 * 2**20, True)
    turing = cluster_of_listing("15360, 7.5, Tesla T4\n")
    assert turing is not None and not turing.supports_bf16
    assert cluster_of_listing("") is None and cluster_of_listing("[N/A], 9.0, NVIDIA H200\n") is None
    plain = Config(dataset_path="music", dry_run=True)
    assert cluster_of(plain, found) == (found, "1 x 2 GPU(s) (new card) of 40.0 GiB, found here")
    imagined, words = cluster_of(replace(plain, gpus=4, nodes=3), found)
    assert (imagined.world_size, imagined.gpu_memory_bytes, imagined.host_memory_bytes) == (12, 40 * GIB, None)
    assert "imagined" in words
    alone, words = cluster_of(plain, None)
    assert (alone.world_size, alone.gpu_memory_bytes) == (1, 24 * GIB) and "none was found here" in words


@pytest.mark.parametrize(("model", "gib"), [("small", 8), ("medium", 12), ("large", 24)])
def test_adapters_fit_one_gpu_without_recomputing_or_offload(model: str, gib: int) -> None:
    made = plan(gpus(1, gib), model, selection=selection_of(lora_rank=16))
    assert (made.strategy, made.gradient_checkpointing, made.offload_optimizer) == ("single", False, False)
    # A frozen base of 2 bytes a parameter; gradient and two moments of 4 bytes for each of the adapters'.
    assert made.memory.weights < 2.2 * KNOWN[model].parameters
    adapters = parameters_of(KNOWN[model], selection_of(lora_rank=16)).trained
    assert made.memory.gradients + made.memory.optimizer == 12 * adapters
    assert plan(gpus(8, gib), model, selection=selection_of(lora_rank=16)).strategy == "ddp"


def test_adapters_that_no_gpu_holds_are_sharded_and_suggested_where_they_help() -> None:
    assert plan(gpus(2, 8), "large", selection=selection_of(lora_rank=16)).strategy == "fsdp"
    assert "--lora_rank 16, which trains adapters alone" in refusal(gpus(1, 16), "large")
    assert "--lora_rank 16 --base_bits 4, which trains adapters beside" in refusal(gpus(1, 8), "large")
    assert "--lora_rank" not in refusal(gpus(1, 4), "large")
