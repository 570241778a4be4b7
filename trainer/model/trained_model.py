"""The model that is trained: which of its parameters move, where each starts, and what comes of them at the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from trainer.model.language_model import LanguageModel, empty_language_model
from trainer.model.lora import AdaptedWeights, MergedWeights, add_adapters
from trainer.model.new_word import Placeholder, extended_tokenizer, first_token, placeholder_of, start_rows
from trainer.model.new_word_model import TextTunedModel
from trainer.model.source import DECODER, PROJECTION, Source, load_text_encoder
from trainer.model.weights import MemoryWeights, MoreWeights, ReplacedWeights, SomeWeights, Weights
from trainer.spec.trainable import TEXT_ROWS, Selection

if TYPE_CHECKING:
    from trainer.flags.config import Config


@dataclass(frozen=True, kw_only=True)
class Trainee:
    """A model on the meta device whose parameters' requires_grad says what is trained.

    start  a value for each of its parameters, by the model's own names; the frozen ones keep it
    """

    model: LanguageModel
    start: Weights


def trainee_of(source: Source, config: Config) -> Trainee:
    """What `config` trains of `source`, in training mode and without memory, a T5 in the loop apart."""
    model, selection = empty_language_model(source, dropout=config.dropout), config.selection
    placeholder = placeholder_of(config)
    if placeholder is not None:
        return _learning(source, model, placeholder, config.init_word)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(selection.trains(name))
    if selection.lora is None:
        return Trainee(model=model, start=source.weights)
    add_adapters(model, selection.lora)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return Trainee(model=model, start=AdaptedWeights(source.weights, shapes, seed=config.seed))


def _learning(source: Source, model: LanguageModel, placeholder: Placeholder, init_word: str) -> Trainee:
    """The frozen model behind T5, with the new rows of a word."""
    first = first_token(extended_tokenizer(source.load_tokenizer(), placeholder), placeholder)
    rows = MemoryWeights({TEXT_ROWS: start_rows(source, placeholder, init_word)})
    tuned = TextTunedModel(model, load_text_encoder(source), first, placeholder.vectors)
    return Trainee(model=tuned.train(), start=MoreWeights(source.weights, rows))


def merged(source: Source, trained: Mapping[str, Tensor], selection: Selection) -> Weights:
    """The whole language model, for export: `trained` (a checkpoint's) in place, the rest as in `source`."""
    if not isinstance(trained, Weights):
        trained = MemoryWeights(trained)
    if selection.everything:
        return trained
    base = SomeWeights(source.weights, DECODER, PROJECTION)
    if selection.lora:
        return MergedWeights(base, trained, selection.lora.scale)
    return ReplacedWeights(base, trained)
