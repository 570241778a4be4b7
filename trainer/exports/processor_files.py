"""The files of a tokenizer and of a feature extractor, in the form that transformers 4 and 5 both read.

transformers 5 writes a form of its own that it alone reads: a list where version 4 wants a dictionary, a class that
version 4 does not have, and a processor_config.json at which versions before 4.50 fail. The form of version 4, in
which the published models are, is read by both. Tried with 4.46.3, 4.57.6, 5.10.0 and 5.23.0.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import MusicgenProcessor, PreTrainedTokenizerBase

from trainer.exports.sentencepiece_model import sentencepiece_model
from trainer.model.source import Source

PIECES = "spiece.model"
TOKENIZER_CONFIG, EXTRACTOR_CONFIG, PROCESSOR_CONFIG = (
    "tokenizer_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)
# What transformers 5 calls its class for any tokenizer.json, by its name in version 4, which version 5 knows as well.
CLASSES_OF_VERSION_4 = {"TokenizersBackend": "PreTrainedTokenizerFast"}


def save_processor(source: Source, folder: Path) -> None:
    """Write what MusicgenProcessor.from_pretrained(folder) loads: tokenizer and feature extractor."""
    MusicgenProcessor(source.load_feature_extractor(), source.load_tokenizer()).save_pretrained(folder)
    _to_version_4(folder / TOKENIZER_CONFIG)
    processor = _read(folder / PROCESSOR_CONFIG)
    extractor = processor["feature_extractor"] | {"processor_class": processor["processor_class"]}
    _write(folder / EXTRACTOR_CONFIG, extractor)
    (folder / PROCESSOR_CONFIG).unlink()


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write what AutoTokenizer.from_pretrained(folder) loads, and T5Tokenizer of version 4 where it can be had.

    That one is made from a spiece.model, which is written unless the tokenizer knows more than such a file can hold.
    """
    tokenizer.save_pretrained(folder)
    _to_version_4(folder / TOKENIZER_CONFIG)
    pieces = sentencepiece_model(tokenizer)
    if pieces is not None:
        (folder / PIECES).write_bytes(pieces)


def _to_version_4(file: Path) -> None:
    config = _read(file)
    config.pop("backend", None)
    special = config.pop("extra_special_tokens", None)
    if special:  # T5's 100 tokens for gaps; version 5 reads them under their former name as well
        config["additional_special_tokens"] = special
    else:  # version 4 opens a processor's tokenizer as T5's, which adds them unless it is told their number
        config["extra_ids"] = 0
    name = config["tokenizer_class"]
    config["tokenizer_class"] = CLASSES_OF_VERSION_4.get(name, name)
    _write(file, config)


def _read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
