"""The texts that the model is given for the clips: their captions with what stands in every one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trainer.data import cache, music_fields, unknown_words
from trainer.data.batches import Text
from trainer.data.captions import LINE, first_caption, texts_of, with_placeholder
from trainer.data.manifest import Columns
from trainer.data.music_fields import MergeRates
from trainer.data.peers import Peers
from trainer.model.new_word import TokenIds, extended_tokenizer
from trainer.model.source import Source, load_text_encoder
from trainer.spec.trainable import Placeholder
from trainer.spec.trigger import Trigger


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """What is made of captions. The fields are those of `DataSettings`, which says what they are.

    lines  whether each line of a caption is a caption of its own
    merge  at which rates fields of metadata are merged into captions
    """

    word_dropout: float
    caption_variants: int
    lines: bool
    merge: MergeRates
    placeholder: Placeholder | None
    trigger: Trigger | None
    seed: int

    def first(self, clips: Columns) -> list[str | None]:
        """The text by which each clip is validated; None is no text."""
        return [self.put_into(first_caption(caption)) for caption in clips["caption"]]

    def drawn(self, clips: Columns) -> list[tuple[str | None, ...]] | None:
        """The texts among which each clip's is drawn; None where every clip always has its caption."""
        rate, merge = self.word_dropout, self.merge
        if rate == 0 and not self.lines and not merge.on:
            return None
        captions = clips["caption"]
        if self.trigger is not None and rate > 0:
            captions = [_without_trigger(self.trigger, caption) for caption in captions]
        drawn = [
            texts_of(
                caption, word_dropout=rate, variants=self.caption_variants, seed=self.seed, merge=merge,
                fields=music_fields.of_text(fields),
            )
            for caption, fields in zip(captions, clips["caption_fields"], strict=True)
        ]
        return [tuple(self.put_into(text) for text in texts) for texts in drawn]

    def put_into(self, text: str | None) -> str | None:
        """The text as the model is given it: with --tune_text 1 the placeholder is in each, or else the trigger."""
        if self.trigger is not None:
            return self.trigger.put_into(text)
        return text if self.placeholder is None else with_placeholder(text, self.placeholder.word)

    def unread(self, source: Source, clips: Columns) -> dict[str, str]:
        """A remark on each clip whose caption holds words that T5 does not know, by the clip's path.

        It needs the tokenizer alone, which every run loads (`Source.text_identity`), whether or not the cache is
        complete.
        """
        captions = clips["caption"]
        if not any(captions):
            return {}
        tokenizer = source.load_tokenizer()
        if self.placeholder is not None:
            tokenizer = extended_tokenizer(tokenizer, self.placeholder)
        found = unknown_words.unknown_words(tokenizer, captions)
        rows = zip(clips["path"], captions, strict=True)
        return {path: unknown_words.remark(found[caption]) for path, caption in rows if caption in found}

    def remark(self, source: Source) -> str:
        """What is put into every caption, in words, and whether T5 knows its words: else it would call up nothing.

        "" where nothing is.
        """
        if self.trigger is None:
            return ""
        unread = unknown_words.unknown_words(source.load_tokenizer(), [self.trigger.text])
        return "; ".join([self.trigger.describe(), *map(unknown_words.remark, unread.values())])

    def encoded(
        self,
        source: Source,
        store: cache.Store,
        device: torch.device,
        peers: Peers,
        captions: Sequence[str | None],
        drawn: Sequence[Sequence[str | None]],
    ) -> Text:
        """What the model reads of these texts, and of those that are drawn in their place.

        store  of states, which gets those that it lacks; a learned word leaves it alone, since T5 then stays loaded
        """
        texts = sorted({text for of_clip in (captions, *drawn) for text in of_clip if text is not None})
        if self.placeholder is not None:
            return TokenIds(extended_tokenizer(source.load_tokenizer(), self.placeholder), texts)
        cache.fill_text(
            store,
            texts,
            lambda: (load_text_encoder(source).to(device), source.load_tokenizer()),
            device=device,
            show_progress=peers.rank == 0,
            rank=peers.rank,
            world_size=peers.world_size,
        )
        peers.wait("text")
        return cache.open_text(store, texts)


def _without_trigger(trigger: Trigger, caption: str | None) -> str | None:
    return None if caption is None else LINE.join(map(trigger.taken_out_of, caption.split(LINE)))
