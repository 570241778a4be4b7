"""One optimizer step at a time, with the same losses and gradient norms under every strategy and on every rank."""

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
from trainer.engine import rehearsal
from trainer.engine.backend import Backend
from trainer.engine.compiled import compile_layers
from trainer.engine.ema import Ema
from trainer.engine.host_copy import HostCopy, on_device
from trainer.engine.matmul_rate import matmul_rate, rate_in_words
from trainer.engine.ranks import Ranks
from trainer.engine.sampling_model import Live, sampling_model
from trainer.engine.settings import EngineSettings
from trainer.engine.shards import Read, Shard
from trainer.engine.torch_backend import TorchBackend
from trainer.engine.zero_backend import ZeroBackend
from trainer.errors import CheckpointError, ConfigError, MemoryShortError, NotFiniteError
from trainer.model.language_model import LanguageModel
from trainer.model.loss import step_loss
from trainer.model.safetensors_file import files_kept_open
from trainer.model.source import Source
from trainer.model.trained_model import build_trained_model
from trainer.model.weights import Weights
from trainer.plan.plan import Plan
from trainer.plan.time import StepTime
from trainer.run.checkpoint import EMA, WEIGHT, Checkpoint, FlatSlice

# How often a step that overflowed under fp16 is computed again. Its loss scale starts at 65536 and is halved at each
# overflow; once it is below 1, something else is wrong.
FP16_ATTEMPTS = 18
# The most values that a rank may own, as a multiple of an even split over the ranks.
MAX_UNEVENNESS = 1.1


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What an optimizer step gave, the same on every rank.

    losses_K   mean cross entropy of each codebook over all valid cells of the step, in nats
    grad_norm  norm of all gradients before clipping
    requests   for each request that was passed to `Engine.step`: whether any rank made it
    """

    losses_K: tuple[float, ...]
    grad_norm: float
    requests: tuple[bool, ...] = ()

    @property
    def loss(self) -> float:
        """The mean of the codebooks' losses, in nats."""
        return sum(self.losses_K) / len(self.losses_K)


class Engine:
    """Owns the model, its optimizer and their devices.

    The constructor, `step`, `rehearse`, `evaluate` and `sampling_model` contain collectives: every rank must call them
    in the same order, with its own batches.
    """

    def __init__(self, accelerator: Accelerator, ranks: Ranks, source: Source, plan: Plan, settings: EngineSettings):
        """Build the model, shard it as the plan says, and fill it with the weights to start from.

        The model is transformed in this order. The backend's constructor applies 4 to 7; ZeRO has no 4 and 5. Steps 2,
        3 and 7 come in the order of torchtitan's parallelize.py.

        1. build        on the meta device, adapters included: parameters have shapes and no memory
        2. recompute    whole layers, for --gradient_checkpointing 1; `selective` is done by the compiler
        3. compile      layer by layer; the compiler itself runs at a layer's first use, after all other steps
        4. quantize     frozen linear layers, for --base_bits. After 1, because peft would copy every result of a
                        quantized layer that it wraps; before 6, so that the unrounded base never has memory
        5. shrink       other frozen linear layers, to the compute precision; before 6, as 4 is
        6. materialize  give all parameters memory of any content: in host memory where 7 cuts the model's own weights
                        (fsdp, hsdp, zero3), else on the device
        7. shard        with the optimizer, by Accelerate's `prepare`
        8. fill         each rank reads the ranges that it holds, tensor by tensor. So no process holds more of the
                        model in host memory than one tensor besides its own shards (tests/ranks/test_host_memory.py)
        """
        trained = build_trained_model(source, settings.model)
        model, self._read_start = trained.model, _reader(trained.start)
        self._model, self._source, self._selection = model, source, settings.model.selection
        self._precision, self._compiled, self._scaler = plan.mixed_precision, plan.compiled, accelerator.scaler
        if plan.gradient_checkpointing is True:
            model.decoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.device = accelerator.device
        if plan.compiled:
            compile_layers(model, plan)
        self.ranks = ranks
        self.matmul_rate = matmul_rate(self.device, plan.mixed_precision)  # FLOPs per second, for MFU
        if self.device.type == "cuda":
            ranks.say(rate_in_words(self.matmul_rate, self.device, plan.mixed_precision))
        self._reseeds = settings.has_dropout
        self._seed = settings.model.seed
        backend = ZeroBackend if plan.strategy in ("zero2", "zero3") else TorchBackend
        self.backend: Backend = backend(accelerator, model, plan, settings)
        self._check_shards(plan)
        ranks.check_equal(**{"the model's weights": source.probe()})
        self._share_positions(model)
        self._fill_weights(self._read_start)
        self._ema = None if settings.ema_decay is None else Ema(self.backend.shards(), settings.ema_decay)

    def step(
        self,
        batches: Sequence[Batch],
        cells_K: np.ndarray,
        *,
        step: int,
        learning_rate: float,
        requests: Sequence[bool] = (),
    ) -> StepResult:
        """One optimizer step over this rank's micro-batches.

        cells_K   (K,) int64, valid cells of the whole step, over all ranks and micro-batches
        step      counted from 0
        requests  what this rank asks for after this step, for example to stop. They travel with the losses, so that
                  all ranks learn of a request after the same step, without a collective of its own

        Raises NotFiniteError, with every weight and moment as before the step, where loss or norm is not finite, and
        MemoryShortError where the device's memory does not suffice.
        """
        self.ranks.steps_begun = step + 1
        try:
            with self.ranks.computing(f"step {step + 1}"):
                counts = on_device(torch.tensor([*cells_K.tolist(), *requests], dtype=torch.int64), self.device)
                cells, asked = counts.split([len(cells_K), len(requests)])
                return self._step(batches, cells, asked, step, learning_rate)
        except torch.OutOfMemoryError as error:
            rows, _, frames = batches[0].inputs_BKT.shape
            raise MemoryShortError(
                f"step {step + 1}: {rows} clips of {frames} frames do not fit the device ({error}). Use a smaller"
                " --batch_size with --global_batch as it is, --gradient_checkpointing 1, or shorter --segment_seconds"
            ) from error

    def rehearse(self, batch: Batch, accumulation: int, places: int = 0) -> StepTime:
        """Run a step on `batch` and undo it, so that a lack of memory ends the run before any work is lost.

        places  the most of a row of the run: of its melody, its text and its codes in a melody model, else of its codes

        Returns how long a full step takes on this rank: `accumulation` micro-batches like this one, and the update. For
        that the step is run a second time, since the first one compiles and warms up; where it was slow without
        compiling, its own time has to do.

        A learning rate of 0 leaves the weights as they are (AdamW's decay is multiplied by it too), and the moments are
        set back to zero. Two micro-batches suffice: from the second on, gradients and activations are held at once.
        """
        positions = self._model.decoder.model.decoder.embed_positions
        if places > len(positions.weights):
            # transformers would do this in the middle of a step, on each rank by itself.
            positions.make_weights(places, positions.embedding_dim)
            self._share_positions(self._model)
        cells = np.full(batch.labels_BKT.shape[1], max(1, batch.labels_BKT.numel()))

        def once() -> StepTime:
            batches = rehearsal.TimedBatches(batch, accumulation, self.device)
            self.step(batches, cells, step=0, learning_rate=0.0)
            time = batches.time()
            self.ranks.steps_begun = 0
            self.backend.reset_moments(0)
            return time

        return rehearsal.measured(once, self.ranks, self.device, self._scaler, compiled=self._compiled)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> tuple[np.ndarray, np.ndarray]:
        """Summed cross entropy in nats and valid cells of each codebook, both (K,) float64, over all ranks' batches.

        They are those of the weights that an export would hold: the EMA where the run keeps one. Every rank must have
        equally many batches.
        """
        totals, name = [], f"validation after step {self.ranks.steps_begun}"
        with self._exported_weights():
            self.backend.model.eval()
            for number, batch in enumerate(batches, 1):
                batch = batch.to(self.device)
                cells = (batch.labels_BKT >= 0).sum(dim=(0, 2))
                with self.ranks.computing(f"micro-batch {number} of the {name}"):
                    totals.append(torch.stack([self._summed_losses(batch).double(), cells.double()]))
            self.backend.model.train()
            self.backend.after_evaluation()
        with self.ranks.computing(f"the {name}"):
            sums, cells = self.ranks.sum(torch.stack(totals).sum(0)).cpu().numpy()
        return sums, cells

    @contextmanager
    def sampling_model(self) -> Iterator[LanguageModel]:
        """Inside the block there is a plain copy of the whole model on this rank's device, to make sounds with.

        Its weights are those that an export would hold now: of all ranks' shards, the EMA where the run keeps one,
        adapters merged, and what is frozen from the source. It is in eval mode, without gradients, wrappers, hooks or
        compiled layers; linear layers are in the compute precision, all else is in float32. Where a word is learned,
        it is a TextTunedModel, whose `text_states` gives T5's states with the rows as they are now. Inside the block
        it computes as the strategy single does, by itself: ranks may do there what they like, each for as long as it
        likes. Nothing of the model that is trained is touched.

        All ranks enter together and leave together, and an error that leaves the block on one of them ends the run:
        what may fail is to be caught inside. The copy's memory is free after the block, whoever still holds it.

        Raises MemoryShortError on every rank where the copy does not fit the device of one, and ModelError where the
        source cannot be read any more; the run may go on.
        """
        live = Live(
            model=self._model,
            shards=list(self.shards()),
            source=self._source,
            selection=self._selection,
            precision=self._precision,
            device=self.device,
        )
        with sampling_model(live, self.ranks) as model:
            yield model

    def state(self) -> dict[str, FlatSlice]:
        """What this rank saves of weights, moments and EMA, by name. Live views of them: copy before the next step."""
        slices = {name: piece for shard in self.shards() for name, piece in shard.slices().items()}
        return slices | self.backend.extra_slices()

    def shards(self) -> Iterator[Shard]:
        """This rank's shard of every trained parameter, with its EMA, in the order of the model's parameters."""
        for shard in self.backend.shards():
            yield shard if self._ema is None else self._ema.attach_to(shard)

    @files_kept_open()
    def load(self, checkpoint: Checkpoint) -> None:
        """Put this rank's part of a checkpoint's weights, moments and EMA in place, and its count of steps.

        Frozen weights are in no checkpoint: they get the values to start from again. Raises CheckpointError where the
        checkpoint belongs to another model, or to a run that trained other parameters.
        """
        shapes = {WEIGHT + shard.name: shard.shape for shard in self.backend.shards()}
        saved = {key: checkpoint.shape(key) for key in checkpoint.names(WEIGHT)}
        for key in sorted(shapes.keys() | saved.keys()):
            if saved.get(key) != shapes.get(key):
                raise CheckpointError(
                    f"{checkpoint.folder}: {key} has shape {saved.get(key, 'none')}, what is trained now has"
                    f" {shapes.get(key, 'none')}: resume with the --model_id and the selection of the run"
                )
        self._fill_weights(lambda key, *ends: (checkpoint.read if key in saved else self._read_start)(key, *ends))
        self.backend.reset_moments(checkpoint.step)
        self.backend.load_moments(checkpoint)
        if self._ema is not None:
            for shard in self.shards():
                shard.fill([EMA + shard.name], checkpoint.read)

    def peak_memory_bytes(self) -> int | None:
        """The most device memory that was held at once since the start; None on a CPU."""
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None

    def _check_shards(self, plan: Plan) -> None:
        """Raise ConfigError where the optimizer's state is not spread over the ranks as the plan says.

        A library that silently did something else would train on, with another memory need. Every trained value must be
        owned by one rank (hsdp: by one rank of each node; ddp: by all), and no rank may own much more than an even
        split gives it. FSDP splits a tensor by rows, and rows that do not divide leave some ranks one row more.
        """
        shapes = [shard.shape for shard in self.backend.shards()]
        held, total = sum(len(shard.weight) for shard in self.backend.shards()), sum(map(math.prod, shapes))
        copies = {"hsdp": plan.nodes, "single": 1, "ddp": plan.world_size}.get(plan.strategy, 1)
        ranks = plan.world_size // copies
        by_rows = sum(-(-shape[0] // ranks) * math.prod(shape[1:]) for shape in shapes)
        owned = int(self.ranks.sum(torch.tensor([held], dtype=torch.int64, device=self.device)).item())
        if owned != copies * total or held > max(MAX_UNEVENNESS * total / ranks, by_rows):
            raise ConfigError(
                f"{plan.strategy} should spread {total} values {copies} time(s) over {plan.world_size} processes, but"
                f" together they hold {owned}, and this one {held}: use the tested versions of constraints.txt"
            )

    @torch.no_grad()
    def _share_positions(self, model: LanguageModel) -> None:
        """Give every rank the first one's table of positions, the only buffer that the model computes with.

        Each rank computes it on its CPU, and CPUs of two kinds may round a sine differently. It never changes after the
        rehearsal, so that DistributedDataParallel need not send it at every step, as it does by default.
        """
        table = model.decoder.model.decoder.embed_positions.weights
        if not self.ranks.is_first:
            table.zero_()
        self.ranks.sum(table)

    @files_kept_open()
    def _fill_weights(self, read: Read) -> None:
        for shard in self.backend.shards():
            shard.fill([WEIGHT + shard.name], read)
        self.backend.fill_model(read)

    @contextmanager
    def _exported_weights(self) -> Iterator[None]:
        """Inside the block the model computes with the EMA of its weights, where the run keeps one."""
        if self._ema is None:
            yield
            return
        with self._ema.swapped():
            self.backend.refresh_model()
            yield
        # Not in a `finally`: under ZeRO this is a collective, and after an error on one rank the others do not come.
        self.backend.refresh_model()

    def _step(
        self, batches: Sequence[Batch], cells_K: Tensor, asked_R: Tensor, step: int, learning_rate: float
    ) -> StepResult:
        for _ in range(FP16_ATTEMPTS if self.backend.scales_losses else 1):
            sums_K = self._backward(batches, cells_K, step)
            part_of_square = self.backend.finish(learning_rate)
            values = self._sum_over_ranks(sums_K / cells_K.clamp(min=1), asked_R, part_of_square)
            # The device goes on to AdamW, which changes nothing where a value is not finite, while the host reads them.
            on_the_way = HostCopy(values)
            self.backend.update(norm=values[-1], finite=values.isfinite().all())
            result = _result(on_the_way.read(), codebooks=len(cells_K))
            if math.isfinite(result.grad_norm) and math.isfinite(result.loss):
                if self._ema is not None:
                    self._ema.update()
                return result
            # Under fp16 a finite loss with a norm that is not finite is an overflow, and the step is computed again.
            # Scalers usually go on to the next step, so that the clips of this one would be missed.
            if not math.isfinite(result.loss):
                break
        raise NotFiniteError(
            f"step {step + 1}: loss {result.loss}, gradient norm {result.grad_norm}; no weight was changed"
        )

    def _backward(self, batches: Sequence[Batch], cells_K: Tensor, step: int) -> Tensor:
        """Compute the gradients of the step's loss; returns this rank's summed cross entropies, (K,) float32, nats."""
        total = torch.zeros(len(cells_K), device=self.device)
        with self.backend.around_micro_batches():
            for index, batch in enumerate(batches):
                self._reseed(step, index)
                last = index == len(batches) - 1
                with self.backend.accumulating(last):
                    sums = self._summed_losses(batch.to(self.device))
                    self.backend.backward(step_loss(sums, cells_K), last=last)
                total += sums.detach()
        return total

    def _sum_over_ranks(self, losses_K: Tensor, asked_R: Tensor, part_of_square: Tensor) -> Tensor:
        """Losses, requests and the gradients' norm over all ranks, (K + R + 1,) float64, by one collective."""
        summed = self.ranks.sum(torch.cat([losses_K, asked_R, part_of_square.reshape(1)]))
        # Losses in float32, as one process has them.
        return torch.cat([summed[:-1].float(), summed[-1:].sqrt()])

    def _summed_losses(self, batch: Batch) -> Tensor:
        """Summed cross entropy of each codebook, (K,) float32, in nats; see LanguageModel.forward."""
        return self.backend.model(
            batch.inputs_BKT,
            batch.text_BSD,
            batch.text_mask_BS,
            batch.attention_BS,
            labels_BKT=batch.labels_BKT,
            melody_BC=batch.melody_BC,
        )

    def _reseed(self, step: int, micro_batch: int) -> None:
        """With dropout, make draws a function of (seed, step, micro-batch, rank): none is ever saved or replayed."""
        if self._reseeds:
            entropy = (self._seed, step, micro_batch, self.ranks.rank)
            torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))


def _result(values: Sequence[float], codebooks: int) -> StepResult:
    """values  losses, requests and norm"""
    return StepResult(
        losses_K=tuple(values[:codebooks]),
        grad_norm=values[-1],
        requests=tuple(value > 0 for value in values[codebooks:-1]),
    )


def _reader(weights: Weights) -> Read:
    """`weights` as a function of a tensor's name in a checkpoint, in float32."""

    def read(key: str, start: int, stop: int) -> Tensor:
        return weights.read(key.removeprefix(WEIGHT), start, stop).float()

    return read
