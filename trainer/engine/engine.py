"""One optimizer step at a time, the same under every strategy: losses, gradient norm, and what all ranks agreed on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from trainer.data.batches import Batch
from trainer.engine.compiled import compile_layers
from trainer.engine.ema import Average
from trainer.engine.matmul_rate import matmul_rate
from trainer.engine.ranks import Ranks
from trainer.engine.settings import EngineSettings
from trainer.engine.shards import Read, Share
from trainer.engine.torch_backend import TorchBackend
from trainer.engine.zero_backend import ZeroBackend
from trainer.errors import CheckpointError, ConfigError, MemoryShortError, NotFiniteError
from trainer.model.loss import step_loss
from trainer.model.source import Source
from trainer.model.trained_model import build_trained_model
from trainer.model.weights import Weights
from trainer.plan.plan import Plan
from trainer.run.checkpoint import EMA, WEIGHT, Checkpoint, FlatSlice

# fp16's loss scale starts at 65536 and halves at each overflow: below 1 something else is wrong.
FP16_ATTEMPTS = 18
# The most that a rank may own, as a multiple of an even share.
UNEVEN = 1.1


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step gave, the same on every rank.

    losses_K   mean cross entropy of each codebook over the whole step, nats
    grad_norm  before clipping
    wishes     which of the wishes some rank had
    """

    losses_K: tuple[float, ...]
    grad_norm: float
    wishes: tuple[bool, ...] = ()

    @property
    def loss(self) -> float:
        return sum(self.losses_K) / len(self.losses_K)


class Engine:
    """Owns the model, its optimizer and their devices."""

    def __init__(self, accelerator: Accelerator, ranks: Ranks, source: Source, plan: Plan, settings: EngineSettings):
        """Builds the model without weights, shards it as the plan says, and fills each rank's share from disk.

        So no process ever holds more of the model in host memory than one tensor beside its share. AdamW's
        betas (0.9, 0.95) and its decay of every trained parameter are MusicGen's (audiocraft 1.3.0,
        config/solver/musicgen/musicgen_base_32khz.yaml).
        """
        trained = build_trained_model(source, settings.model)
        model, self._start = trained.model, _reader(trained.start)
        if plan.gradient_checkpointing is True:
            model.decoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.device = accelerator.device
        if plan.compiled:
            compile_layers(model, plan)
        self.ranks = ranks
        self.matmul_rate = matmul_rate(self.device, plan.mixed_precision)  # FLOPs a second, for MFU
        self._reseeds = settings.has_dropout
        self._seed = settings.model.seed
        backend = ZeroBackend if plan.strategy in ("zero2", "zero3") else TorchBackend
        self.backend = backend(accelerator, model, plan, settings)
        self._check_shares(plan)
        ranks.check_equal(**{"the model's weights": source.probe()})
        self._fill_weights(self._start)
        self._average = None if settings.ema_decay is None else Average(self.backend.shares(), settings.ema_decay)

    def step(
        self,
        batches: Sequence[Batch],
        cells_K: np.ndarray,
        *,
        step: int,
        learning_rate: float,
        wishes: Sequence[bool] = (),
    ) -> StepResult:
        """One optimizer step over this rank's micro-batches.

        cells_K  (K,) valid cells of the whole step over all ranks
        wishes   anything a rank wants all to know after this step; they travel with the losses

        Raises NotFiniteError, with every weight and moment as before, where loss or norm is not finite, and
        MemoryShortError where the device is too small.
        """
        self.ranks.steps_begun = step + 1
        try:
            return self._step(batches, torch.from_numpy(cells_K).to(self.device), step, learning_rate, wishes)
        except torch.OutOfMemoryError as error:
            rows, _, frames = batches[0].inputs_BKT.shape
            raise MemoryShortError(
                f"step {step + 1}: {rows} clips of {frames} frames do not fit the device ({error}). Use a smaller"
                " --batch_size with --global_batch as it is, --gradient_checkpointing 1, or shorter --segment_seconds"
            ) from error

    def rehearse(self, batch: Batch, accumulation: int) -> None:
        """Run a step on `batch` and undo it: what does not fit fails now, before any work is lost.

        Weights do not move at a learning rate of 0, and the moments are set back to zero.
        """
        cells = np.full(batch.labels_BKT.shape[1], max(1, batch.labels_BKT.numel()))
        self.step([batch] * min(2, accumulation), cells, step=0, learning_rate=0.0)
        self.ranks.steps_begun = 0
        self.backend.reset_moments(0)
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**30
            self.ranks.say(f"one step of the largest micro-batch took {peak:.1f} GiB of device memory")

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> tuple[np.ndarray, np.ndarray]:
        """Summed cross entropy and valid cells of each codebook, both (K,), over all ranks' batches.

        Of the weights that an export would hold: their average where the run keeps one.
        """
        totals = []
        with self._exported_weights():
            self.backend.model.eval()
            for batch in batches:
                batch = batch.to(self.device)
                cells = (batch.labels_BKT >= 0).sum(dim=(0, 2))
                totals.append(torch.stack([self._summed_losses(batch).double(), cells.double()]))
            self.backend.model.train()
            self.backend.evaluated()
        sums, cells = self.ranks.sum(torch.stack(totals).sum(0)).cpu().numpy()
        return sums, cells

    def state(self) -> dict[str, FlatSlice]:
        """This rank's share of trained weights, moments and average, by name; the values are live, not copies."""
        pieces = {name: piece for share in self.shares() for name, piece in share.slices().items()}
        return pieces | self.backend.extras()

    def shares(self) -> Iterator[Share]:
        """This rank's share of every trained parameter, in the model's order."""
        for share in self.backend.shares():
            yield share if self._average is None else self._average.beside(share)

    def load(self, checkpoint: Checkpoint) -> None:
        """Put this rank's share of a checkpoint's weights, moments and average in place, and its count of steps.

        What is frozen is in no checkpoint and keeps the values of the start. Raises CheckpointError where the
        checkpoint belongs to another model, or to a run that trained other parameters.
        """
        shapes = {WEIGHT + share.name: share.shape for share in self.backend.shares()}
        saved = {key: checkpoint.shape(key) for key in checkpoint.names(WEIGHT)}
        for key in sorted(shapes.keys() | saved.keys()):
            if saved.get(key) != shapes.get(key):
                raise CheckpointError(
                    f"{checkpoint.folder}: {key} has shape {saved.get(key, 'none')}, what is trained now has"
                    f" {shapes.get(key, 'none')}: resume with the --model_id and the selection of the run"
                )
        self._fill_weights(lambda key, *ends: (checkpoint.read if key in saved else self._start)(key, *ends))
        self.backend.reset_moments(checkpoint.step)
        self.backend.load_moments(checkpoint)
        if self._average is not None:
            for share in self.shares():
                share.fill([EMA + share.name], checkpoint.read)

    def peak_memory_bytes(self) -> int | None:
        """Most device memory held at once since the start; None on a CPU."""
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None

    def _check_shares(self, plan: Plan) -> None:
        """Raise ConfigError where the optimizer's state is not spread as the plan says.

        Every trained value must be owned by one rank (by one of each node, for hsdp), and none may own much more
        than its share: rows that do not divide leave some ranks one row more.
        """
        shapes = [share.shape for share in self.backend.shares()]
        held, total = sum(len(share.weight) for share in self.backend.shares()), sum(map(math.prod, shapes))
        copies = {"hsdp": plan.nodes, "single": 1, "ddp": plan.world_size}.get(plan.strategy, 1)
        ranks = plan.world_size // copies
        by_rows = sum(-(-shape[0] // ranks) * math.prod(shape[1:]) for shape in shapes)
        owned = int(self.ranks.sum(torch.tensor([held], dtype=torch.int64, device=self.device)).item())
        if owned != copies * total or held > max(UNEVEN * total / ranks, by_rows):
            raise ConfigError(
                f"{plan.strategy} should spread {total} values {copies} time(s) over {plan.world_size} processes, but"
                f" together they hold {owned}, and this one {held}: use the tested versions of constraints.txt"
            )

    def _fill_weights(self, read: Read) -> None:
        for share in self.backend.shares():
            share.fill([WEIGHT + share.name], read)
        self.backend.publish(read)

    @contextmanager
    def _exported_weights(self) -> Iterator[None]:
        """Within the block the model computes with the average of its weights, where the run keeps one."""
        if self._average is None:
            yield
            return
        with self._average.swapped():
            self.backend.refresh()
            yield
        self.backend.refresh()  # not after an error: it is a collective, and the others may not come

    def _step(
        self, batches: Sequence[Batch], cells_K: Tensor, step: int, learning_rate: float, wishes: Sequence[bool]
    ) -> StepResult:
        for _ in range(FP16_ATTEMPTS if self.backend.scales_losses else 1):
            sums = self._backward(batches, cells_K, step)
            norm = self.backend.finish(learning_rate)
            result = self._read(sums, cells_K, norm, wishes)
            if math.isfinite(result.grad_norm) and math.isfinite(result.loss):
                self.backend.update(result.grad_norm)
                if self._average is not None:
                    self._average.update()
                return result
            if not self.backend.scales_losses or not math.isfinite(result.loss):
                break
            self.backend.update(result.grad_norm)  # does not step: the scaler saw the overflow, and lowers the scale
        raise NotFiniteError(
            f"step {step + 1}: loss {result.loss}, gradient norm {result.grad_norm}; no weight was changed"
        )

    def _backward(self, batches: Sequence[Batch], cells_K: Tensor, step: int) -> Tensor:
        """Gradients of the step's loss; this rank's summed cross entropies (K,)."""
        total = torch.zeros(len(cells_K), device=self.device)
        for index, batch in enumerate(batches):
            self._reseed(step, index)
            last = index == len(batches) - 1
            with self.backend.accumulating(last):
                sums = self._summed_losses(batch.to(self.device))
                self.backend.backward(step_loss(sums, cells_K), last=last)
            total += sums.detach()
        return total

    def _read(self, sums: Tensor, cells_K: Tensor, norm: Tensor, wishes: Sequence[bool]) -> StepResult:
        """Losses, norm and wishes in one collective and one read from the device."""
        wanted = torch.tensor([float(wish) for wish in wishes], device=self.device)
        summed = self.ranks.sum(torch.cat([sums / cells_K.clamp(min=1), wanted]))
        values = torch.cat([summed.double(), norm.double().reshape(1)]).tolist()
        codebooks = len(sums)
        return StepResult(
            losses_K=tuple(values[:codebooks]),
            grad_norm=values[-1],
            wishes=tuple(value > 0 for value in values[codebooks:-1]),
        )

    def _summed_losses(self, batch: Batch) -> Tensor:
        return self.backend.model(
            batch.inputs_BKT, batch.text_BSD, batch.text_mask_BS, batch.attention_BS, labels_BKT=batch.labels_BKT
        )

    def _reseed(self, step: int, micro_batch: int) -> None:
        """With dropout, draws are a function of (seed, step, micro-batch, rank): nothing to save or replay."""
        if self._reseeds:
            entropy = (self._seed, step, micro_batch, self.ranks.rank)
            torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))


def _reader(weights: Weights) -> Read:
    """Ranges of flattened tensors in float32, by the names of a checkpoint."""

    def read(key: str, start: int, stop: int) -> Tensor:
        return weights.read(key.removeprefix(WEIGHT), start, stop).float()

    return read
