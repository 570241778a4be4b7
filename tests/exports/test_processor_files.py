"""The files of a tokenizer and a feature extractor: in the form of transformers 4, which version 5 reads as well."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoProcessor, AutoTokenizer, T5Tokenizer

from trainer.exports.processor_files import save_processor, save_tokenizer
from trainer.model.debug_model import debug_tokenizer
from trainer.model.new_word import extended_tokenizer
from trainer.model.source import Source
from trainer.spec.trainable import Placeholder

TEXT = "slow <my-style> rock, <extra_id_0> 120 bpm"


def tokenizer_with_gaps() -> T5Tokenizer:
    """As the published T5's: with 100 tokens for gaps at the end of its vocabulary, the last first."""
    vocabulary = json.loads(debug_tokenizer().backend_tokenizer.to_str())["model"]["vocab"]
    gaps = [(f"<extra_id_{number}>", 0.0) for number in reversed(range(100))]
    return T5Tokenizer(vocab=[*map(tuple, vocabulary), *gaps], extra_ids=100, model_max_length=512)


TOKENIZERS = {
    "debug": debug_tokenizer,
    "with gaps": tokenizer_with_gaps,
    "learned word": lambda: extended_tokenizer(debug_tokenizer(), Placeholder(word="<my-style>", vectors=2)),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_saved_tokenizer_is_in_the_form_of_version_4_and_reads_as_before(kind: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[kind]()
    save_tokenizer(tokenizer, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    # transformers 4.57, tokenization_utils_base.py: it must be a dictionary, if it is there
    assert isinstance(config.get("extra_special_tokens", {}), dict)
    assert config["tokenizer_class"] in ("T5Tokenizer", "PreTrainedTokenizerFast")  # classes of version 4
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(TEXT).input_ids == tokenizer(TEXT).input_ids
    assert set(again.all_special_tokens) == set(tokenizer.all_special_tokens)
    assert (len(again), again.model_max_length) == (len(tokenizer), 512)


def test_a_saved_processor_is_in_the_form_of_the_published_models(source: Source, tmp_path: Path) -> None:
    """Version 4 looks for preprocessor_config.json, and before 4.50 fails where there is a processor_config.json."""
    save_processor(replace(source, load_tokenizer=tokenizer_with_gaps), tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"}
    again = AutoProcessor.from_pretrained(tmp_path)
    assert again.feature_extractor.to_dict() == source.load_feature_extractor().to_dict()
    assert again.tokenizer(TEXT).input_ids == tokenizer_with_gaps()(TEXT).input_ids
