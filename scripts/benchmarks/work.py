"""The work that the benchmarks' contestants do: one optimizer step of clips of one length."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from trainer.data.batches import Batch
from trainer.model.delay_pattern import inputs_and_labels
from trainer.plan.layout import Checkpointing, Layout, Precision, Strategy, Workload
from trainer.plan.memory import expected_bytes
from trainer.plan.plan import Plan
from trainer.spec.flops import clip_flops
from trainer.spec.shapes import KNOWN, MELODY_PLACES, Shape

CODES = 2048


@dataclass(frozen=True, kw_only=True)
class Work:
    """An optimizer step of accumulation x micro_batch clips of `frames` frames, with captions of `text_tokens` tokens.

    model      one of the known names, as in --model_id
    layers     how many decoder layers it is cut to; None: it has all
    precision  of the computation: "no" (float32), "bf16" or "fp16"
    """

    model: str
    layers: int | None
    frames: int
    micro_batch: int
    accumulation: int = 1
    text_tokens: int = 20
    precision: Precision = "no"
    strategy: Strategy = "single"
    gradient_checkpointing: Checkpointing = False
    compiled: bool = False

    @property
    def shape(self) -> Shape:
        shape = KNOWN[self.model]
        return replace(shape, layers=self.layers or shape.layers)

    @property
    def clips(self) -> int:
        return self.micro_batch * self.accumulation

    @property
    def flops(self) -> int:
        """Model FLOPs of the whole step."""
        return self.clips * clip_flops(self.shape, self.frames, self.text_tokens)

    @property
    def cells(self) -> np.ndarray:
        """Codes of the whole step that each codebook learns to predict: (K,) int64."""
        delays = np.arange(self.shape.codebooks) // self.shape.audio_channels
        return self.clips * (self.frames - delays)

    def batch(self) -> Batch:
        """One micro-batch of random codes, text states and in melody models notes, in host memory."""
        torch.manual_seed(0)
        codes = torch.randint(0, CODES, (self.micro_batch, self.shape.codebooks, self.frames))
        inputs, labels = inputs_and_labels(codes, CODES, self.shape.audio_channels)
        # A melody model puts together each row of its own places, as it does where captions differ in length.
        melody, attention = None, None
        if self.shape.melody:
            melody = torch.randint(0, self.shape.chroma_bins, (self.micro_batch, MELODY_PLACES))
            attention = torch.ones(self.micro_batch, self.text_tokens, dtype=torch.bool)
        return Batch(
            inputs_BKT=inputs,
            labels_BKT=labels,
            text_BSD=torch.randn(self.micro_batch, self.text_tokens, self.shape.text_width) * 0.1,
            text_mask_BS=torch.ones(self.micro_batch, self.text_tokens),
            attention_BS=attention,
            frames=self.micro_batch * self.frames,
            padded_frames=self.micro_batch * self.frames,
            flops=self.flops // self.accumulation,
            melody_BC=melody,
        )

    def layout(self, *, on_gpu: bool) -> Layout:
        """The layout of this work in one process, from which the expected memory follows."""
        return Layout(
            workload=Workload(segment_frames=self.frames, caption_tokens=self.text_tokens),
            strategy=self.strategy,
            on_gpu=on_gpu,
            mixed_precision=self.precision,
            micro_batch=self.micro_batch,
            accumulation=self.accumulation,
            gradient_checkpointing=self.gradient_checkpointing,
            compiled=self.compiled,
        )

    def plan(self, *, gpu_memory_bytes: int | None) -> Plan:
        """The plan of this work in one process, exactly as it is laid out here."""
        layout = self.layout(on_gpu=gpu_memory_bytes is not None)
        return Plan(
            layout=layout,
            global_batch=self.clips,
            memory=expected_bytes(self.shape, layout),
            gpu_memory_bytes=gpu_memory_bytes,
            reasons=(),
        )
