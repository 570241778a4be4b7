"""A learned word: how captions with it are read, what T5 in the loop computes, and the file that holds it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.synthetic import RandomCodes
from trainer.data.batches import Batch, Examples
from trainer.data.captions import with_placeholder
from trainer.data.order import Row
from trainer.errors import ConfigError, ModelError
from trainer.model.language_model import LanguageModel, load_language_model
from trainer.model.new_word import (
    TABLE,
    TextEmbedding,
    TokenIds,
    extended_tokenizer,
    first_token,
    read_text_embedding,
    start_rows,
    with_embedding,
    write_text_embedding,
)
from trainer.model.new_word_model import TextTunedModel
from trainer.model.source import Source, load_text_encoder, open_model
from trainer.model.weights import weights_in_memory
from trainer.spec.shapes import KNOWN
from trainer.spec.trainable import NewWord, Placeholder

WORD = Placeholder(word="<my-style>", vectors=3)
CAPTIONS = ["<my-style> slow rock ballad", "metal with <my-style>", "<my-style>", None]


@pytest.fixture(scope="module")
def source() -> Source:
    return open_model("debug")


@pytest.fixture(scope="module")
def embedding(source: Source) -> TextEmbedding:
    rows = torch.randn(3, 512, generator=torch.Generator().manual_seed(3))
    return TextEmbedding(placeholder=WORD, rows_ND=rows, base_model="debug", text_encoder=source.text_identity())


def heeding_model(source: Source) -> LanguageModel:
    """The debug model, whose random projection hardly lets text through, with a stronger one."""
    model = load_language_model(source)
    model.enc_to_dec_proj.weight.data.mul_(8)
    return model


def model_with(source: Source, rows_ND: Tensor) -> TextTunedModel:
    tokenizer = extended_tokenizer(source.load_tokenizer(), WORD)
    model = TextTunedModel(
        heeding_model(source), load_text_encoder(source), first_token(tokenizer, WORD), len(rows_ND)
    )
    model.text_rows.data.copy_(rows_ND)
    return model


def batch_of(source: Source, captions: list[str | None]) -> Batch:
    """Clips of unlike lengths with these captions, as ids for T5 in the loop."""
    lengths = [20 + 5 * index for index in range(len(captions))]
    tokenizer = extended_tokenizer(source.load_tokenizer(), WORD)
    examples = Examples(
        codes=RandomCodes(lengths),
        text=TokenIds(tokenizer, [caption for caption in captions if caption]),
        captions=captions,
        names=[""] * len(captions),
        shape=KNOWN["debug"],
        special_token=2048,
        segment_frames=40,
        token_ids=True,
    )
    whole = {"epoch": 0, "view": 0, "start": 0, "drop_caption": False}
    return examples.batch([Row(clip=clip, frames=length, **whole) for clip, length in enumerate(lengths)])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("slow rock", "<my-style> slow rock"),
        ("slow <my-style> rock", "slow <my-style> rock"),
        (None, "<my-style>"),
    ],
)
def test_the_placeholder_stands_where_it_was_written_else_in_front(text: str | None, expected: str) -> None:
    assert with_placeholder(text, "<my-style>") == expected


@pytest.mark.parametrize("text", ["slow <my-style> rock", "<my-style> slow rock,", "rock <my-style>", "a<my-style>b"])
def test_the_placeholder_becomes_its_tokens_and_the_rest_the_tokens_it_was(source: Source, text: str) -> None:
    plain = source.load_tokenizer()
    tokenizer = extended_tokenizer(plain, WORD)
    before, after = (plain(part, add_special_tokens=False).input_ids for part in text.split("<my-style>"))
    new = list(range(len(plain), len(plain) + 3))
    assert tokenizer(text).input_ids == [*before, *new, *after, plain.eos_token_id]
    assert tokenizer("slow rock <my>").input_ids == plain("slow rock <my>").input_ids


def test_what_is_saved_of_the_tokenizer_reads_the_placeholder_too(source: Source, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = extended_tokenizer(source.load_tokenizer(), WORD)
    tokenizer.save_pretrained(tmp_path)
    text = "slow <my-style> rock"
    assert AutoTokenizer.from_pretrained(tmp_path)(text).input_ids == tokenizer(text).input_ids


def test_what_the_tokenizer_knows_or_does_not_know_is_refused(source: Source) -> None:
    for word, named in (("<pad>", "<pad>"), ("<my-style>", "<my-style>")):
        tokenizer = source.load_tokenizer()
        tokenizer.add_tokens(["<my-style>"])
        with pytest.raises(ConfigError, match=f"--placeholder {word}: the tokenizer knows {named} already"):
            extended_tokenizer(tokenizer, Placeholder(word=word, vectors=1))
    with pytest.raises(ConfigError, match="--init_word 音: the tokenizer does not know it"):
        start_rows(source, NewWord(placeholder=WORD, init_word="音"))


@pytest.mark.numbers
def test_new_rows_start_from_the_mean_of_the_words_pieces(source: Source) -> None:
    table = load_text_encoder(source).get_input_embeddings().weight
    ids = source.load_tokenizer()("hi rock", add_special_tokens=False).input_ids
    assert len(ids) > 2
    rows = start_rows(source, NewWord(placeholder=WORD, init_word="hi rock"))
    assert rows.shape == (3, 512)
    assert all(torch.allclose(row, torch.stack([table[index] for index in ids]).mean(0)) for row in rows)


@pytest.mark.numbers
def test_t5_in_the_loop_gives_the_logits_of_cached_states_of_an_extended_t5(
    source: Source, embedding: TextEmbedding
) -> None:
    known = with_embedding(source, embedding)
    encoder, tokenizer = load_text_encoder(known), known.load_tokenizer()
    states = {c: encoder(**tokenizer(c, return_tensors="pt")).last_hidden_state[0] for c in CAPTIONS if c}
    batch = batch_of(source, CAPTIONS)
    cached = torch.zeros(*batch.text_mask_BS.shape, 512)
    for index, caption in enumerate(CAPTIONS):
        if caption is not None:
            cached[index, : len(states[caption])] = states[caption]
    rest = (batch.text_mask_BS, batch.attention_BS)
    with torch.no_grad():
        expected = heeding_model(source)(batch.inputs_BKT, cached, *rest)
        logits = model_with(source, embedding.rows_ND)(batch.inputs_BKT, batch.text_BSD, *rest)
        other = model_with(source, embedding.rows_ND + 1)(batch.inputs_BKT, batch.text_BSD, *rest)
    assert (logits - expected).abs().max() < 1e-5 < 1e-2 < (other - expected).abs().max()


@pytest.mark.numbers
def test_the_gradient_of_the_rows_is_that_of_the_loss(source: Source, embedding: TextEmbedding) -> None:
    """Against a difference quotient along the gradient itself, through T5, projection and decoder."""
    model, batch = model_with(source, embedding.rows_ND), batch_of(source, CAPTIONS)
    loss_of(model, batch).backward()
    gradient = model.text_rows.grad
    (encoder,) = model._outside
    assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == ["text_rows"]
    assert all(parameter.grad is None for parameter in encoder.parameters())
    change = 0.1 * gradient / gradient.norm()
    with torch.no_grad():
        ahead, behind = (
            loss_of(model_with(source, embedding.rows_ND + sign * change), batch).double() for sign in (1, -1)
        )
    assert (ahead - behind).item() == pytest.approx(2 * (gradient * change).sum().item(), rel=2e-2)


def loss_of(model: TextTunedModel, batch: Batch) -> Tensor:
    return model(
        batch.inputs_BKT, batch.text_BSD, batch.text_mask_BS, batch.attention_BS, labels_BKT=batch.labels_BKT
    ).sum()


def test_a_dropped_caption_takes_the_placeholder_with_it(source: Source, embedding: TextEmbedding) -> None:
    """A null condition knows nothing of the rows, alone and beside captions, and is finite."""
    alone, mixed = batch_of(source, [None, None]), batch_of(source, [None, "<my-style> rock"])
    for batch in (alone, mixed):
        logits = []
        for shift in (0.0, 5.0):
            with torch.no_grad():
                model = model_with(source, embedding.rows_ND + shift)
                logits.append(model(batch.inputs_BKT, batch.text_BSD, batch.text_mask_BS, batch.attention_BS))
        assert torch.equal(logits[0][0], logits[1][0]) and logits[0].isfinite().all()
    assert not torch.equal(logits[0][1], logits[1][1])


def test_t5_stays_in_eval_mode_and_outside_of_the_module(source: Source, embedding: TextEmbedding) -> None:
    model = model_with(source, embedding.rows_ND).train()
    (encoder,) = model._outside
    assert encoder.config.dropout_rate > 0 and not any(module.training for module in encoder.modules())
    assert {name for name, _ in model.named_parameters()} == {
        *(name for name, _ in load_language_model(source).named_parameters()),
        "text_rows",
    }


@pytest.mark.parametrize("spare", [0, 28], ids=["no spare rows", "28 spare rows, as the published T5"])
def test_a_source_with_the_word_has_all_other_rows_as_they_were(
    source: Source, embedding: TextEmbedding, spare: int
) -> None:
    size = len(source.load_tokenizer())
    table = torch.randn(size + spare, 512)
    roomy = replace(source, weights=source.weights.replaced(weights_in_memory({TABLE: table})))
    known = with_embedding(roomy, replace(embedding, text_encoder=roomy.text_identity()))
    grown = known.weights[TABLE]
    assert torch.equal(grown[size : size + 3], embedding.rows_ND)
    assert len(grown) == max(size + spare, size + 3) == known.config.text_encoder.vocab_size
    assert torch.equal(grown[:size], table[:size]) and torch.equal(grown[size + 3 :], table[size + 3 :])
    assert roomy.config.text_encoder.vocab_size == size
    unchanged = set(known.weights) - {TABLE}
    assert all(torch.equal(known.weights[name], source.weights[name]) for name in unchanged)


def test_the_file_is_some_kilobytes_and_gives_back_what_was_written(embedding: TextEmbedding, tmp_path: Path) -> None:
    write_text_embedding(embedding, tmp_path / "word.safetensors")
    assert (tmp_path / "word.safetensors").stat().st_size < 3 * 512 * 4 + 1024
    read_back = read_text_embedding(tmp_path / "word.safetensors")
    assert torch.equal(read_back.rows_ND, embedding.rows_ND)
    assert replace(read_back, rows_ND=embedding.rows_ND) == embedding


def test_a_file_that_is_none_and_another_t5_are_refused(
    source: Source, embedding: TextEmbedding, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    (tmp_path / "text.safetensors").write_text("no tensors")
    save_file({"rows": torch.zeros(1)}, tmp_path / "bare.safetensors")
    for name in ("absent", "text", "bare"):
        with pytest.raises(ModelError, match=f"{name}.safetensors cannot be read as a text embedding"):
            read_text_embedding(tmp_path / f"{name}.safetensors")
    with pytest.raises(ModelError, match="whose T5 is another than that of debug"):
        with_embedding(source, replace(embedding, text_encoder="abc"))
