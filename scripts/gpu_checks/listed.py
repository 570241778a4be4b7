"""Every check that needs a GPU, the most valuable first. A claim that only a GPU can show gets an entry here."""

from __future__ import annotations

from gpu_checks.check import Check
from gpu_checks.of_rates import CHECKS_OF_RATES
from gpu_checks.of_speed import CHECKS_OF_SPEED

BITS = "tests/gpu/test_base_bits.py"
CUDA = "tests/gpu/test_cuda.py"
RANKS = "tests/gpu/test_ranks_on_one_card.py"
RUNS = "tests/gpu/test_whole_runs.py"
WORLDS = "tests/gpu/test_fake_worlds.py"
START = "tests/gpu/test_start.py"
PRECISIONS = "tests/gpu/test_precisions.py"
SAMPLING = "tests/gpu/test_sampling.py"
WAITING = "tests/gpu/test_waiting.py"

RESUMED = f"{BITS}::test_a_resumed_run_goes_on_bit_for_bit"
MEMORY = f"{CUDA}::test_memory_is_what_the_plan_expects"
EQUAL = f"{RANKS}::test_ranks_that_share_a_card_give_the_numbers_of_one_process"
SOUND = f"{SAMPLING}::test_a_sound_takes_what_the_plan_says_and_leaves_nothing"
LOST = f"{RUNS}::test_a_lost_rank_ends_the_other_in_time_with_a_message"
TOLD = f"{RUNS}::test_sigterm_to_one_rank_ends_both_with_a_checkpoint_and_another_strategy_goes_on"
WORLD = f"{WORLDS}::test_a_rank_of_a_large_world_needs_what_the_plan_says"
BF16 = f"{CUDA}::test_strategies_give_the_losses_of_one_eager_process_in_bf16"


def _equal(case: str, *needs: str) -> Check:
    ranks = 4 if "4 ranks" in case else 2
    return Check(
        name=f"equal numbers: {case}",
        claim=f"{ranks} ranks that share the card over NCCL give losses and norms of one process",
        test=f"{EQUAL}[{case}]",
        usual_seconds=75 if "compiled" in case else 40 + 5 * ranks,
        gib=2.5 * ranks,
        needs=needs,
    )


def _memory(size: str, strategy: str, micro_batch: int, way: str, gib: float, seconds: int) -> Check:
    return Check(
        name=f"memory: {size} {strategy} {way}",
        claim=f"the peak of {micro_batch} clips of 30 s is within 10 % of the plan's",
        test=f"{MEMORY}[{size}-{strategy}-{micro_batch}-{way}]",
        usual_seconds=seconds,
        gib=gib,
        needs=("deepspeed",) if strategy.startswith("zero") else (),
    )


def _bf16(strategy: str, way: str) -> Check:
    return Check(
        name=f"bf16: small {strategy} {way}",
        claim="the losses of one eager process, to bf16's rounding",
        test=f"{BF16}[{strategy}-{way}]",
        usual_seconds=50,
        gib=12,
        needs=("deepspeed",) if strategy.startswith("zero") else (),
    )


def _sound(size: str, strategy: str, gib: float) -> Check:
    return Check(
        name=f"sounds: {size} {strategy}",
        claim="beside a run, the peak of 10 s of sound is at most the plan's, and nothing is left of it",
        test=f"{SOUND}[{size}-{strategy}]",
        usual_seconds=90,
        gib=gib,
    )


def _world(case: str, gib: float, *needs: str) -> Check:
    return Check(
        name=f"one rank: {case}",
        claim="its peak is within 10 % of the plan's; and how long the host needs for a step",
        test=f"{WORLD}[{case}]",
        usual_seconds=60,
        gib=gib,
        alone=True,
        needs=needs,
    )


CHECKS: tuple[Check, ...] = (
    *(
        Check(
            name=f"resumption: {'bf16' if bits == 0 else f'{bits} bits'}",
            claim="adapters of small go on bit for bit after a resumption",
            test=f"{RESUMED}[{bits}]",
            usual_seconds=35,
            gib=6,
            needs=("bitsandbytes",) if bits else (),
        )
        for bits in (4, 8, 0)
    ),
    _memory("small", "single", 4, "compiled", 14, 40),
    _memory("medium", "single", 8, "selective", 50, 50),
    _memory("large", "single", 4, "selective", 70, 75),
    _memory("melody", "single", 4, "eager", 48, 38),
    _memory("stereo-medium", "single", 2, "eager", 46, 40),
    _sound("small", "single", 14),
    _sound("medium", "fsdp", 50),
    _equal("ddp 2 ranks"),
    _equal("zero2 2 ranks", "deepspeed"),
    _equal("fsdp 2 ranks"),
    _equal("zero3 2 ranks", "deepspeed"),
    _equal("fsdp stereo-melody 2 ranks"),
    _equal("zero2 melody 2 ranks", "deepspeed"),
    _equal("ddp stereo 2 ranks"),
    _equal("zero3 melody 2 ranks bf16", "deepspeed"),
    _equal("fsdp melody 2 ranks compiled bf16"),
    *(
        Check(
            name=f"a lost rank: {number} to rank {rank}",
            claim="the other ends with a message and exit_code 1, within --timeout_minutes",
            test=f"{LOST}[{number}-{rank}]",
            usual_seconds=120 if number == "SIGKILL" else 160,
            gib=5,
        )
        for number, rank in (("SIGKILL", 1), ("SIGKILL", 0), ("SIGSTOP", 1), ("SIGSTOP", 0))
    ),
    *(
        Check(
            name=f"in CUDA: {'one killed, the other told to stop' if lost else 'both told to stop'}",
            claim="main threads wait in CUDA; each process ends in time with a message and the right exit_code",
            test=f"{RUNS}::test_ranks_that_wait_in_cuda_end_before_the_launcher_kills[{lost}]",
            usual_seconds=95,
            gib=5,
        )
        for lost in (True, False)
    ),
    *(
        Check(
            name=f"a stop: SIGTERM to rank {rank}",
            claim="both ranks save after the same step and end with 75; one process continues with the same losses",
            test=f"{TOLD}[{rank}]",
            usual_seconds=90,
            gib=5,
        )
        for rank in (1, 0)
    ),
    *(
        Check(
            name=f"a whole run: {strategy} 2 ranks",
            claim="launch.py from start to exports, with the losses of one process",
            test=f"{RUNS}::test_a_run_from_start_to_exports[{strategy}]",
            usual_seconds=115,
            gib=5,
            needs=("deepspeed",) if strategy == "zero2" else (),
        )
        for strategy in ("fsdp", "zero2")
    ),
    *(
        Check(
            name=f"a step with NaN: {strategy} bf16",
            claim="gradients that are NaN on one rank change no weight and no moment on any",
            test=f"{START}::test_a_bf16_step_with_nan_gradients_on_one_rank_changes_nothing_on_any[{strategy}]",
            usual_seconds=40,
            gib=5,
            needs=("deepspeed",),
        )
        for strategy in ("zero2", "zero3")
    ),
    Check(
        name="one GPU shown to each process",
        claim="it is taken, whatever the local rank; two processes with the same GPU are refused",
        test=f"{START}::test_a_process_that_is_shown_one_gpu_takes_it_and_two_with_the_same_one_are_refused",
        usual_seconds=45,
        gib=3,
    ),
    Check(
        name="a GPU that is hidden",
        claim="one warning names the cause; a real model is refused before anything is fetched",
        test=f"{START}::test_a_gpu_that_is_hidden_is_warned_of_and_a_real_model_is_refused",
        usual_seconds=45,
        gib=0,
    ),
    *(
        Check(
            name=f"groups: {strategy} {ranks} ranks",
            claim="as many as planned, with 2 minutes more than --timeout_minutes, in the memory that the plan leaves",
            test=f"{START}::test_groups_and_their_memory_are_those_of_the_plan[{strategy}-{ranks}-{nodes}]",
            usual_seconds=35 + 5 * ranks,
            gib=2.5 * ranks,
            alone=True,
            needs=("deepspeed",) if strategy.startswith("zero") else (),
        )
        for strategy, ranks, nodes in (("fsdp", 2, 1), ("zero2", 2, 1), ("zero3", 2, 1), ("hsdp", 4, 2))
    ),
    Check(
        name="a GPU that another process fills",
        claim="the run is refused with what holds the memory",
        test=f"{START}::test_a_card_that_another_process_fills_is_refused_by_name",
        usual_seconds=40,
        gib=4,
        alone=True,
    ),
    *(_equal(f"{strategy} 2 ranks bf16") for strategy in ("fsdp", "ddp")),
    *(_equal(f"{strategy} 2 ranks bf16", "deepspeed") for strategy in ("zero2", "zero3")),
    *(_equal(f"{strategy} 2 ranks compiled") for strategy in ("fsdp", "ddp")),
    _equal("zero2 2 ranks compiled", "deepspeed"),
    Check(
        name="checkpoints: zero2 2 ranks",
        claim="weights after 12 steps are those of one process",
        test=f"{RUNS}::test_checkpoints_of_two_ranks_are_the_values_of_one_process",
        usual_seconds=80,
        gib=5,
        needs=("deepspeed",),
    ),
    _equal("hsdp 4 ranks"),
    _equal("hsdp 4 ranks bf16"),
    _equal("fsdp 4 ranks"),
    _equal("zero2 4 ranks", "deepspeed"),
    _equal("fsdp 2 ranks once"),
    _equal("fsdp 2 ranks bf16 once"),
    _equal("fsdp 2 ranks compiled bf16 once"),
    _equal("hsdp 4 ranks once"),
    _equal("zero2 2 ranks once", "deepspeed"),
    _equal("zero2 2 ranks bf16 once", "deepspeed"),
    _equal("zero2 2 ranks compiled bf16 once", "deepspeed"),
    _world("large fsdp on 8 ranks", 30),
    _world("large fsdp on 64 ranks", 30),
    _world("medium zero2 on 8 ranks", 30, "deepspeed"),
    _world("large hsdp on 16 ranks of 2 machines", 30),
    _world("large fsdp on 8 ranks once", 45),
    _world("large hsdp on 16 ranks of 2 machines once", 45),
    *(
        Check(
            name=f"waiting: {strategy} {ranks} ranks {precision}{' compiled' * compiled}",
            claim="the host waits for the device once in a step, for results copied before AdamW, and after its launch",
            test=f"{WAITING}::test_the_host_waits_once_in_a_step_and_after_adamw_was_launched"
            f"[{strategy}-{ranks}-{precision}-{compiled}]",
            usual_seconds=75 if compiled else 30 + 5 * ranks,
            gib=2.5 * ranks,
        )
        for strategy, ranks, precision, compiled in (
            *(("single", 1, "no", False), ("single", 1, "bf16", True), ("ddp", 2, "no", False)),
            *(("fsdp", 2, "no", False), ("fsdp", 2, "bf16", False)),
        )
    ),
    _world("medium zero2 on 8 ranks once", 35, "deepspeed"),
    *CHECKS_OF_SPEED,
    *CHECKS_OF_RATES,
    Check(
        name="allocator",
        claim="with blocks that may grow, clips of many lengths lose at most the 6 % that the plan assumes",
        test=f"{START}::test_blocks_that_may_grow_lose_less_memory_to_lengths",
        usual_seconds=90,
        gib=30,
    ),
    *(
        Check(
            name=f"offload: {strategy}",
            claim="the numbers of an optimizer on the device",
            test=f"{PRECISIONS}::test_an_offloaded_optimizer_gives_the_numbers_of_one_on_the_device[{strategy}]",
            usual_seconds=45,
            needs=("deepspeed",),
        )
        for strategy in ("zero2", "zero3")
    ),
    Check(
        name="adamw8bit",
        claim="losses near those of float32 moments, in a quarter of their bytes",
        test=f"{PRECISIONS}::test_moments_of_8_bits_learn_alike_in_a_quarter_of_the_memory",
        usual_seconds=35,
        needs=("bitsandbytes",),
    ),
    Check(
        name="fp16",
        claim="losses near float32's, with loss scaling",
        test=f"{PRECISIONS}::test_fp16_with_its_loss_scaling_stays_near_float32",
        usual_seconds=35,
    ),
    *(
        _bf16(strategy, way)
        for strategy, way in (
            ("zero2", "selective"),
            ("fsdp", "selective"),
            ("fsdp", "compiled"),
            ("single", "selective"),
            ("zero2", "eager"),
            ("fsdp", "eager"),
        )
    ),
    *(
        Check(
            name=f"memory: {size} beside a base in {bits} bits",
            claim="peak and weights are the plan's, and the loss falls",
            test=f"{BITS}::test_memory_is_what_the_plan_expects_and_the_loss_falls[{size}-{bits}]",
            usual_seconds=45,
            gib=10,
            needs=("bitsandbytes",),
        )
        for size in ("small", "medium")
        for bits in (4, 8)
    ),
    *(
        Check(
            name=f"products: {bits} bits {dtype}",
            claim="a product with rounded weights and its gradient are those of the codes' values",
            test=f"{BITS}::test_a_product_and_its_gradient_are_those_of_the_codes_values[{bits}-dtype{number}]",
            usual_seconds=20,
            gib=1,
            needs=("bitsandbytes",),
        )
        for bits in (4, 8)
        for number, dtype in enumerate(("bfloat16", "float16", "float32"))
    ),
    Check(
        name="4 bits: near bf16, and ddp",
        claim="losses beside a base in 4 bits are near those beside bf16's; ddp gives the same",
        test=f"{BITS}::test_losses_are_near_those_beside_a_base_in_bf16_and_ddp_gives_the_same",
        usual_seconds=80,
        gib=6,
        needs=("bitsandbytes",),
    ),
    Check(
        name="4 bits: compiled",
        claim="compiled layers give the same losses",
        test=f"{BITS}::test_compiled_layers_give_the_same_losses",
        usual_seconds=70,
        gib=6,
        needs=("bitsandbytes",),
    ),
    Check(
        name="4 and 8 bits: a whole run",
        claim="a run resumes with other bits, and exports the unrounded base with its adapters",
        test=f"{BITS}::test_a_run_resumes_with_other_bits_and_exports_the_unrounded_base_with_its_adapters",
        usual_seconds=70,
        gib=4,
        needs=("bitsandbytes",),
    ),
    _memory("small", "single", 4, "eager", 14, 35),
    _memory("small", "zero2", 4, "eager", 16, 40),
    _memory("small", "fsdp", 4, "eager", 14, 40),
    _memory("small", "fsdp", 4, "selective", 14, 40),
    _memory("medium", "single", 2, "eager", 40, 45),
    _memory("medium", "fsdp", 2, "recomputing", 40, 45),
    _memory("large", "single", 1, "recomputing", 62, 70),
    _memory("large", "fsdp", 1, "recomputing", 70, 70),
    _memory("melody", "single", 8, "selective", 48, 50),
    _memory("stereo-small", "single", 4, "compiled", 15, 40),
    _memory("stereo-melody", "fsdp", 2, "recomputing", 26, 40),
)
