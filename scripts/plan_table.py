"""Write docs/plans.md: the plan of each published model on common GPUs.

python scripts/plan_table.py
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from trainer.flags.config import Config
from trainer.plan.allowed_layouts import MOST_CLIPS, ROOMY_SHARE, Job
from trainer.plan.launcher import Launch
from trainer.plan.layout import CAPTION_TOKENS
from trainer.plan.memory import GIB
from trainer.plan.plan import Plan, make_plan
from trainer.plan.refusal import MOST_GPUS_SUGGESTED, is_possible
from trainer.plan.request import Request, batch_flags, request_of
from trainer.plan.strategies import Cluster
from trainer.spec.shapes import FRAME_RATE_HZ, KNOWN, PUBLISHED_NAMES, Shape

FILE = Path(__file__).resolve().parents[1] / "docs" / "plans.md"
MODELS = ("small", "medium", "large")
OTHERS = tuple(name for name in PUBLISHED_NAMES if name not in MODELS)  # stereo and melody, in a shorter form
GPUS = (1, 2, 4, 8)
GPUS_OF_OTHERS = (1, 8)
GPU_GIB = (12, 16, 24, 40, 80)
ONE_GPU_GIB = (8, 12, 16, 24, 48, 80)
RANK = 16

INTRODUCTION = """# Plans

What `launch.py` plans for full fine-tuning with default flags: crops of {seconds:g} s, a global batch of {clips} clips
for each GPU, bf16 with float32 master weights. A micro-batch has {batch_size} clips at most, as `--batch_size` says by
default; where that flag is not given, as here, up to {most} if they fit in {share:.0f} % of the GPU's memory.
These are GPUs without a name. A run, and a dry run with `--gpu_name`, knows the rates of many, and on slow links may
take [another micro-batch](large.md#which-plan).
`python scripts/plan_table.py` writes this page; a test holds it to the code. For any other cluster, model or flags:

    python launch.py --dataset DIR --model_id large --dry_run 1 --nodes 2 --gpus 8 --gpu_memory_gib 40

A cell reads: strategy, micro-batch x accumulation, expected GiB of each GPU. **s**: the activations that cost
little are recomputed (selective checkpointing), for which torch.compile must work. **c**: all activations are
recomputed (checkpointing). **g**: whole weights are gathered once a step and kept until its end; without, fsdp gathers
them for every forward and backward pass. **r**: gradients are summed over GPUs once a step, and whole ones kept until
then; without, zero2 and fsdp sum them after every micro-batch. **o**: the optimizer is in host memory, which must hold
the GiB named. A dash: refused, with the least number of such GPUs that would do, and `offload` where
`--offload_optimizer 1` would. The expectation is a formula (`trainer/plan/memory.py`), with 1 GiB for CUDA, 1 GiB for
each communicator of NCCL (on several GPUs) and 6 % for the allocator's losses included.
"""

MODES = """## What fits one GPU

The modes of training, all else by default; behind `python launch.py --dataset DIR --model_id MODEL`:

| mode | flags |
|---|---|
| all | none |
| all, 8-bit moments | `--optimizer adamw8bit` |
| LoRA {rank} | `--lora_rank {rank} --lr 1e-4` |
| LoRA {rank}, 4 bits | `--lora_rank {rank} --lr 1e-4 --base_bits 4` |
| a new word | `--tune_text 1 --lr 0.1` |

In the last three the base is frozen and held in bf16, or its layers in 4 bits (`--base_bits 4` goes with a new word
too); several GPUs train them with ddp, each as one GPU here.
"""


OTHER_KINDS = """## Stereo and melody

A stereo model has 8 codebooks instead of 4, and with them some more embeddings and heads: up to 4 % more than its mono
one. A melody model has no cross-attention, so that `melody` has 1.39 billion parameters beside the 1.84 of medium, and
its layers compute {places} places more than frames: 235 of the melody, and a caption of {caption} tokens, which few
exceed. The rehearsal before the first step takes the longest caption that there is.
"""

LEAST = """The smallest of these GPUs ({sizes} GiB) on which each mode of training has a plan, alone; **o**: with the
optimizer in host memory. What each mode is stands above.
"""


def page() -> str:
    """The whole page, in Markdown."""
    config = Config(dataset_path="music")
    introduction = INTRODUCTION.format(
        seconds=config.segment_seconds,
        batch_size=config.batch_size,
        clips=config.batch_size * config.grad_acc,
        most=MOST_CLIPS,
        share=ROOMY_SHARE * 100,
    )
    sections = [section(KNOWN[name], config) for name in MODELS]
    return "\n".join([introduction, *sections, modes_of_training(config), other_kinds(config)])


def modes_of(config: Config) -> dict[str, Config]:
    """The modes of training by what the page calls them."""
    return {
        "all": config,
        "all, 8-bit moments": replace(config, optimizer="adamw8bit"),
        f"LoRA {RANK}": replace(config, lora_rank=RANK),
        f"LoRA {RANK}, 4 bits": replace(config, lora_rank=RANK, base_bits=4),
        "a new word": replace(config, tune_text=True),
    }


def modes_of_training(config: Config) -> str:
    """The table of every mode of training on one GPU."""
    rows = [
        f"| {name}, {label} | " + " | ".join(cell(KNOWN[name], mode, 1, gib) for gib in ONE_GPU_GIB) + " |"
        for name in MODELS
        for label, mode in modes_of(config).items()
    ]
    head = "| one GPU of | " + " | ".join(f"{gib} GiB" for gib in ONE_GPU_GIB) + " |"
    return "\n".join([MODES.format(rank=RANK), head, "|---" * (len(ONE_GPU_GIB) + 1) + "|", *rows, ""])


def other_kinds(config: Config) -> str:
    """Stereo and melody: a table of plans on one GPU and on eight, and the least GPU for each mode of training."""
    places = KNOWN["melody"].prefix_places(CAPTION_TOKENS)
    head = "| model, GPUs | " + " | ".join(f"{gib} GiB" for gib in GPU_GIB) + " |"
    rows = [
        f"| {name}, {gpus} | " + " | ".join(cell(KNOWN[name], config, gpus, gib) for gib in GPU_GIB) + " |"
        for name in OTHERS
        for gpus in GPUS_OF_OTHERS
    ]
    modes = modes_of(config)
    least = [
        f"| {name} | " + " | ".join(least_gpu(KNOWN[name], mode) for mode in modes.values()) + " |"
        for name in PUBLISHED_NAMES
    ]
    return "\n".join(
        [
            OTHER_KINDS.format(places=places, caption=CAPTION_TOKENS),
            *(head, "|---" * (len(GPU_GIB) + 1) + "|", *rows, ""),
            LEAST.format(sizes=", ".join(map(str, ONE_GPU_GIB))),
            *("| model | " + " | ".join(modes) + " |", "|---" * (len(modes) + 1) + "|", *least, ""),
        ]
    )


def least_gpu(shape: Shape, config: Config) -> str:
    """The smallest of ONE_GPU_GIB for which there is a plan with one GPU."""
    gib = next(gib for gib in ONE_GPU_GIB if is_planned(shape, config, 1, gib))
    plan = plan_of(shape, config, 1, gib)
    return f"{gib} GiB{' **o**' if plan and plan.offload_optimizer else ''}"


def section(shape: Shape, config: Config) -> str:
    """One model's table: a row for each number of GPUs, a column for each size of them."""
    rows = [f"| {gpus} | " + " | ".join(cell(shape, config, gpus, gib) for gib in GPU_GIB) + " |" for gpus in GPUS]
    head = "| GPUs | " + " | ".join(f"{gib} GiB" for gib in GPU_GIB) + " |"
    title = f"## {shape.name}: {shape.parameters / 1e9:.2f} B parameters"
    return "\n".join([title, "", head, "|---" * (len(GPU_GIB) + 1) + "|", *rows, ""])


def cell(shape: Shape, config: Config, gpus: int, gib: int) -> str:
    """One plan in short; where there is none, a dash and what would help."""
    plan = plan_of(shape, config, gpus, gib)
    if plan is None:
        numbers = range(gpus + 1, MOST_GPUS_SUGGESTED + 1)
        enough = next((more for more in numbers if is_planned(shape, config, more, gib)), None)
        ways = [f"{enough} GPUs"] if enough else []
        offloads = config.optimizer == "adamw"
        if offloads and is_planned(shape, replace(config, offload_optimizer=True), gpus, gib):
            ways.append("offload")
        return f"- ({' or '.join(ways)})" if ways else "-"
    marks = {False: "", True: " **c**", "selective": " **s**"}[plan.gradient_checkpointing]
    marks += " **g**" * plan.layout.gathers_once + " **r**" * plan.layout.reduces_once
    marks += f" **o** {plan.memory.host / GIB:.0f} GiB" if plan.offload_optimizer else ""
    return f"{plan.strategy}, {plan.micro_batch} x {plan.accumulation}, {plan.memory.total / GIB:.1f}{marks}"


def plan_of(shape: Shape, config: Config, gpus: int, gib: int) -> Plan | None:
    """The plan on one node of such GPUs; None where it is refused."""
    if not is_planned(shape, config, gpus, gib):
        return None
    return make_plan(cluster_of(gpus, gib), shape, batch_flags(config, frozenset()), request_for(config))


def is_planned(shape: Shape, config: Config, gpus: int, gib: int) -> bool:
    """Whether there is a plan, found without wording a refusal."""
    job = Job(
        shape=shape,
        request=request_for(config),
        batch_size=config.batch_size,
        batch_size_typed=False,
        global_batch=config.batch_size * config.grad_acc * gpus,
    )
    return is_possible(cluster_of(gpus, gib), job, job.request)


def cluster_of(gpus: int, gib: int) -> Cluster:
    """One node of such GPUs."""
    return Cluster(
        nodes=1,
        gpus_per_node=gpus,
        device="cuda",
        gpu_memory_bytes=gib * GIB,
        host_memory_bytes=None,
        supports_bf16=True,
        compiles=True,
    )


def request_for(config: Config) -> Request:
    """What these flags ask for, none of them typed."""
    return request_of(config, frozenset(), Launch(), frame_rate_hz=FRAME_RATE_HZ, deepspeed_available=True)


if __name__ == "__main__":
    FILE.write_text(page(), encoding="utf-8")
    print(f"wrote {FILE}")
