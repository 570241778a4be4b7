"""The prompts that a run plays, with what the model reads of each: T5's states, kept in the cache beside captions'."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trainer.data import cache
from trainer.data.arrow_store import KEY, Row
from trainer.data.batches import Text
from trainer.data.codec_windows import reproducible
from trainer.data.dataset import Dataset, DataSettings
from trainer.data.melody_places import melody_places
from trainer.data.peers import Alone, Peers
from trainer.data.sample_prompts import (
    ALL_CAPTIONS,
    SamplePrompt,
    all_captions,
    chosen,
    clip_to_continue,
    read_prompts,
)
from trainer.data.text_states import text_states
from trainer.errors import ConfigError
from trainer.model.new_word import TokenIds, extended_tokenizer
from trainer.model.new_word_model import TextTunedModel
from trainer.model.source import Source, free_unused, load_text_encoder


@dataclass(frozen=True, kw_only=True)
class SamplePrompts:
    """What a run plays, the same on every rank.

    text       what the model reads of each prompt that is not blank
    token_ids  whether that is token ids, since a word is learned and T5's states of it change while it is
    """

    prompts: tuple[SamplePrompt, ...]
    text: Text
    token_ids: bool

    def states(self, prompt: SamplePrompt, tuned: TextTunedModel | None = None) -> Tensor | None:
        """T5's states of one of the prompts, (S, D) float32: what `text_states` gives; None for the null condition.

        They are on the CPU, or on the device of `tuned`, the model that learns a word, by which they are then made as
        they are now: with --tune_text 1 it has to be given.
        """
        if not prompt.text.strip():
            return None
        read = torch.from_numpy(self.text.states(prompt.text))
        if not self.token_ids:
            return read
        assert tuned is not None, "T5's states of a word that is learned come from the model"
        device = tuned.text_rows.device
        with torch.no_grad(), reproducible(device):
            return tuned.text_states(read[None].to(device), None)[0].float()


def prepare_prompts(
    settings: DataSettings,
    source: Source,
    device: torch.device,
    data: Dataset,
    *,
    given: str | None,
    continue_seconds: float | None,
    frames: int,
    peers: Peers | None = None,
) -> SamplePrompts:
    """Choose the prompts of a run, and have T5's states of each in the cache. Every rank calls it, after `prepare`.

    data              what `prepare` made of the same settings
    given             the value of --sample_prompts, whose file the first process alone reads; None for none
    continue_seconds  that of --sample_continue
    frames            of the codec, of each sound; of a clip that is heard beside one, at most as many

    T5 is loaded by the first process alone, and only where a prompt is new to the cache. Raises ConfigError where no
    clip is long enough to be continued, StorageError where the cache cannot be written, and what `read_prompts` raises.
    """
    peers = peers or Alone()
    own = read_prompts(given) if given is not None and peers.rank == 0 else None
    peers.wait("sample prompts")
    texts = peers.gather(own)[0] if given != ALL_CAPTIONS else all_captions(data.train.captions)
    one_more = None
    if continue_seconds is not None:
        one_more = _continuation(data, continue_seconds, source.frame_rate_hz, settings.seed)
    put_into, train = settings.prompts.put_into, data.train
    prompts = chosen(texts, train.captions, train.names, settings.seed, put_into=put_into, continuation=one_more)
    prompts = [_with_clip(prompt, data, frames) for prompt in prompts]
    distinct = sorted({prompt.text for prompt in prompts if prompt.text.strip()})
    if settings.placeholder is not None:
        ids = TokenIds(extended_tokenizer(source.load_tokenizer(), settings.placeholder), distinct)
        return SamplePrompts(prompts=tuple(prompts), text=ids, token_ids=True)
    # A prepared folder holds the states of its captions alone, made in batches: it is not asked.
    store = cache.text_store(settings.cache_dir, source.text_identity())
    if peers.rank == 0:
        _fill(store, source, distinct, device)
    peers.wait("states of sample prompts")
    return SamplePrompts(prompts=tuple(prompts), text=cache.open_text(store, distinct, alone=True), token_ids=False)


def _continuation(data: Dataset, seconds: float, frame_rate_hz: float, seed: int) -> SamplePrompt:
    """The first seconds of a clip, to be continued under its caption. Raises ConfigError where all are too short."""
    frames, train = max(1, round(seconds * frame_rate_hz)), data.train
    clip = clip_to_continue(train.codes.frames[:, 0], frames, seed)
    if clip is None:
        longest = train.codes.frames[:, 0].max() / frame_rate_hz
        raise ConfigError(
            f"--sample_continue {seconds:g} cannot be used: no clip is longer than that, and the longest has"
            f" {longest:.2f} s. Give fewer seconds, or leave it out"
        )
    prefix_KT = torch.from_numpy(train.codes.crop(clip, 0, 0, frames).astype("int64"))
    text = train.captions[clip] or ""
    return SamplePrompt(text=text, seed=seed, origin="continuation", clip=train.names[clip], prefix_KT=prefix_KT)


def _with_clip(prompt: SamplePrompt, data: Dataset, frames: int) -> SamplePrompt:
    """The prompt with the cached codes of its clip's beginning, and for a melody model with the notes of a crop there.

    The notes are those of a whole segment, however long the sound is: such rows are trained.
    """
    if prompt.clip is None:
        return prompt
    clip, codes = data.train.names.index(prompt.clip), data.train.codes
    length, melody_C = int(codes.frames[clip, 0]), None
    if data.train.melodies is not None:
        melody_C = melody_places(data.train.melodies.crop(clip, 0, 0, min(length, data.train.segment_frames)))
    beginning = codes.crop(clip, 0, 0, min(frames, length))
    return replace(prompt, clip_KT=torch.from_numpy(beginning.astype("int64")), melody_C=melody_C)


def _fill(store: cache.Store, source: Source, texts: Sequence[str], device: torch.device) -> None:
    """Store the states of the texts that the store lacks, each encoded by itself."""
    present = store.keys()
    missing = [
        (key, text) for key, text in zip(cache.text_keys(texts, alone=True), texts, strict=True) if key not in present
    ]
    if missing:
        store.append_all(_rows(missing, source, device))
        free_unused(device)


def _rows(missing: Sequence[tuple[str, str]], source: Source, device: torch.device) -> Iterator[Row]:
    encoder, tokenizer = load_text_encoder(source).to(device), source.load_tokenizer()
    for key, text in missing:
        states_SD = text_states(encoder, tokenizer, text)
        assert states_SD is not None, "blank prompts have no states"
        values = states_SD.cpu().numpy()
        yield {KEY: key, "tokens": len(values), "width": values.shape[1], "states": values.astype("<f4").tobytes()}
