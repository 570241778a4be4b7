"""spiece.model, read by sentencepiece itself and compared with the tokenizer that it was made from."""

from __future__ import annotations

import io
import random

import pytest
from transformers import T5Tokenizer

from tests.exports.test_processor_files import TOKENIZERS
from trainer.exports.sentencepiece_model import sentencepiece_model
from trainer.model.debug_model import WORDS

sentencepiece = pytest.importorskip("sentencepiece")

LIGATURE, FULL_WIDTH = "\ufb01ne", "\uff21\uff22"  # "fi" as one sign, wide letters A and B
UNCOMMON = ["zither", "120", "(live)", "R&B,", "naïve", "音楽", "½", LIGATURE, FULL_WIDTH, "don't!", "♪♪"]


def texts() -> list[str]:
    draw = random.Random(4)
    return ["", " ", *(" ".join(draw.choices([*WORDS, *UNCOMMON, ""], k=draw.randrange(1, 12))) for _ in range(300))]


@pytest.mark.parametrize("kind", ["debug", "with gaps"])
def test_sentencepiece_splits_as_the_tokenizer_does(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    content = sentencepiece_model(tokenizer)
    assert content is not None
    processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    assert (processor.pad_id(), processor.eos_id(), processor.unk_id(), processor.bos_id()) == (0, 1, 2, -1)
    for text in texts():
        assert [*processor.encode(text), 1] == tokenizer(text).input_ids, text


def test_of_a_vocabulary_that_sentencepiece_trained_its_own_file_comes_back() -> None:
    """As the published T5's: by the rules of nmt_nfkc, wide letters and ligatures become plain ones."""
    proto = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts()), model_writer=trained, vocab_size=120, model_type="unigram",
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, normalization_rule_name="nmt_nfkc", minloglevel=2,
    )  # fmt: skip
    theirs = proto.ModelProto.FromString(trained.getvalue())
    pieces = [(piece.piece, piece.score) for piece in theirs.pieces]
    gaps = [(f"<extra_id_{number}>", 0.0) for number in reversed(range(100))]
    characters = theirs.normalizer_spec.precompiled_charsmap
    tokenizer = T5Tokenizer(vocab=[*pieces, *gaps], extra_ids=100, _spm_precompiled_charsmap=characters)
    content = sentencepiece_model(tokenizer)
    assert content is not None
    ours = proto.ModelProto.FromString(content)
    assert [(piece.piece, piece.score, piece.type) for piece in ours.pieces] == [
        (piece.piece, piece.score, piece.type) for piece in theirs.pieces
    ]
    assert ours.normalizer_spec.precompiled_charsmap == characters
    processors = [sentencepiece.SentencePieceProcessor(model_proto=file) for file in (content, trained.getvalue())]
    for text in [*texts(), f"{LIGATURE}\t{FULL_WIDTH}"]:
        assert processors[0].encode(text) == processors[1].encode(text), text


def test_a_tokenizer_with_a_learned_word_has_no_such_file() -> None:
    assert sentencepiece_model(TOKENIZERS["learned word"]()) is None
