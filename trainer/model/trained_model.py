"""The model that is trained: which of its parameters move, where each starts, and what comes of them at the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from trainer.model.language_model import LanguageModel, empty_language_model
from trainer.model.lora import adapted, add_adapters, with_adapters_merged
from trainer.model.new_word import extended_tokenizer, first_token, start_rows
from trainer.model.new_word_model import TextTunedModel
from trainer.model.source import DECODER, PROJECTION, Source, load_text_encoder
from trainer.model.weights import Weights, weights_in_memory
from trainer.spec.trainable import TEXT_ROWS, NewWord, Selection


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """How a model is built for training.

    selection  what of it is trained
    dropout    of the decoder while training, a probability in [0, 1)
    new_word   what `selection.new_rows` are of; None where no word is learned
    seed       of the values that new adapters start with
    """

    selection: Selection
    dropout: float
    new_word: NewWord | None
    seed: int


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A model on the meta device whose parameters' requires_grad says what is trained.

    start  a value for each of its parameters, by the model's own names; the frozen ones keep it
    """

    model: LanguageModel
    start: Weights


def build_trained_model(source: Source, settings: ModelSettings) -> TrainedModel:
    """What is trained of `source`, in training mode and without memory, a T5 in the loop apart."""
    model, selection = empty_language_model(source, dropout=settings.dropout), settings.selection
    if settings.new_word is not None:
        return _learning(source, model, settings.new_word)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(selection.trains(name))
    if selection.lora is None:
        return TrainedModel(model=model, start=source.weights)
    add_adapters(model, selection.lora)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return TrainedModel(model=model, start=adapted(source.weights, shapes, seed=settings.seed))


def _learning(source: Source, model: LanguageModel, new_word: NewWord) -> TrainedModel:
    """The frozen model behind T5, with the new rows of a word."""
    placeholder = new_word.placeholder
    first = first_token(extended_tokenizer(source.load_tokenizer(), placeholder), placeholder)
    rows = weights_in_memory({TEXT_ROWS: start_rows(source, new_word)})
    tuned = TextTunedModel(model, load_text_encoder(source), first, placeholder.vectors)
    return TrainedModel(model=tuned.train(), start=Weights(source.weights.stored | rows.stored))


def merged(source: Source, trained: Mapping[str, Tensor], selection: Selection) -> Weights:
    """The whole language model, for export: `trained` (a checkpoint's) in place, the rest as in `source`."""
    if not isinstance(trained, Weights):
        trained = weights_in_memory(trained)
    if selection.everything:
        return trained
    base = source.weights.starting_with(DECODER, PROJECTION)
    if selection.lora:
        return with_adapters_merged(base, trained, selection.lora.scale)
    return base.replaced(trained)
