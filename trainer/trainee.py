"""The model that is trained: which of its parameters move, where each starts, and what comes of them at the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer.models import DECODER, PROJECTION, LanguageModel, Source, empty_language_model, load_text_encoder
from trainer.selection import TEXT_ROWS, Selection
from trainer.text_embedding import extended_tokenizer, first_token, placeholder_of, start_rows
from trainer.text_in_loop import TextTunedModel
from trainer.weights import MemoryWeights, MoreWeights, ReplacedWeights, SomeWeights, Weights

if TYPE_CHECKING:
    from trainer.config import Config


@dataclass(frozen=True, kw_only=True)
class Trainee:
    """A model on the meta device whose parameters' requires_grad says what is trained.

    start  a value for each of its parameters, by the model's own names; the frozen ones keep it
    """

    model: LanguageModel
    start: Weights


def trainee_of(source: Source, config: Config) -> Trainee:
    """What `config` trains of `source`, in training mode and without memory, a T5 in the loop apart."""
    model, start = empty_language_model(source, dropout=config.dropout), source.weights
    placeholder = placeholder_of(config)
    if placeholder is not None:
        first = first_token(extended_tokenizer(source.load_tokenizer(), placeholder), placeholder)
        model = TextTunedModel(model, load_text_encoder(source), first, placeholder.vectors)
        start = MoreWeights(start, MemoryWeights({TEXT_ROWS: start_rows(source, placeholder, config.init_word)}))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(config.selection.trains(name))
    return Trainee(model=model, start=start)


def merged(source: Source, trained: Weights, selection: Selection) -> Weights:
    """The whole language model, for export: `trained` (a checkpoint's) in place, the rest as in `source`."""
    if selection.everything:
        return trained
    return ReplacedWeights(SomeWeights(source.weights, DECODER, PROJECTION), trained)
