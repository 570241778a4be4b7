"""Write docs/communication.md: the bytes that GPUs send each other in a step, for each strategy.

python scripts/traffic_table.py
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from trainer.plan.communication import Sent, Traffic, traffic
from trainer.plan.layout import Layout, Strategy, Workload
from trainer.spec.shapes import KNOWN, Shape, segment_frames
from trainer.spec.trainable import selection_of

FILE = Path(__file__).resolve().parents[1] / "docs" / "communication.md"
MODELS = ("small", "medium", "large")
GPUS = (2, 4, 8)
MACHINES, GPUS_OF_A_MACHINE = 2, 8
ACCUMULATIONS = (1, 2)
MEGA, GIGA = 10**6, 10**9

INTRODUCTION = """# What GPUs send to each other

The gigabytes (10^9 bytes) that one GPU sends in an optimizer step, and as many it receives: for full fine-tuning in
bf16 with float32 master weights, by formulas of the model's shape and the layout (`trainer/plan/communication.py`,
where the lines of DeepSpeed, torch and accelerate stand that they come from). `python scripts/traffic_table.py` writes
this page; a test holds it to the code, and `tests/ranks/test_bytes_moved.py` counts what the libraries really give to
the process groups, with the debug model on 2 and 4 processes over gloo. On several GPUs nothing of this was timed.

**How it is counted.** The bytes of the tensors that the collectives are given, padding included, times what a ring of
n GPUs makes of them: (n-1)/n for gathering them, for reducing them by shares or to one GPU each, and 2 (n-1)/n for
reducing them to all. The length of the clips and their number do not matter, the number of micro-batches in a step
(`accumulation`) does. The few bytes of losses and norms are left out.

**Several machines.** A ring over all GPUs enters and leaves each machine once, whatever the number of its GPUs. So a
machine sends to the others what one of its GPUs sends in the ring: for zero2, zero3, fsdp and ddp the two last columns
equal the two before. Under hsdp each GPU sends its own shard, so that a machine sends those of all its GPUs.

## What each strategy sends, and when

{strategies}

- **What is not trained has no gradients**, and nothing of it is reduced or sent back. zero3 and fsdp gather it all the
  same, for their weights are shared out whether they are trained or not: one reason why adapters and a new word go by
  ddp, which sends nothing but their gradients ({lora:.0f} MB a step for LoRA of rank 16 on `large` and 8 GPUs).
- **zero2's reductions wait.** Without `overlap_comm` DeepSpeed reduces in the stream that computes. With it, it would
  wait for the whole device before each reduction to a single owner.
- **fsdp keeps what lies outside the layers** (embeddings, heads, projection) from a forward pass to its backward pass,
  so that it is gathered once for both; layers are gathered for each. zero3 keeps up to 200 million parameters so.
- Of several possibilities the plan takes what memory allows ([plans.md](plans.md)).

## Before and after

"before" is what the libraries do by default, and what this trainer did until 2026-11-27: zero2 reduced all gradients to
all GPUs in every micro-batch (DeepSpeed 0.19 has no reduction by shares in stage 2, whatever `reduce_scatter` says);
fsdp gathered and reduced in every micro-batch, which it still does where memory is short; and hsdp sent gradients
between machines in every micro-batch. A dash: with one micro-batch there is nothing to be done once instead of twice.
"""

BACKWARD, LAST = "in every backward pass", "in the backward pass of the step's last micro-batch"
BOTH_PASSES = "in every forward and every backward pass"
COMPUTED, MEANWHILE = "that of the computation", "yes, the rest of that backward pass"
STRATEGIES = (
    ("", "what", "when", "precision", "is anything computed meanwhile"),
    ("---",) * 5,
    ("`ddp`", "gradients, reduced to all GPUs", LAST, "float32", MEANWHILE),
    (
        *("`zero2`", "gradients, each share reduced to the GPU that owns it"),
        *(f'{BACKWARD}; "reduced once": after the last', "float32", "no"),
    ),
    ("", "updated weights, from each owner to all", "after the update", COMPUTED, "no"),
    ("`zero3`", "weights, gathered parameter by parameter", BOTH_PASSES, COMPUTED, "yes: they are gathered ahead"),
    ("", "gradients, reduced by shares", BACKWARD, "float32", MEANWHILE),
    (
        *("`fsdp`", "weights, gathered layer by layer"),
        *(f'{BOTH_PASSES}; "gathered once": in the step\'s first forward pass', COMPUTED),
        "yes: the next layer is gathered ahead",
    ),
    ("", "gradients, reduced by shares", f'{BACKWARD}; "reduced once": in the step\'s last', "float32", MEANWHILE),
    ("`hsdp`", "within a machine as fsdp, and besides", "", "", ""),
    ("", "shards of gradients, reduced to all machines", LAST, "float32", MEANWHILE),
)

GATHERS, REDUCES = "gathers_once", "reduces_once"
Columns = dict[str, tuple[Strategy, tuple[str, ...] | None]]
# What stands above a column, with the strategy and which of the layout's fields are on; None: what the libraries do by
# default.
ON_ONE_MACHINE: Columns = {
    "ddp": ("ddp", ()),
    "zero2 before": ("zero2", None),
    "zero2": ("zero2", ()),
    "zero2, reduced once": ("zero2", (REDUCES,)),
    "zero3": ("zero3", ()),
    "fsdp": ("fsdp", ()),
    "fsdp, gathered once": ("fsdp", (GATHERS,)),
    "fsdp, both once": ("fsdp", (GATHERS, REDUCES)),
}
ON_TWO: Columns = ON_ONE_MACHINE | {
    "hsdp before": ("hsdp", None),
    "hsdp": ("hsdp", ()),
    "hsdp, gathered once": ("hsdp", (GATHERS,)),
    "hsdp, both once": ("hsdp", (GATHERS, REDUCES)),
}


def page() -> str:
    """The whole page, in Markdown."""
    lora = Workload(segment_frames=segment_frames(30), selection=selection_of(lora_rank=16))
    sent = traffic(KNOWN["large"], replace(layout_of("ddp", 8, 1), workload=lora)).by_gpu
    strategies = "\n".join(f"| {' | '.join(row)} |" for row in STRATEGIES)
    introduction = INTRODUCTION.format(lora=sent / MEGA, strategies=strategies)
    return "\n".join([introduction, *(section(KNOWN[name]) for name in MODELS)])


def section(shape: Shape) -> str:
    """One model's two tables."""
    head = "| GPUs x accumulation | " + " | ".join(ON_ONE_MACHINE) + " |"
    rows = [
        f"| {gpus} x {times} | " + " | ".join(cell(shape, column, gpus, times) for column in ON_ONE_MACHINE) + " |"
        for times in ACCUMULATIONS
        for gpus in GPUS
    ]
    one = [head, "|---" * (len(ON_ONE_MACHINE) + 1) + "|", *rows, ""]
    where = ("a GPU", "a machine to the other")
    wide = [f"{who}, accumulation {times}" for who in where for times in ACCUMULATIONS]
    rows = [f"| {column} | " + " | ".join(cells_of_two_machines(shape, column)) + " |" for column in ON_TWO]
    title = f"{MACHINES} machines of {GPUS_OF_A_MACHINE} GPUs"
    two = [f"| {title} | " + " | ".join(wide) + " |", "|---" * (len(wide) + 1) + "|", *rows, ""]
    return "\n".join([f"## {shape.name}: {shape.parameters / GIGA:.2f} B parameters", "", *one, *two])


def cell(shape: Shape, column: str, gpus: int, accumulation: int) -> str:
    """Gigabytes that one GPU sends on one machine."""
    found = sent_by(shape, column, gpus, accumulation)
    return "-" if found is None else gigabytes(found.by_gpu)


def cells_of_two_machines(shape: Shape, column: str) -> list[str]:
    """Gigabytes that one GPU sends, and that one machine sends to the other, for each accumulation."""
    gpus = MACHINES * GPUS_OF_A_MACHINE
    found = [sent_by(shape, column, gpus, times, MACHINES) for times in ACCUMULATIONS]
    by_gpu = ["-" if sent is None else gigabytes(sent.by_gpu) for sent in found]
    return by_gpu + ["-" if sent is None else gigabytes(sent.across) for sent in found]


def sent_by(shape: Shape, column: str, gpus: int, accumulation: int, nodes: int = 1) -> Traffic | None:
    """What is sent by a column's strategy; None where the column makes no difference."""
    strategy, fields = ON_TWO[column]
    layout = layout_of(strategy, gpus, accumulation, nodes)
    if fields is None:
        return by_the_libraries_defaults(shape, layout)
    if REDUCES in fields and accumulation == 1:
        return None
    return traffic(shape, replace(layout, gathers_once=GATHERS in fields, reduces_once=REDUCES in fields))


def layout_of(strategy: Strategy, gpus: int, accumulation: int, nodes: int = 1) -> Layout:
    return Layout(
        workload=Workload(segment_frames=segment_frames(30)),
        strategy=strategy,
        nodes=nodes,
        world_size=gpus,
        on_gpu=True,
        mixed_precision="bf16",
        micro_batch=4,
        accumulation=accumulation,
    )


def by_the_libraries_defaults(shape: Shape, layout: Layout) -> Traffic:
    """What would be sent if the libraries did as they do by default: zero2 would reduce all gradients to all GPUs, in
    every micro-batch, and hsdp shards among the machines in every micro-batch."""
    found = traffic(shape, replace(layout, gathers_once=False, reduces_once=False))
    if layout.strategy == "zero2":
        return replace(found, reduced=times(found.reduced, 2))
    return replace(found, spread=times(found.spread, layout.accumulation))


def times(sent: Sent, number: int) -> Sent:
    """The same so often."""
    parts = {name: number * getattr(sent, name) for name in ("by_gpu", "within", "across")}
    return replace(sent, **parts)


def gigabytes(number: int) -> str:
    return f"{number / GIGA:.1f}"


if __name__ == "__main__":
    FILE.write_text(page(), encoding="utf-8")
    print(f"wrote {FILE}")
