"""A model between the one that a run started from and the one that it made, or a little beyond: its strength.

w = base + strength x (tuned - base), for each float tensor of the language model, and for T5's input embedding where
the run learned a word. At 0 it is the base, at 1 the tuned model, above 1 the difference is exaggerated. No tensor is
read before it is asked for, so that no second copy of a model is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trainer.errors import ConfigError, ModelError
from trainer.model.new_word import TABLE, TextEmbedding, learned_tokens, start_rows
from trainer.model.source import LANGUAGE_MODEL, Source
from trainer.model.weights import StoredTensor, Weights
from trainer.spec.trainable import NewWord

MOST = 2.0
CHUNK = 1 << 22  # values computed at once: in float64, 32 MiB for each operand


def check_strength(strength: float) -> None:
    """Raise ConfigError for a strength that is none from 0 to MOST."""
    if not 0 <= strength <= MOST:  # what is no number is in no range
        raise ConfigError(
            f"--strength {strength:g} cannot be used: it takes a number from 0 (the model that the run started from)"
            f" over 1 (what it made) to {MOST:g}"
        )


def at_strength(base: Source, tuned: Source, strength: float) -> Source:
    """`tuned` with the weights base + strength x (tuned - base), float32, each computed when it is asked for.

    base      what the run started from
    tuned     what it made; all but the weights is taken from it, and so are EnCodec and T5
    strength  0 to 2; at 0 and at 1 the tensors are those that base or tuned has stored, in their dtype

    Where a word was learned, T5's input embedding is between as well: then `base` must know the word too, with the rows
    that it started from. Raises ConfigError for another strength, ModelError where the two are no models of one shape.
    """
    check_strength(strength)
    _refuse_other_words(base, tuned)
    names = LANGUAGE_MODEL if not learned_tokens(tuned) else (*LANGUAGE_MODEL, TABLE)
    mixed = weights_at_strength(
        base.weights.starting_with(*names),
        tuned.weights.starting_with(*names),
        strength,
        base_name=base.name,
        tuned_name=tuned.name,
    )
    name = f"{tuned.name} at strength {strength:g}"
    return replace(tuned, name=name, weights=tuned.weights.replaced(mixed))


def weights_at_strength(
    base: Weights, tuned: Weights, strength: float, *, base_name: str, tuned_name: str
) -> Weights:
    """The same for weights alone, which must have the same names and shapes. Raises as `at_strength` does."""
    check_strength(strength)
    _refuse_other_shapes(_shapes(base), _shapes(tuned), base_name, tuned_name)
    if strength in (0, 1):
        return tuned if strength else base
    between: dict[str, StoredTensor] = {
        name: _Between(shape=there.shape, base=base.stored[name], tuned=there, strength=strength)
        for name, there in tuned.stored.items()
    }
    return Weights(between)


def embedding_at_strength(source: Source, new_word: NewWord, learned: TextEmbedding, strength: float) -> TextEmbedding:
    """A learned word whose rows are start + strength x (learned - start).

    source    the model that the run started from
    new_word  with the word from which the rows started
    """
    check_strength(strength)
    start = start_rows(source, new_word)
    if strength in (0, 1):
        return learned if strength else replace(learned, rows_ND=start)
    return replace(learned, rows_ND=_mixed(start, learned.rows_ND.cpu(), strength))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Between(StoredTensor):
    """base + strength x (tuned - base), float32; what is no float tensor is the tuned model's."""

    base: StoredTensor
    tuned: StoredTensor
    strength: float

    def read(self, start: int, stop: int) -> Tensor:
        return _mixed(self.base.read(start, stop), self.tuned.read(start, stop), self.strength)

    def whole(self) -> Tensor:
        # Not by `read`, range by range: a tensor that is computed is computed whole for each range.
        return _mixed(self.base.whole(), self.tuned.whole(), self.strength)


def _mixed(base: Tensor, tuned: Tensor, strength: float) -> Tensor:
    """base + strength x (tuned - base) in float64, rounded once to float32.

    In float32 the difference would be rounded first: half of it added to the base is not always the mean then.
    """
    if not tuned.is_floating_point():
        return tuned
    made = torch.empty(tuned.shape)
    pieces = (values.detach().reshape(-1).split(CHUNK) for values in (base, tuned, made))
    for of_base, of_tuned, piece in zip(*pieces, strict=True):
        start = of_base.double()
        piece.copy_(of_tuned.double().sub_(start).mul_(strength).add_(start))
    return made


def _shapes(weights: Weights) -> dict[str, tuple[int, ...]]:
    return {name: weights.shape(name) for name in weights}


def _refuse_other_shapes(
    base: Mapping[str, tuple[int, ...]], tuned: Mapping[str, tuple[int, ...]], base_name: str, tuned_name: str
) -> None:
    wrong = sorted(name for name in base.keys() | tuned.keys() if base.get(name) != tuned.get(name))
    if wrong:
        name = wrong[0]
        raise ModelError(
            f"there is nothing between {base_name} and {tuned_name}: {len(wrong)} of their tensors differ in shape or"
            f" are in one of them only ({name}: {base.get(name, 'absent')} there, {tuned.get(name, 'absent')} here)."
            " Give --base the model that the run started from, for a stereo run the stereo one"
        )


def _refuse_other_words(base: Source, tuned: Source) -> None:
    words, others = learned_tokens(tuned), learned_tokens(base)
    if words != others:
        known, other = (", ".join(sorted(tokens)) or "no learned word" for tokens in (words, others))
        raise ModelError(
            f"there is nothing between {base.name} and {tuned.name}: the tokenizer of the second knows {known}, that of"
            f" the first {other}. Give --model the output_dir of the run that learned the word, which says what it"
            " started from, and no --base"
        )
