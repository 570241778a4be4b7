"""The model on its device: forward, backward and update under a plan, through Accelerate.

One of the two places that know accelerate and torch.distributed. The loop asks for a step and gets its
losses and gradient norm; how they came about is decided here.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from trainer.batches import Batch
from trainer.checkpoint import WEIGHT, Checkpoint, FlatSlice
from trainer.config import Config
from trainer.errors import CheckpointError, ConfigError, MemoryShortError, NotFiniteError
from trainer.loss import step_loss
from trainer.models import LanguageModel
from trainer.plan import Cluster, Plan
from trainer.run_folder import RunFolder

# AdamW's two moments, float32, each of its parameter's shape.
MOMENTS = ("exp_avg", "exp_avg_sq")
# fp16's loss scale starts at 65536 and halves at each overflow: below 1 something else is wrong.
FP16_ATTEMPTS = 18


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """losses_K: mean cross entropy of each codebook over the whole step, nats. grad_norm: before clipping."""

    losses_K: tuple[float, ...]
    grad_norm: float

    @property
    def loss(self) -> float:
        return sum(self.losses_K) / len(self.losses_K)


def find_cluster() -> Cluster:
    """What this process was started on; touches no device memory."""
    cuda = torch.cuda.is_available()
    return Cluster(
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        device="cuda" if cuda else "cpu",
        supports_bf16=cuda and torch.cuda.is_bf16_supported(),
    )


def build_accelerator(plan: Plan, config: Config, root: Path) -> Accelerator:
    """The Accelerator that the plan asks for, checked against what was really started."""
    for name, wanted in _trackers(config).items():
        if wanted and importlib.util.find_spec(name) is None:  # Accelerate would leave it out without a word
            raise ConfigError(f"--use_{name} 1 needs the package {name}: pip install {name}, or leave it out")
    accelerator = Accelerator(
        mixed_precision=plan.mixed_precision,
        cpu=not torch.cuda.is_available(),
        log_with=[name for name, wanted in _trackers(config).items() if wanted] or None,
        project_dir=str(root),
    )
    if accelerator.num_processes != plan.world_size:
        raise ConfigError(
            f"the launcher started {plan.world_size} process(es), Accelerate found {accelerator.num_processes}:"
            " start with `accelerate launch --num_processes N launch.py ...`"
        )
    return accelerator


def start_trackers(accelerator: Accelerator, config: Config, folder: RunFolder) -> Accelerator | None:
    """wandb and tensorboard as asked for; a resumed run continues the same wandb run. None where none is."""
    if not any(_trackers(config).values()):
        return None
    settings = {"id": folder.tracker_id(), "resume": "allow", "dir": str(folder.root)}
    values = {name: value for name, value in config.to_dict().items() if value is not None}
    try:
        accelerator.init_trackers(config.wandb_project, config=values, init_kwargs={"wandb": settings})
    except _wandb_errors(config) as error:
        raise ConfigError(
            f"--use_wandb 1: {error} Or set WANDB_MODE=offline, or leave --use_wandb out"
        ) from error
    return accelerator


def _trackers(config: Config) -> dict[str, bool]:
    return {"wandb": config.use_wandb, "tensorboard": config.use_tensorboard}


def _wandb_errors(config: Config) -> tuple[type[Exception], ...]:
    if not config.use_wandb:
        return ()
    import wandb

    return (wandb.Error,)


class Engine:
    """Owns the model, its optimizer and their device."""

    def __init__(self, accelerator: Accelerator, model: LanguageModel, plan: Plan, config: Config):
        """Moves the model to the device and wraps it as the plan says.

        AdamW's betas (0.9, 0.95) and its decay of every parameter are MusicGen's (audiocraft 1.3.0,
        config/solver/musicgen/musicgen_base_32khz.yaml).
        """
        if plan.gradient_checkpointing:
            model.decoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.accelerator = accelerator
        self.device = accelerator.device
        self._max_grad_norm = config.max_grad_norm
        self._reseeds = config.dropout > 0
        self._seed = config.seed
        self._bare = model
        model.to(self.device)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=config.weight_decay, fused=True
        )
        self.model, self.optimizer = accelerator.prepare(model, optimizer)

    def step(self, batches: Sequence[Batch], cells_K: np.ndarray, *, step: int, learning_rate: float) -> StepResult:
        """One optimizer step over this rank's micro-batches; all ranks get the same result.

        cells_K  (K,) valid cells of the whole step over all ranks

        Raises NotFiniteError, with every weight and moment as before, where loss or norm is not finite.
        """
        try:
            return self._step(batches, torch.from_numpy(cells_K).to(self.device), step, learning_rate)
        except torch.OutOfMemoryError as error:
            rows, _, frames = batches[0].inputs_BKT.shape
            raise MemoryShortError(
                f"step {step + 1}: {rows} clips of {frames} frames do not fit the device ({error}). Use a smaller"
                " --batch_size with --global_batch as it is, --gradient_checkpointing 1, or shorter --segment_seconds"
            ) from error

    def _step(self, batches: Sequence[Batch], cells_K: Tensor, step: int, learning_rate: float) -> StepResult:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        for _ in range(FP16_ATTEMPTS if self.accelerator.scaler is not None else 1):
            losses_K, norm = self._backward(batches, cells_K, step)
            result = StepResult(losses_K=tuple(losses_K), grad_norm=norm)
            if math.isfinite(norm) and math.isfinite(result.loss):
                self.optimizer.step()
                return result
            if self.accelerator.scaler is None or not math.isfinite(result.loss):
                break
            self.optimizer.step()  # does not step: the scaler saw the overflow, and lowers the scale
        raise NotFiniteError(f"step {step + 1}: loss {result.loss}, gradient norm {norm}; no weight was changed")

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> tuple[np.ndarray, np.ndarray]:
        """Summed cross entropy and valid cells of each codebook, both (K,), over these batches."""
        self.model.eval()
        sums, cells = [], []
        for batch in batches:
            batch = batch.to(self.device)
            sums.append(self._summed_losses(batch))
            cells.append((batch.labels_BKT >= 0).sum(dim=(0, 2)))
        self.model.train()
        return torch.stack(sums).sum(0).double().cpu().numpy(), torch.stack(cells).sum(0).cpu().numpy()

    def state(self) -> dict[str, FlatSlice]:
        """This rank's share of weights and moments, by name; the values are live, not copies."""
        slices = {}
        for name, parameter in self._bare.named_parameters():
            moments = self.optimizer.state.get(parameter, {})
            tensors = {WEIGHT + name: parameter} | {
                f"{kind}/{name}": moments[kind] for kind in MOMENTS if kind in moments
            }
            for key, tensor in tensors.items():
                slices[key] = FlatSlice(shape=tuple(tensor.shape), start=0, values=tensor.detach().reshape(-1))
        return slices

    @torch.no_grad()
    def load(self, checkpoint: Checkpoint) -> None:
        """Put a checkpoint's weights, moments and step count in place.

        Raises CheckpointError where it belongs to another model.
        """
        for name, parameter in self._bare.named_parameters():
            if checkpoint.shape(WEIGHT + name) != tuple(parameter.shape):
                raise CheckpointError(
                    f"{checkpoint.folder}: {name} has shape {checkpoint.shape(WEIGHT + name)}, the model's is"
                    f" {tuple(parameter.shape)}: resume with the --model_id of the run"
                )
            parameter.copy_(checkpoint.read(WEIGHT + name).view_as(parameter))
            if checkpoint.step > 0:
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(checkpoint.step), device=self.device),
                    **{kind: checkpoint.read(f"{kind}/{name}").view_as(parameter).to(self.device) for kind in MOMENTS},
                }

    def peak_memory_bytes(self) -> int | None:
        """Most device memory held at once since the start; None on a CPU."""
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None

    def _backward(self, batches: Sequence[Batch], cells_K: Tensor, step: int) -> tuple[list[float], float]:
        """Gradients of the step's loss, clipped; the losses and the norm in one read from the device."""
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros(len(cells_K), device=self.device)
        for index, batch in enumerate(batches):
            self._reseed(step, index)
            last = index == len(batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                sums = self._summed_losses(batch.to(self.device))
                self.accelerator.backward(step_loss(sums, cells_K))
            total += sums.detach()
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self._max_grad_norm)
        values = torch.cat([total / cells_K.clamp(min=1), norm.reshape(1)]).tolist()
        return values[:-1], values[-1]

    def _summed_losses(self, batch: Batch) -> Tensor:
        return self.model(
            batch.inputs_BKT,
            batch.text_BSD,
            batch.text_mask_BS,
            batch.attention_BS,
            labels_BKT=batch.labels_BKT,
        )

    def _reseed(self, step: int, micro_batch: int) -> None:
        """With dropout, draws are a function of (seed, step, micro-batch, rank): nothing to save or replay."""
        if self._reseeds:
            entropy = (self._seed, step, micro_batch, self.accelerator.process_index)
            torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))


def state_bytes(state: Mapping[str, FlatSlice]) -> int:
    """Bytes that these slices hold."""
    return sum(piece.values.numel() * piece.values.element_size() for piece in state.values())
