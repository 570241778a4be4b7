"""The time of a step: near all that was measured on one GPU, and never longer with more GPUs or faster links."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest

from tests.plan.test_plan import asked, batch, gpus, plan
from trainer.errors import ConfigError
from trainer.flags.config import parse
from trainer.plan.allowed_layouts import Job, allowed_layouts, fits
from trainer.plan.dry_run import cluster_of, cluster_of_listing, plan_of, with_link
from trainer.plan.layout import Checkpointing, Layout, Strategy, Workload
from trainer.plan.memory import GIB
from trainer.plan.rates import GPUS
from trainer.plan.strategies import Cluster, common_cluster
from trainer.plan.time import StepTime, link_gb_per_second, step_time
from trainer.spec.shapes import KNOWN
from trainer.spec.trainable import selection_of

FRAMES = 1500
H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"
# docs/benchmarks.md, "On an H100", of 2026-11-23, all of its rows: model, compiled, recomputed, micro-batch, frames a
# second. The last one stands below its table: 0.284 s a step.
MEASURED_H100: list[tuple[str, bool, Checkpointing, int, float]] = [
    ("large", False, False, 4, 19_300),
    ("large", False, True, 16, 19_000),
    ("large", True, False, 5, 23_000),
    ("large", True, "selective", 9, 24_800),
    ("large", True, True, 16, 20_500),
    ("medium", False, False, 9, 34_900),
    ("medium", False, True, 16, 29_200),
    ("medium", True, False, 8, 38_500),
    ("medium", True, "selective", 8, 37_100),
    ("medium", True, "selective", 16, 40_000),
    ("medium", True, True, 8, 27_500),
    ("small", False, False, 8, 98_300),
    ("small", True, False, 8, 110_000),
    ("small", True, False, 16, 146_000),
    ("small", True, "selective", 16, 142_000),
    ("large", True, False, 4, 4 * FRAMES / 0.284),
]
# docs/gpu_checks.md, "the step", of 2026-11-27, as the plan runs it.
MEASURED_H200: list[tuple[str, bool, Checkpointing, int, float]] = [
    ("medium", True, "selective", 16, 43_103),
    ("stereo-medium", True, "selective", 16, 42_772),
]
MEASURED = [(H100, *row) for row in MEASURED_H100] + [(H200, *row) for row in MEASURED_H200]
WITHIN = 0.2  # the aim; the farthest is small in eager layers with 8 clips, 13 % too short


def layout(strategy: Strategy = "single", nodes: int = 1, gpus_per_node: int = 1, **changes: object) -> Layout:
    made = Layout(
        workload=Workload(segment_frames=FRAMES),
        strategy=strategy,
        nodes=nodes,
        world_size=nodes * gpus_per_node,
        on_gpu=True,
        mixed_precision="bf16",
        micro_batch=4,
        accumulation=2,
        compiled=True,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def cluster(of: Layout, name: str = H100, network_gbps: float | None = None) -> Cluster:
    found = gpus(of.world_size // of.nodes, nodes=of.nodes)
    return replace(found, gpu_name=name, network_gbps=network_gbps, compiles=True)


def told(of: Layout, model: str = "large", name: str = H100, network_gbps: float | None = None) -> StepTime:
    time = step_time(KNOWN[model], of, cluster(of, name, network_gbps))
    assert time is not None
    return time


@pytest.mark.parametrize(("name", "model", "compiled", "recomputed", "micro_batch", "frames_per_second"), MEASURED)
def test_a_step_takes_what_was_measured(
    name: str, model: str, compiled: bool, recomputed: Checkpointing, micro_batch: int, frames_per_second: float
) -> None:
    of = layout(compiled=compiled, gradient_checkpointing=recomputed, micro_batch=micro_batch, accumulation=1)
    measured = micro_batch * FRAMES / frames_per_second
    time = step_time(KNOWN[model], of, cluster(of, name), text_tokens=0)
    assert time is not None and time.seconds == pytest.approx(measured, rel=WITHIN)
    assert (time.communication, time.exposed) == (0, 0)


STRATEGIES: list[tuple[Strategy, dict[str, object]]] = [
    ("ddp", {}),
    ("zero2", {}),
    ("zero2", {"reduces_once": True}),
    ("zero3", {}),
    ("fsdp", {}),
    ("fsdp", {"reduces_once": True}),
    ("fsdp", {"gathers_once": True}),
    ("fsdp", {"gathers_once": True, "reduces_once": True}),
    ("hsdp", {"gathers_once": True, "reduces_once": True}),
]


@pytest.mark.parametrize(("strategy", "changes"), STRATEGIES)
@pytest.mark.parametrize("name", [H100, "NVIDIA GeForce RTX 4090"])
def test_more_gpus_never_take_longer_for_a_clip(strategy: Strategy, changes: dict[str, object], name: str) -> None:
    """Of those that have to talk, and over the same links: the second GPU, and the second machine, may cost more."""
    machine = [told(layout(strategy, 1, many, **changes), name=name).seconds / many for many in (2, 3, 4, 6, 8)]
    machines = [told(layout(strategy, many, 8, **changes), name=name).seconds / many for many in (2, 3, 4, 8, 16)]
    # Shards are padded to whole rows, the more so the more there are: by less than one in 2,048 each.
    for times in (machine, machines):
        assert all(more <= 1.001 * fewer for fewer, more in itertools.pairwise(times)), times


@pytest.mark.parametrize(("strategy", "changes"), STRATEGIES)
def test_faster_links_never_take_longer(strategy: Strategy, changes: dict[str, object]) -> None:
    across = [told(layout(strategy, 4, 8, **changes), network_gbps=gbps) for gbps in (10, 25, 100, 400, 1600, 3200)]
    assert all(faster.seconds <= slower.seconds for slower, faster in itertools.pairwise(across))
    assert all(0 < time.exposed <= time.communication for time in across)
    # An A800 is an A100 whose NVLink has two thirds of the links, and nothing else differs.
    within = [told(layout(strategy, 1, 8, **changes), name=name) for name in ("A800", "A100")]
    assert within[0].compute == within[1].compute and within[0].communication > within[1].communication
    assert within[0].seconds >= within[1].seconds


def test_bytes_over_a_slow_network_take_their_time() -> None:
    """facts of large by hand: on 2 machines with one card of 100 Gbit/s, fsdp sends 24 GB for each micro-batch."""
    of = layout("fsdp", 2, 8, accumulation=1)
    # bf16 weights twice and float32 gradients, 15/16 of them, of 3.257 billion parameters, at 0.8 of 12.5 GB/s
    by_hand = 15 / 16 * (2 * 2 + 4) * 3.257e9 / (0.8 * 12.5e9)
    time = told(of, network_gbps=100)
    assert time.communication == pytest.approx(by_hand, rel=0.01)
    assert time.exposed == pytest.approx(by_hand - time.compute, rel=0.05)
    assert told(of).seconds == time.seconds and "100 Gbit/s, assumed" in told(of).source


def test_zero2_waits_for_all_that_it_sends_and_ddp_for_little() -> None:
    zero2, ddp = told(layout("zero2", 1, 8), "medium"), told(layout("ddp", 1, 8), "medium")
    assert zero2.exposed == zero2.communication > 10 * ddp.exposed > 0


def test_what_is_not_trained_costs_no_gradients_and_no_update() -> None:
    of = layout(micro_batch=16)
    adapters = replace(of, workload=replace(of.workload, selection=selection_of(lora_rank=16)))
    assert told(adapters).compute == pytest.approx(2 / 3 * told(of).compute, rel=0.1)
    assert told(adapters).update < 0.02 * told(of).update


def test_slower_ways_to_train_take_longer() -> None:
    of = layout(compiled=False)
    for change in (
        {"gradient_checkpointing": True},
        {"mixed_precision": "no"},
        {"accumulation": 3},
        {"strategy": "zero2", "offload_optimizer": True},
        {"workload": replace(of.workload, ema=True)},
    ):
        assert told(replace(of, **change)).seconds > told(of).seconds, change  # type: ignore[arg-type]
    assert told(replace(of, compiled=True)).seconds < told(of).seconds
    assert told(replace(of, micro_batch=8, accumulation=1)).seconds <= told(of).seconds


def test_shorter_clips_take_less_until_the_host_is_what_is_waited_for() -> None:
    of, machine = layout(micro_batch=16), cluster(layout())
    times = [step_time(KNOWN["small"], of, machine, frames=frames) for frames in (1500, 750, 100, 50)]
    seconds = [time.seconds for time in times if time is not None]
    assert seconds[0] > seconds[1] >= seconds[2] == seconds[3]


def test_nothing_is_expected_of_cpus_and_of_unknown_gpus() -> None:
    assert step_time(KNOWN["small"], layout(), cluster(layout(), "NVIDIA GeForce RTX 4090 Laptop GPU")) is None
    on_cpu = replace(layout(), on_gpu=False)
    assert step_time(KNOWN["small"], on_cpu, cluster(layout())) is None
    unknown = plan(gpus(1), "small")
    assert unknown.time is None and unknown.to_dict()["time"] is None
    assert "expected time of a step: unknown" in unknown.describe() and "--gpu_name H100" in unknown.describe()


def test_the_plan_tells_the_time_and_keeps_it_as_json() -> None:
    made = plan(replace(gpus(8), gpu_name=H100, compiles=True), "large")
    assert made.time is not None
    (line,) = [line for line in made.describe().splitlines() if "time of a step" in line]
    assert f"{made.time.seconds:.2f} s for clips of full length (computing " in line
    assert "waiting for other GPUs" in line
    assert "H100 measured 2026-11-23, NVLink 4 assumed" in line
    kept = json.loads(json.dumps(made.to_dict()))["time"]
    assert StepTime(**kept) == made.time
    assert "waiting" not in plan(replace(gpus(1), gpu_name=H100), "small").describe()


def test_every_card_of_the_table_has_a_time() -> None:
    for gpu in GPUS:
        precision = "bf16" if gpu.bf16 else "no"
        time = told(layout("fsdp", 2, 8, mixed_precision=precision), name=gpu.name)
        assert 0.1 < time.seconds < 1000 and gpu.name in time.source, gpu.name


# Large on 2 machines of 8 GPUs; the layouts that the plan takes decide both times.
SLOW, FAST = 25.0, 3200.0
UNTYPED = replace(batch(), batch_size_typed=False)


def of_machines(network_gbps: float | None, **changes: object) -> Cluster:
    found = replace(gpus(8, 80, nodes=2), gpu_name=H100, compiles=True, network_gbps=network_gbps)
    return replace(found, **changes)  # type: ignore[arg-type]


def test_hsdp_is_taken_by_itself_where_the_network_is_slow_and_both_times_are_told() -> None:
    made = plan(of_machines(SLOW), "large")
    across = plan(of_machines(SLOW), "large", strategy="fsdp")
    assert made.strategy == "hsdp" and across.strategy == "fsdp"  # a strategy that is named is obeyed
    assert made.time is not None and across.time is not None and across.time.seconds > 1.2 * made.time.seconds
    (reason,) = [reason for reason in made.reasons if "hsdp" in reason]
    assert f"{made.time.seconds:.2f} s" in reason and f"{across.time.seconds:.2f} s" in reason
    assert made.time == plan(of_machines(SLOW), "large", strategy="hsdp").time


@pytest.mark.parametrize(
    "elsewhere",
    [
        of_machines(FAST),
        of_machines(SLOW, nodes=1),
        of_machines(SLOW, gpus_per_node=1),
        of_machines(SLOW, gpu_name="new card"),
        of_machines(SLOW, gpu_memory_bytes=12 * GIB),  # hsdp needs 13
    ],
)
def test_fsdp_stays_where_hsdp_would_gain_nothing_or_does_not_fit(elsewhere: Cluster) -> None:
    assert plan(elsewhere, "large").strategy == "fsdp"


def test_few_large_micro_batches_are_taken_where_many_small_ones_would_wait_for_the_network() -> None:
    """By hand: large at micro-batch 1 gathers and sums 24 GB in each of 8 micro-batches, over 2.5 GB/s."""
    tight = of_machines(SLOW, gpu_memory_bytes=12 * GIB)
    usual, made = (plan(replace(tight, gpu_name=name), "large", UNTYPED) for name in ("", H100))
    assert (usual.micro_batch, usual.accumulation, usual.gradient_checkpointing) == (1, 8, False)
    assert (made.micro_batch, made.accumulation, made.gradient_checkpointing) == (8, 1, True)
    slow = step_time(KNOWN["large"], usual.layout, tight)
    assert made.time is not None and slow is not None
    assert slow.seconds == pytest.approx(8 * 24.4 / 2.5, rel=0.05) and slow.seconds > 7 * made.time.seconds
    (reason,) = [reason for reason in made.reasons if "a step should take" in reason]
    assert f"{made.time.seconds:.2f} s" in reason and f"{slow.seconds:.2f} s" in reason
    assert not any("because memory is short" in reason for reason in made.reasons)
    # What is typed stays: the bound of a micro-batch, and what is recomputed.
    assert plan(tight, "large", batch(2, 4)).micro_batch == 2
    assert plan(tight, "large", UNTYPED, gradient_checkpointing_typed=True).gradient_checkpointing is False


def test_of_plans_that_fit_none_is_much_faster_with_the_same_strategy() -> None:
    for name, gib, nodes, model in (
        *(("RTX 4090", 24, 1, "large"), ("A10", 22, 1, "large"), ("RTX 4080", 16, 2, "melody")),
        *(("A10", 22, 2, "medium"), ("A100", 80, 2, "large"), ("H100", 80, 1, "small")),
    ):
        machines = replace(gpus(4, gib, nodes=nodes), gpu_name=name, compiles=True)
        made = plan(machines, model, UNTYPED)
        job = Job(
            shape=KNOWN[model], request=asked(), batch_size=4, batch_size_typed=False, global_batch=made.global_batch
        )
        fastest = min(
            time.seconds
            for one in allowed_layouts(machines, job)
            if fits(machines, one)
            and one.layout.strategy == made.strategy
            and (time := step_time(KNOWN[model], one.layout, machines))
        )
        assert made.time is not None and made.time.seconds < 1.2 * fastest, (name, model)


def test_zero2_is_not_replaced_where_it_fits() -> None:
    assert plan(of_machines(SLOW), "medium").strategy == "zero2"


def test_machines_that_differ_expect_the_slowest_gpu_and_network() -> None:
    common = common_cluster([of_machines(400), of_machines(100, gpu_name="NVIDIA H100 PCIe")])
    assert (common.gpu_name, common.network_gbps) == ("NVIDIA H100 PCIe", 100)
    assert common_cluster([of_machines(400), of_machines(None)]).network_gbps is None
    assert link_gb_per_second(common) == pytest.approx(10)
    assert link_gb_per_second(cluster(layout("ddp", 1, 8))) == pytest.approx(360)
    assert link_gb_per_second(of_machines(400, gpu_name="new card")) is None


def imagined(*words: str, found: Cluster | None = None) -> Cluster:
    config, _ = parse(["--dataset", "music", "--dry_run", "1", *words])
    return with_link(config, cluster_of(config, found)[0])


def test_a_dry_run_imagines_a_gpu_by_its_name_and_its_memory_with_it() -> None:
    h100 = imagined("--gpu_name", "h100", "--gpus", "8")
    assert (h100.gpu_name, h100.gpu_memory_bytes, h100.gpus_per_node) == ("H100", 80 * GIB, 8)
    assert imagined("--gpu_name", "H100", "--gpu_memory_gib", "70").gpu_memory_bytes == 70 * GIB
    assert not imagined("--gpu_name", "V100").supports_bf16
    with pytest.raises(ConfigError, match="--gpu_name 'H1000'"):
        imagined("--gpu_name", "H1000")
    config, typed = parse(["--dataset", "music", "--dry_run", "1", "--gpu_name", "RTX 4090"])
    made = plan_of(config, typed, cluster_of(config, None)[0], KNOWN["small"])
    assert made.time is not None and "RTX 4090 assumed" in made.describe()


def test_gpus_that_are_found_keep_their_name_unless_others_are_imagined() -> None:
    found = cluster_of_listing(f"81559, 9.0, {H100}\n81559, 9.0, {H100}\n")
    assert found is not None and found.gpu_name == H100
    assert imagined("--gpus", "4", found=found).gpu_name == H100
    assert imagined("--gpu_memory_gib", "24", found=found).gpu_name == ""
    assert imagined("--gpu_name", "L4", found=replace(found, network_gbps=400)).network_gbps is None
    mixed = cluster_of_listing(f"81559, 9.0, {H100}\n23034, 8.9, NVIDIA L4\n")
    assert mixed is not None and (mixed.gpu_name, mixed.gpu_memory_bytes) == ("NVIDIA L4", 23034 * 2**20)


def test_the_rate_of_the_network_acts_and_is_refused_where_it_would_not() -> None:
    words = ("--gpu_name", "H100", "--gpus", "8", "--nodes", "2")
    for gbps, strategy in (("3200", "fsdp"), ("25", "hsdp")):
        config, typed = parse(
            ["--dataset", "music", "--dry_run", "1", "--model_id", "large", *words, "--link_gbps", gbps]
        )
        made = plan_of(config, typed, cluster_of(config, None)[0], KNOWN["large"])
        assert made.strategy == strategy and f"a network of {gbps} Gbit/s" in made.describe()
    with pytest.raises(ConfigError, match="--link_gbps 100 has no effect on one machine"):
        imagined("--link_gbps", "100", "--gpu_name", "H100")
    with pytest.raises(ConfigError, match="add --gpu_name"):
        imagined("--link_gbps", "100", "--nodes", "2")
    config, _ = parse(["--dataset", "music", "--link_gbps", "100"])
    with pytest.raises(ConfigError, match="has no effect on CPUs"):
        with_link(config, replace(of_machines(None), device="cpu"))
    with pytest.raises(ConfigError, match="has no effect on new card"):
        with_link(config, of_machines(None, gpu_name="new card"))
    assert with_link(config, of_machines(400)).network_gbps == 100  # typed, it is over what was found


def test_rates_change_how_a_step_is_computed_and_never_what_is() -> None:
    """A run with another --link_gbps is the same run: its checkpoints go on, and its steps have the same clips."""
    from types import SimpleNamespace

    from trainer.flags.config import Config
    from trainer.model.source import open_model
    from trainer.wiring import identity_of

    made = [plan(of_machines(gbps), "large", batch(4, 2)) for gbps in (SLOW, FAST)]
    assert made[0].strategy != made[1].strategy and made[0].global_batch == made[1].global_batch
    data, source = SimpleNamespace(clips=1, digest="d"), open_model("debug")
    told, untold = (Config(dataset_path="music", link_gbps=gbps) for gbps in (SLOW, None))
    assert identity_of(told, source, data) == identity_of(untold, source, data)  # type: ignore[arg-type]
