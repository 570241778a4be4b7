"""T5's vocabulary as the spiece.model from which transformers 4 makes its T5Tokenizer, which audiocraft uses.

The file is a protocol buffer of a few fields, written here by hand: neither sentencepiece nor protobuf is needed to
train. Source: sentencepiece 0.2, src/sentencepiece_model.proto (numbers of fields and of kinds of pieces).
"""

from __future__ import annotations

import base64
import json
import re
import struct
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

# Tokens for gaps, which T5Tokenizer puts behind the file's pieces itself.
GAP = re.compile(r"<extra_id_\d+>")
# Numbers of fields: of the model, of a piece, of the trainer's settings, of the normalizer's.
PIECES, TRAINER, NORMALIZER = 1, 2, 3
TEXT, SCORE, KIND = 1, 2, 3
MODEL_TYPE, VOCABULARY_SIZE, UNKNOWN_ID, BEGIN_ID, END_ID, PAD_ID = 3, 4, 40, 41, 42, 43
NAME, CHARACTERS = 1, 2
UNIGRAM, NORMAL, UNKNOWN, CONTROL = 1, 1, 2, 3


def sentencepiece_model(tokenizer: PreTrainedTokenizerBase) -> bytes | None:
    """The content of a spiece.model that splits texts as `tokenizer` does; None where no such file can.

    That is so for a tokenizer of another kind than T5's, and for one with tokens or rules beside those of T5, as a
    learned word brings.
    """
    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    model, characters = tree["model"], _characters(tree["normalizer"])
    special = {name: tokenizer.convert_tokens_to_ids(name) for name in ("<pad>", "</s>", "<unk>")}
    added = {token["content"] for token in tree["added_tokens"] if not GAP.fullmatch(token["content"])}
    if model["type"] != "Unigram" or model.get("byte_fallback") or characters is None or not added <= special.keys():
        return None
    pieces = [(text, score) for text, score in model["vocab"] if not GAP.fullmatch(text)]
    ids = {text: number for number, (text, _) in enumerate(pieces)}
    if any(ids.get(name) != number for name, number in special.items()):
        return None
    kinds = dict.fromkeys(special, CONTROL) | {"<unk>": UNKNOWN}
    trainer = {
        MODEL_TYPE: UNIGRAM,
        VOCABULARY_SIZE: len(pieces),
        UNKNOWN_ID: special["<unk>"],
        BEGIN_ID: -1,  # there is none
        END_ID: special["</s>"],
        PAD_ID: special["<pad>"],
    }
    name = "nmt_nfkc" if characters else "identity"
    fields = [(PIECES, _message({TEXT: text, SCORE: score, KIND: kinds.get(text, NORMAL)})) for text, score in pieces]
    return _fields(
        [*fields, (TRAINER, _message(trainer)), (NORMALIZER, _message({NAME: name, CHARACTERS: characters}))]
    )


def _characters(normalizer: Mapping[str, Any] | None) -> bytes | None:
    """sentencepiece's table of replaced characters, empty where none is; None for rules that it cannot hold."""
    if normalizer is None:
        return b""
    if normalizer["type"] == "Precompiled":
        return base64.b64decode(normalizer["precompiled_charsmap"])
    return None


def _message(values: Mapping[int, object]) -> bytes:
    return _fields(values.items())


def _fields(fields: Iterable[tuple[int, object]]) -> bytes:
    return b"".join(_field(number, value) for number, value in fields)


def _field(number: int, value: object) -> bytes:
    """A field as protocol buffers encode it: whole numbers as varints, floats in 4 bytes, the rest by its length."""
    match value:
        case float():
            return _varint(number << 3 | 5) + struct.pack("<f", value)
        case int():
            return _varint(number << 3) + _varint(value % 2**64)
        case _:
            content = value.encode() if isinstance(value, str) else value
            assert isinstance(content, bytes)
            return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    parts = []
    while value >= 128:
        parts.append(value % 128 + 128)
        value //= 128
    return bytes([*parts, value])
