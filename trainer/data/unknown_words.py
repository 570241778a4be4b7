"""Which words of captions T5's tokenizer does not know: it reads <unk> in their place, whatever they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from trainer.data.fates import display

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_WORDS = 10_000
WORDS_SHOWN, CHARACTERS_SHOWN = 3, 24


def unknown_words(tokenizer: PreTrainedTokenizerBase, captions: Iterable[str | None]) -> Mapping[str, tuple[str, ...]]:
    """The captions of which the tokenizer does not know every word, each with those words in their order.

    A word counts if a part of it is unknown. Each distinct word is looked at once and by itself: a tokenizer of T5's
    kind joins nothing across spaces.
    """
    words_of = {caption: tuple(dict.fromkeys(caption.split())) for caption in captions if caption is not None}
    distinct = sorted({word for words in words_of.values() for word in words})
    unknown = set()
    for start in range(0, len(distinct), BATCH_WORDS):
        batch = distinct[start : start + BATCH_WORDS]
        ids_of_words = tokenizer(batch, add_special_tokens=False).input_ids
        unknown |= {word for word, ids in zip(batch, ids_of_words, strict=True) if tokenizer.unk_token_id in ids}
    found = {caption: tuple(filter(unknown.__contains__, words)) for caption, words in words_of.items()}
    return {caption: words for caption, words in found.items() if words}


def remark(words: tuple[str, ...]) -> str:
    """What is said of a file whose caption holds these words."""
    shown = ", ".join(_shortened(display(word)) for word in words[:WORDS_SHOWN])
    more = f" and {len(words) - WORDS_SHOWN} more" if len(words) > WORDS_SHOWN else ""
    return f"T5 does not know {shown}{more} in its caption, and reads <unk> there"


def message(captions: int) -> str:
    """What is said of so many files whose captions hold words that T5 does not know; "" for none."""
    if captions == 0:
        return ""
    what = "1 caption holds" if captions == 1 else f"{captions:,} captions hold"
    return (
        f"{what} words that T5 does not know: it reads <unk> in their place, whatever they are. dataset.csv in the"
        " output folder names them; write such captions in English"
    )


def _shortened(word: str) -> str:
    return word if len(word) <= CHARACTERS_SHOWN else word[: CHARACTERS_SHOWN - 3] + "..."
