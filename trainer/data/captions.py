"""The texts among which a clip's text is drawn each epoch: lines of its file, and variants with words left out.

All are made before training, so that T5 reads each of them once, into the cache. `trainer.data.order` draws which one
a clip has in an epoch, all with equal probability.
"""

from __future__ import annotations

import hashlib

import numpy as np

from trainer.data.music_fields import Fields, MergeRates, merged_variant

# Stands between the captions of one clip where its file has several (--caption_lines 1).
LINE = "\n"


def first_caption(caption: str | None) -> str | None:
    """The text with which a clip is validated: the first line of its caption, with all its words."""
    return None if caption is None else caption.split(LINE)[0]


def texts_of(
    caption: str | None,
    *,
    word_dropout: float,
    variants: int,
    seed: int,
    fields: Fields = (),
    merge: MergeRates | None = None,
) -> tuple[str | None, ...]:
    """The texts that a clip with this caption is trained on, one of which is drawn each epoch; None is no text.

    word_dropout  probability in [0, 1) of each word to be left out of a variant; 0 gives the lines themselves
    variants      how many there are of each line; some may be equal, and a variant that keeps no word is None
    fields        what is merged into the variants at the rates `merge`, before words are left out; a clip without
                  fields has nothing to merge

    Source: audiocraft 1.3.0, T5Conditioner.tokenize, which splits at spaces and takes "" as the null condition. It
    draws anew for every batch, which would need T5 in the training loop (docs/decisions.md).
    """
    lines: list[str | None] = [None] if caption is None else [*caption.split(LINE)]
    if fields and merge is not None and merge.on:
        texts = [(merged_variant(line, fields, merge, seed, i), i) for line in lines for i in range(variants)]
    elif word_dropout == 0 or caption is None:
        return tuple(lines)
    else:
        texts = [(line, variant) for line in lines for variant in range(variants)]
    if word_dropout == 0:
        return tuple(text for text, _ in texts)
    return tuple(None if text is None else thinned(text, word_dropout, seed, variant) for text, variant in texts)


def with_placeholder(text: str | None, placeholder: str) -> str:
    """`text` with the placeholder in it: "slow rock" becomes "<my-style> slow rock", no text the placeholder alone."""
    if text is None:
        return placeholder
    return text if placeholder in text else f"{placeholder} {text}"


def thinned(line: str, word_dropout: float, seed: int, variant: int) -> str | None:
    """`line` without some of its words, or None where no word is left: a function of (seed, line, variant)."""
    words = line.split(" ")
    key = int.from_bytes(hashlib.blake2b(line.encode(), digest_size=8).digest(), "big")
    draws = np.random.SeedSequence((seed, key, variant)).generate_state(len(words), np.uint64)
    kept = [word for word, draw in zip(words, draws, strict=True) if int(draw) >= word_dropout * 2**64]
    return " ".join(kept) or None
