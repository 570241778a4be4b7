"""The files of a tokenizer and of a feature extractor, in the form that transformers 4 and 5 both read.

transformers 5 writes a form of its own that it alone reads: a list where version 4 wants a dictionary, a class that
version 4 does not have, and a processor_config.json at which versions before 4.50 fail. The form of version 4, in
which the published models are, is read by both. Tried with 4.46.3, 4.57.6, 5.10.0 and 5.23.0.

transformers makes the feature extractor of melody models only where torchaudio is installed. Its file is written here
without it, and everything else in the folder loads without it too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from trainer.exports.sentencepiece_model import sentencepiece_model
from trainer.model.source import Source

PIECES = "spiece.model"
TOKENIZER_CONFIG, EXTRACTOR_CONFIG, PROCESSOR_CONFIG = (
    "tokenizer_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)
# What MusicgenMelodyFeatureExtractor says of itself, which is the same for all models. Source: what its save_pretrained
# writes in transformers 5.23.0 with torchaudio 2.11.0.
MELODY_EXTRACTOR = {
    "chunk_length": 30,
    "feature_extractor_type": "MusicgenMelodyFeatureExtractor",
    "feature_size": 12,
    "hop_length": 4096,
    "n_fft": 16384,
    "n_samples": 960_000,
    "padding_side": "right",
    "padding_value": 0.0,
    "return_attention_mask": False,
    "sampling_rate": 32_000,
    "stem_indices": [3, 2],
}
# What transformers 5 calls its class for any tokenizer.json, by its name in version 4, which version 5 knows as well.
CLASSES_OF_VERSION_4 = {"TokenizersBackend": "PreTrainedTokenizerFast"}


def save_processor(source: Source, folder: Path) -> None:
    """Write what AutoProcessor.from_pretrained(folder) loads: tokenizer and feature extractor.

    That is a MusicgenProcessor, or of a melody model a MusicgenMelodyProcessor.
    """
    name = "MusicgenMelodyProcessor" if source.melody else "MusicgenProcessor"
    source.load_tokenizer().save_pretrained(folder)
    _to_version_4(folder / TOKENIZER_CONFIG)
    _write(folder / TOKENIZER_CONFIG, _read(folder / TOKENIZER_CONFIG) | {"processor_class": name})
    extractor = MELODY_EXTRACTOR if source.melody else _codec_extractor(source)
    _write(folder / EXTRACTOR_CONFIG, extractor | {"processor_class": name})


def _codec_extractor(source: Source) -> dict[str, Any]:
    """What the feature extractor of a text model says of itself, which takes sound of the model's channels."""
    content: dict[str, Any] = json.loads(source.load_feature_extractor().to_json_string())
    return content | {"feature_size": source.channels}


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
