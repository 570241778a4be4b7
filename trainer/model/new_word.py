"""A new word for T5: the tokenizer that knows it, the rows of T5's input embedding that are learned, and their file.

The word, a placeholder as <my-style>, becomes one or more new tokens behind the tokenizer's last one, each with a row
of its own. T5's other rows, and all else, stay the base model's.
Source: textual inversion, arXiv 2208.01618, with several vectors per word as in its section 5.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tokenizers import AddedToken, Tokenizer, normalizers
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from trainer.atomic import write_whole
from trainer.errors import ConfigError, ModelError, StorageError
from trainer.model.source import TEXT_ENCODER, Source
from trainer.model.weights import Weights, weights_in_memory
from trainer.spec.trainable import TEXT_ROWS, NewWord, Placeholder

FILE = "text_embedding.safetensors"
TABLE = TEXT_ENCODER + "shared.weight"
ROWS = "rows"
# How Placeholder.tokens are named.
LEARNED_TOKEN = re.compile(r"<.+:\d+>")
METADATA = ("placeholder", "tokens", "base_model", "text_encoder")


@dataclass(frozen=True, kw_only=True)
class TextEmbedding:
    """A learned word.

    rows_ND       (N, D) float32, rows of T5's input embedding, in the order of the placeholder's tokens
    base_model    the name of the model that they were learned with
    text_encoder  the digest of the T5 that they were learned with (Source.text_identity); they mean nothing to another
    """

    placeholder: Placeholder
    rows_ND: Tensor
    base_model: str
    text_encoder: str


class TokenIds:
    """The token ids of some texts, each tokenized once: what is cached where T5 runs in the training loop."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]):
        self._ids_of = {text: _ids(tokenizer, text) for text in texts}

    def states(self, caption: str) -> np.ndarray:
        """Token ids of a caption, (S,) int64, </s> included. Raises KeyError for a text that was not given."""
        return self._ids_of[caption]

    def tokens(self, caption: str) -> int:
        return len(self._ids_of[caption])


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> np.ndarray:
    """All of a text's ids: T5's positions are relative, so that no text is too long."""
    return np.array(tokenizer(text, truncation=False, verbose=False).input_ids, dtype=np.int64)


def introduction(source: Source, new_word: NewWord, learning_rate: float) -> str:
    """A message to the user: what the run is about to learn, and whether its learning rate can move it.

    Raises ConfigError where the tokenizer knows --placeholder already, or knows --init_word not at all.
    """
    placeholder = new_word.placeholder
    extended_tokenizer(source.load_tokenizer(), placeholder)
    deviation = float(start_rows(source, new_word)[0].std())
    return (
        f"learning {placeholder.word}: {placeholder.vectors} new row(s) of T5's embedding, which start from"
        f" '{new_word.init_word}'. Their values have a deviation of {deviation:.3g}: --lr {learning_rate:g} moves them"
        f" by at most {100 * learning_rate / deviation:.2g} % of it per step; some per cent ({0.03 * deviation:.2g}) is"
        " usual"
    )


def embedding_of(source: Source, placeholder: Placeholder, trained: Weights) -> TextEmbedding:
    """What a run has learned of a word.

    source   the model that the run started with
    trained  the tensors of the run's checkpoint
    """
    digest = source.text_identity()
    return TextEmbedding(
        placeholder=placeholder, rows_ND=trained[TEXT_ROWS], base_model=source.name, text_encoder=digest
    )


def extended_tokenizer(tokenizer: PreTrainedTokenizerBase, placeholder: Placeholder) -> PreTrainedTokenizerBase:
    """A tokenizer that reads the placeholder, wherever it stands in a text, as its new tokens.

    They follow the last token that `tokenizer` has, and all other text gives the tokens that it gave before. The
    tokenizer that save_pretrained writes reads the placeholder too. Raises ConfigError where `tokenizer` knows the
    placeholder already.
    """
    known = tokenizer.get_vocab()
    taken = [name for name in (placeholder.word, *placeholder.tokens) if name in known]
    if taken:
        raise ConfigError(f"--placeholder {placeholder.word}: the tokenizer knows {taken[0]} already; choose another")
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    spelled = normalizers.Replace(placeholder.word, "".join(placeholder.tokens))
    former = backend.normalizer
    backend.normalizer = spelled if former is None else normalizers.Sequence([spelled, former])
    backend.add_tokens([AddedToken(name) for name in placeholder.tokens])
    # Not a T5Tokenizer: that builds its own normalizer when it is loaded, which does not know the placeholder.
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=tokenizer.model_max_length,
        model_input_names=tokenizer.model_input_names,
        **tokenizer.special_tokens_map,
    )


def learned_tokens(source: Source) -> frozenset[str]:
    """The tokens of all learned words that the model's tokenizer knows; none of a model as it was published."""
    return frozenset(name for name in source.load_tokenizer().get_added_vocab() if LEARNED_TOKEN.fullmatch(name))


def first_token(tokenizer: PreTrainedTokenizerBase, placeholder: Placeholder) -> int:
    """The id of the placeholder's first token; the others follow it."""
    return int(tokenizer.convert_tokens_to_ids(placeholder.tokens[0]))


def start_rows(source: Source, new_word: NewWord) -> Tensor:
    """The new rows' first values, (N, D) float32: each is the mean of T5's rows of the tokens of `new_word.init_word`.

    Raises ConfigError where the tokenizer does not know that word.
    """
    tokenizer, init_word = source.load_tokenizer(), new_word.init_word
    pieces = tokenizer(init_word, add_special_tokens=False).input_ids
    if not pieces or tokenizer.unk_token_id in pieces:
        raise ConfigError(f"--init_word {init_word}: the tokenizer does not know it; use a common English word")
    width = source.weights.shape(TABLE)[1]
    rows = torch.stack([source.weights.read(TABLE, piece * width, (piece + 1) * width).float() for piece in pieces])
    return rows.mean(dim=0).repeat(new_word.placeholder.vectors, 1)


def with_embedding(source: Source, embedding: TextEmbedding) -> Source:
    """`source` with the learned word: its tokenizer reads the placeholder, its T5 has the rows.

    T5's embedding grows only by the rows that it lacks: behind the tokenizer's last token the published one has 28 that
    no token uses. Raises ModelError where the word was learned with another T5, ConfigError where the tokenizer knows
    the placeholder already.
    """
    if embedding.text_encoder != source.text_identity():
        raise ModelError(
            f"the text embedding of {embedding.placeholder.word} was learned with {embedding.base_model}, whose T5 is"
            f" another than that of {source.name}: use the model that it was learned with"
        )
    tokenizer = extended_tokenizer(source.load_tokenizer(), embedding.placeholder)
    first = first_token(tokenizer, embedding.placeholder)
    table, last = source.weights[TABLE].float(), first + len(embedding.rows_ND)
    grown = torch.zeros(max(len(table), last), table.shape[1])
    grown[: len(table)] = table
    grown[first:last] = embedding.rows_ND
    config = copy.deepcopy(source.config)
    config.text_encoder.vocab_size = len(grown)
    return replace(
        source,
        config=config,
        weights=source.weights.replaced(weights_in_memory({TABLE: grown})),
        load_tokenizer=lambda: tokenizer,
    )


def write_text_embedding(embedding: TextEmbedding, path: Path) -> None:
    """Write a learned word as safetensors of some KB, complete or not at all. Raises StorageError."""
    placeholder = embedding.placeholder
    values = (placeholder.word, " ".join(placeholder.tokens), embedding.base_model, embedding.text_encoder)
    rows = embedding.rows_ND.detach().to("cpu", torch.float32).contiguous()
    try:
        write_whole(path, save({ROWS: rows}, metadata=dict(zip(METADATA, values, strict=True))))
    except OSError as error:
        raise StorageError(f"{path} could not be written: {error}") from error


def read_text_embedding(path: Path) -> TextEmbedding:
    """The inverse of `write_text_embedding`. Raises ModelError where the file is of another kind."""
    try:
        with safe_open(path, framework="pt") as file:
            word, tokens, base_model, text_encoder = ((file.metadata() or {})[name] for name in METADATA)
            rows = file.get_tensor(ROWS)
    except (OSError, SafetensorError, KeyError) as error:
        raise ModelError(
            f"{path} cannot be read as a text embedding ({error}): give the {FILE} of a run with --tune_text 1"
        ) from error
    placeholder = Placeholder(word=word, vectors=len(rows))
    if tuple(tokens.split()) != placeholder.tokens or rows.ndim != 2:
        raise ModelError(f"{path}: its {len(rows)} rows and the tokens {tokens} do not belong together")
    return TextEmbedding(placeholder=placeholder, rows_ND=rows, base_model=base_model, text_encoder=text_encoder)
