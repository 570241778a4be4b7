"""The model that is trained: which of its parameters move, where each starts, and what comes of them at the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer.models import DECODER, PROJECTION, LanguageModel, Source, empty_language_model
from trainer.selection import Selection
from trainer.weights import ReplacedWeights, SomeWeights, Weights

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
    """What `config` trains of `source`, in training mode and without memory."""
    model = empty_language_model(source, dropout=config.dropout)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(config.selection.trains(name))
    return Trainee(model=model, start=source.weights)


def merged(source: Source, trained: Weights, selection: Selection) -> Weights:
    """The whole language model, for export: `trained` (a checkpoint's) in place, the rest as in `source`."""
    if selection.everything:
        return trained
    return ReplacedWeights(SomeWeights(source.weights, DECODER, PROJECTION), trained)
