"""Words that the tokenizer does not know."""

from __future__ import annotations

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trainer.data.unknown_words import message, remark, unknown_words
from trainer.model.debug_model import debug_tokenizer
from trainer.model.new_word import extended_tokenizer
from trainer.spec.trainable import Placeholder

CAPTIONS = [
    "slow rock", "音楽 slow", "ロック slow", "тихо", "sanfte Töne", "🎸 and 🎸🎸", "<x> {y} ~", "full\u3000width",
    "a\u2013b", "ﬁne", None, "slow 音楽 rock テスト",
]  # fmt: skip


def with_nfkc() -> PreTrainedTokenizerFast:
    """As T5's own, whose normalizer rewrites characters before they are looked up."""
    pieces = [("<unk>", -9.0), ("▁", -1.0), *((chr(code), -2.0) for code in range(33, 256))]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def test_a_caption_has_unknown_words_where_its_ids_have_unk() -> None:
    for tokenizer in (debug_tokenizer(), with_nfkc()):
        found = unknown_words(tokenizer, CAPTIONS)
        for caption in filter(None, CAPTIONS):
            assert (tokenizer.unk_token_id in tokenizer(caption).input_ids) == (caption in found), caption
        assert found["slow 音楽 rock テスト"] == ("音楽", "テスト")


def test_a_learned_word_is_known() -> None:
    tokenizer = extended_tokenizer(with_nfkc(), Placeholder(word="<my-style>", vectors=2))
    assert unknown_words(tokenizer, ["<my-style> slow", "<my-style>音"]) == {"<my-style>音": ("<my-style>音",)}


def test_a_remark_shows_some_words_and_the_message_counts_captions() -> None:
    assert remark(("a" * 50, "b\x1b")).startswith(f"T5 does not know {'a' * 21}..., b\\x1b in its caption, and")
    assert "b, c and 2 more" in remark(("a", "b", "c", "d", "e"))
    assert message(0) == "" and message(1).startswith("1 caption holds words that T5 does not know")
    assert message(1_234).startswith("1,234 captions hold words that T5 does not know")
