"""How a run lies on its hardware: what it trains and keeps, and how that is split over processes and micro-batches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from trainer.spec.trainable import EVERYTHING, Selection

Strategy = Literal["single", "ddp", "zero2", "zero3", "fsdp", "hsdp"]
Precision = Literal["no", "bf16", "fp16"]  # of the computation, in Accelerate's words: "no" is float32
# What the backward pass computes a second time: nothing, every layer, or ("selective") of compiled layers all but the
# results of matrix products.
Checkpointing = Literal[False, True, "selective"]
CHECKPOINTING_IN_WORDS: dict[Checkpointing, str] = {False: "off", True: "on", "selective": "selective"}

FLOAT32, HALF = 4, 2  # bytes per value

# Text tokens of a caption, wherever memory depends on them: in a melody model, whose layers compute them as they
# compute frames; beside a T5 in the loop; and for the prompt of a sound. The plan is made before captions are read, and
# few have more: 128 tokens are some 80 words. Longer ones are found by the rehearsal before the first step, which takes
# the data set's longest caption (worst_case of trainer/training/loop.py).
CAPTION_TOKENS = 128


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The sounds that a run makes while it trains, as far as memory depends on them.

    sound_frames      of a sound (--sample_seconds)
    continued_frames  of a clip, which one sound more goes on from and which are read at once (--sample_continue)
    guided            whether each is computed with and without its prompt, side by side (--sample_guidance above 1)
    """

    sound_frames: int
    continued_frames: int = 0
    guided: bool = True

    @property
    def frames(self) -> int:
        """Of the longest sound."""
        return self.sound_frames + self.continued_frames

    def lasting(self, sound_frames: int) -> Samples:
        """The same sounds with so many frames."""
        return replace(self, sound_frames=sound_frames)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What a run trains and keeps in memory, whatever the hardware: the flags decide it, and no plan changes it.

    segment_frames     decoder steps of the longest crop
    selection          what of the model is trained
    ema                whether a moving average of the weights is kept (--ema_decay)
    eight_bit_moments  whether AdamW's two moments have 8 bits instead of 32 (--optimizer adamw8bit)
    base_bits          bits per value of the frozen linear layers in the decoder's layers (--base_bits); None: they are
                       held in the precision of the computation
    samples            the sounds that are made between steps (--sample_every); None: none are
    caption_tokens     text tokens of the longest caption
    """

    segment_frames: int
    selection: Selection = EVERYTHING
    ema: bool = False
    eight_bit_moments: bool = False
    base_bits: Literal[4, 8] | None = None
    samples: Samples | None = None
    caption_tokens: int = CAPTION_TOKENS


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Everything on which the memory of one process depends, besides the model's shape.

    world_size   processes of the run on all nodes together, one per GPU
    on_gpu       False where the processes compute on CPUs
    micro_batch  clips that one process computes at once
    accumulation micro-batches of one process that make an optimizer step
    compiled     whether the decoder's layers are compiled
    gathers_once under fsdp and hsdp: whether whole weights are gathered once for a step, and kept until its last
                 backward pass; if not, once for every forward and every backward pass
    reduces_once under fsdp, hsdp and zero2 with several micro-batches: whether gradients are summed over processes once
                 for a step, until when each GPU keeps whole ones; if not, after every micro-batch. ddp always does
    """

    workload: Workload
    strategy: Strategy
    nodes: int = 1
    world_size: int = 1
    on_gpu: bool
    mixed_precision: Precision
    micro_batch: int
    accumulation: int
    gradient_checkpointing: Checkpointing = False
    offload_optimizer: bool = False
    compiled: bool = False
    gathers_once: bool = False
    reduces_once: bool = False

    @property
    def shards(self) -> int:
        """Processes that share what the strategy shards: all of them, or under hsdp those of one node."""
        return self.world_size // self.nodes if self.strategy == "hsdp" else self.world_size

    @property
    def communicators(self) -> int:
        """How many groups of processes NCCL connects, each of which takes memory on every GPU.

        DeepSpeed makes a second group of all processes, and so does Accelerate under hsdp on several nodes, besides
        those that shard and those that replicate. tests/ranks/test_meeting.py counts the groups of each strategy.
        """
        if not self.on_gpu or self.world_size == 1:
            return 0
        if self.strategy in ("zero2", "zero3"):
            return 2
        return 4 if self.strategy == "hsdp" and self.nodes > 1 else 1

    @property
    def autocast(self) -> bool:
        """Whether torch.autocast casts float32 weights for each product; the sharded strategies cast the weights."""
        return self.strategy in ("single", "ddp") and self.mixed_precision != "no"

    @property
    def compute_bytes(self) -> int:
        """Bytes per value in the precision of the computation."""
        return FLOAT32 if self.mixed_precision == "no" else HALF

    @property
    def residual_bytes(self) -> int:
        """Bytes per value of the residual stream: float32 under autocast, as the embeddings and norms are."""
        return FLOAT32 if self.autocast else self.compute_bytes
