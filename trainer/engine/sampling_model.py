"""A whole language model beside the one that is trained, with its weights of this moment, to make sounds with.

The live model is never computed with and never changed: its wrappers, hooks, compiled layers, gradients and mode are
none of this module's business. So one way serves every strategy, and adapters and frozen parts too (docs/decisions.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.engine.ranks import Ranks
from trainer.engine.settings import COMPUTE_DTYPE
from trainer.engine.shards import Shard
from trainer.errors import MemoryShortError, ModelError, TrainerError
from trainer.model.language_model import LanguageModel, empty_language_model
from trainer.model.new_word_model import TextTunedModel
from trainer.model.safetensors_file import files_kept_open
from trainer.model.source import Source
from trainer.model.trained_model import merged
from trainer.plan.layout import Precision
from trainer.spec.trainable import Selection


@dataclass(frozen=True, kw_only=True)
class Live:
    """What the copy is made of.

    model      the one that is trained, without the strategy's wrapper: its table of positions and T5 are shared
    shards     this rank's shard of every trained parameter, the same names in the same order on all ranks
    source     where the frozen weights come from
    selection  which parameters are trained
    precision  of the computation
    """

    model: LanguageModel
    shards: Sequence[Shard]
    source: Source
    selection: Selection
    precision: Precision
    device: torch.device


@contextmanager
def sampling_model(live: Live, ranks: Ranks) -> Iterator[LanguageModel]:
    """The whole model on this rank's device, in a block without gradients that computes as the strategy single does.

    See Engine.sampling_model.
    """
    ranks.wait("ready to make sounds")
    copy, adapters = _allocate(live, ranks)
    dtype = COMPUTE_DTYPE[live.precision]
    autocast = torch.autocast(live.device.type, dtype) if dtype != torch.float32 else nullcontext()
    try:
        _fill(copy, adapters, live, ranks)
        with torch.no_grad(), autocast:
            yield copy
    finally:
        _free(copy, live.device)
    # Not after an error, which ends the run: this rank goes on to tell the others of it.
    ranks.wait("done with making sounds")


def _allocate(live: Live, ranks: Ranks) -> tuple[LanguageModel, Tensor]:
    """An unfilled model, and float32 room for the largest adapter, (N,). A collective.

    Raises MemoryShortError on every rank where one of them lacks the memory, which it then has again.
    """
    copy, shortage = _on_meta(live), ""
    own = {name for name, _ in copy.named_parameters()}
    adapters = torch.empty(0)
    try:
        copy.to_empty(device=live.device)
        largest = max((math.prod(shard.shape) for shard in live.shards if shard.name not in own), default=0)
        adapters = torch.empty(largest, dtype=torch.float32, device=live.device)
    except torch.OutOfMemoryError as error:
        _free(copy, live.device)
        shortage = str(error).partition("\n")[0]
    short = {rank: text for rank, text in enumerate(ranks.gather(shortage)) if text}
    if short:
        _free(copy, live.device)
        rank, text = next(iter(short.items()))
        where = f"rank {rank}: " if ranks.world_size > 1 else ""
        raise MemoryShortError(f"the weights to make sounds with do not fit the device beside the run ({where}{text})")
    positions = copy.decoder.model.decoder.embed_positions
    del positions.weights
    positions.register_buffer("weights", live.model.decoder.model.decoder.embed_positions.weights, persistent=False)
    return copy, adapters


def _on_meta(live: Live) -> LanguageModel:
    """The model without memory, linear layers in the precision of the computation and all else in float32."""
    copy = empty_language_model(live.source)
    for module in copy.modules():
        if isinstance(module, nn.Linear):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(COMPUTE_DTYPE[live.precision])
    if isinstance(live.model, TextTunedModel):
        copy = live.model.beside(copy)
    return copy.eval().requires_grad_(False)


@torch.no_grad()
def _fill(copy: LanguageModel, adapters: Tensor, live: Live, ranks: Ranks) -> None:
    """Trained parameters from the ranks' shards, the others from the source.

    All collectives come first, so that no rank waits in one for a rank that cannot read the source. Raises ModelError
    on every rank where one of them cannot.
    """
    parameters = dict(copy.named_parameters())
    trained: dict[str, Tensor] = {}
    with ranks.computing("putting the weights together to make sounds with"):
        for shard in live.shards:
            if shard.name in parameters:
                _put_together(shard, parameters[shard.name].view(-1), ranks)
            else:
                values = adapters[: math.prod(shard.shape)]
                _put_together(shard, values, ranks)
                trained[shard.name] = values.view(shard.shape).to("cpu", copy=True)
    frozen = {name: parameters[name] for name in parameters.keys() - {shard.name for shard in live.shards}}
    failure = ""
    try:
        _fill_frozen(frozen, trained, live)
    except TrainerError as error:
        failure = str(error)
    ranks.wait("reading the frozen weights")
    if failures := [text for text in ranks.gather(failure) if text]:
        raise ModelError(f"the weights to make sounds with cannot be put together: {failures[0]}")


def _put_together(shard: Shard, whole: Tensor, ranks: Ranks) -> None:
    """Fill `whole`, a flat parameter, with the values of all ranks' shards, or of their averages where there are any.

    Bytes are summed and not numbers: one rank has a value, all others have zeros there, and so no bit of it changes,
    whatever its dtype.
    """
    values = shard.weight if shard.ema is None else shard.ema
    if shard.replicas == ranks.world_size:  # single, ddp: each rank has all of it
        whole.copy_(values)
        return
    whole.zero_()
    if shard.replica == 0:
        whole[shard.start : shard.start + len(values)].copy_(values)
    ranks.sum(whole.view(torch.uint8))


@files_kept_open()
def _fill_frozen(frozen: Mapping[str, Tensor], adapters: Mapping[str, Tensor], live: Live) -> None:
    """The weights that an export would have: the source's, and under adapters base and product merged in float32."""
    weights = merged(live.source, adapters, live.selection) if frozen else {}
    for name, parameter in frozen.items():
        parameter.copy_(weights[name].float())


def _free(copy: LanguageModel, device: torch.device) -> None:
    """Give the model's memory back, whoever still holds the model."""
    copy.to_empty(device=torch.device("meta"))
    if device.type == "cuda":
        # The caches of `generate` have left blocks of as many sizes as it made tokens. The next step's larger ones
        # would be sought among them, and the allocator would let all go only when it finds none.
        torch.cuda.empty_cache()
