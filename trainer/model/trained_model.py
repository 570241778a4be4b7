"""A model made ready for training, its trained parameters marked, and the whole model put together from them again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from trainer.model.language_model import LanguageModel, empty_language_model
from trainer.model.lora import adapted, add_adapters, with_adapters_merged
from trainer.model.new_word import extended_tokenizer, first_token, start_rows
from trainer.model.new_word_model import TextTunedModel
from trainer.model.source import LANGUAGE_MODEL, Source, load_text_encoder
from trainer.model.weights import Weights, weights_in_memory
from trainer.spec.trainable import TEXT_ROWS, NewWord, Selection


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """How a model is made ready for training.

    selection  which parameters are trained
    dropout    of the decoder while training, a probability in [0, 1)
    new_word   the word whose embeddings are learned, which `selection.new_rows` counts; None where none is
    seed       of the first values of new adapters
    """

    selection: Selection
    dropout: float
    new_word: NewWord | None
    seed: int


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A model on the meta device, in training mode. `requires_grad` of its parameters says which are trained.

    start  the first value of each of its parameters, by the model's own names; the frozen ones keep it. It may hold
           other tensors of the source as well
    """

    model: LanguageModel
    start: Weights


def build_trained_model(source: Source, settings: ModelSettings) -> TrainedModel:
    """`source` made ready for training.

    Nothing of it has memory but the T5 of a model that learns a word, which is on the CPU. Raises ModelError where the
    source's weights do not fit its configuration, and ConfigError where its tokenizer knows the placeholder already or
    does not know the word to start from.
    """
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
    """The frozen language model and T5, with trained rows for the tokens of a new word."""
    placeholder = new_word.placeholder
    first = first_token(extended_tokenizer(source.load_tokenizer(), placeholder), placeholder)
    rows = weights_in_memory({TEXT_ROWS: start_rows(source, new_word)})
    tuned = TextTunedModel(model, load_text_encoder(source), first, placeholder.vectors)
    return TrainedModel(model=tuned.train(), start=Weights(source.weights.stored | rows.stored))


def merged(source: Source, trained: Mapping[str, Tensor], selection: Selection) -> Weights:
    """The whole language model, for export and as a starting point; no tensor is read.

    source     the model that the run started with, whose frozen parameters are taken
    trained    the trained parameters by name, as a checkpoint holds them
    selection  which these are
    """
    if not isinstance(trained, Weights):
        trained = weights_in_memory(trained)
    if selection.everything:
        return trained
    base = source.weights.starting_with(*LANGUAGE_MODEL)
    if selection.lora:
        return with_adapters_merged(base, trained, selection.lora.scale)
    return base.replaced(trained)
