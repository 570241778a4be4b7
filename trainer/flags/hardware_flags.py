"""The flags of the hardware: which of it is used, how a model is spread over it, and what is only imagined of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

from trainer.flags.flag import Flag

hardware = partial(Flag, "hardware")


@dataclass(frozen=True, kw_only=True)
class HardwareFlags:
    """The section "hardware" of the flags; `Config` has all sections."""

    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        hardware(
            "cuda: the GPUs; cpu: the CPU, as with accelerate's --cpu; auto: the GPUs that torch can use, and where "
            "there is none the CPU, for models of up to 100 million parameters."
        ),
    ] = "auto"
    strategy: Annotated[
        Literal["auto", "single", "ddp", "zero2", "zero3", "fsdp", "hsdp"],
        hardware("How the model is spread over GPUs; auto: by its size and the GPUs' memory."),
    ] = "auto"
    offload_optimizer: Annotated[
        bool, hardware("Keep optimizer state in host memory (zero2, zero3): less GPU memory, slower steps.")
    ] = False
    mixed_precision: Annotated[
        Literal["auto", "no", "bf16", "fp16"],
        hardware(
            "Precision of the computation; auto: bf16 where the GPU has it, else no. Trained weights and the loss stay "
            "float32."
        ),
    ] = "auto"
    gradient_checkpointing: Annotated[
        Literal["0", "1", "selective"],
        hardware(
            "1: recompute activations in the backward pass: less memory, slower steps, same numbers; selective: only "
            "what is cheap, of compiled layers: about 0.6 of the memory, some percent slower. Where the flag is not "
            "given, the plan chooses what the memory needs."
        ),
    ] = "0"
    compile: Annotated[
        Literal["auto", "0", "1"],
        hardware(
            "1: compile the decoder's layers with torch.compile: the first step takes up to a minute longer, later "
            "ones less; auto: on a GPU where that works, not with zero3; 0: never."
        ),
    ] = "auto"
    timeout_minutes: Annotated[
        float,
        hardware(
            "Minutes that the other processes wait for one before the run ends; one without a sign of life ends it "
            "after 75 s at most.",
            above=0,
        ),
    ] = 10.0
    dry_run: Annotated[
        bool,
        hardware(
            "Print the plan for this run, the time and the disk that it will take, and stop; no GPU is touched, and of "
            "the dataset only names and some headers are read."
        ),
    ] = False
    gpus: Annotated[
        int | None, hardware("With --dry_run 1: plan for this many GPUs per machine; none: those found.", least=1)
    ] = None
    nodes: Annotated[
        int | None, hardware("With --dry_run 1: plan for this many machines; none: one.", least=1)
    ] = None
    gpu_memory_gib: Annotated[
        float | None,
        hardware("With --dry_run 1: plan for GPUs of this many GiB; none: those found.", above=0),
    ] = None
    gpu_name: Annotated[
        str | None,
        hardware(
            "With --dry_run 1: plan for GPUs of this name, such as H100 or RTX 4090: the time of a step and, without "
            "--gpu_memory_gib, the memory; none: those found."
        ),
    ] = None
    link_gbps: Annotated[
        float | None,
        hardware(
            "Rate of a machine's network to other machines, all its cards together, in Gbit/s, for the time that the "
            "plan expects; none: as found on the machine, else a usual one.",
            above=0,
        ),
    ] = None
