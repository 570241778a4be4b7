"""generate_codes of stereo and melody models against transformers' whole MusicGens, and against slow loops."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor
from transformers import (
    EncodecModel,
    MusicgenForConditionalGeneration,
    MusicgenMelodyForConditionalGeneration,
    StoppingCriteriaList,
)

from tests.blown_up import blown_up, states_of, tones
from trainer.data.chroma import notes_of
from trainer.data.melody_places import melody_places
from trainer.evaluation.generation import Sampling, decode, generate_codes, write_wav
from trainer.model.delay_pattern import inputs_and_labels
from trainer.model.language_model import LanguageModel
from trainer.model.source import Source, load_codec, load_text_encoder, open_model

FRAMES, TEXT, CPU = 16, "slow rock ballad", torch.device("cpu")
MELODIES = ("debug-melody", "debug-stereo-melody")
NOTES = {"chord": np.array([0, 4, 7]), "other": np.array([9]), "none": np.array([], dtype=int)}
GREEDY = Sampling(greedy=True)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def opened(name: str) -> tuple[Source, LanguageModel]:
    source = open_model(name)
    return source, blown_up(source)


@functools.cache
def whole(name: str) -> MusicgenForConditionalGeneration | MusicgenMelodyForConditionalGeneration:
    """transformers' own model of the same parts."""
    source, model = opened(name)
    config = copy.deepcopy(source.config)
    with torch.device("meta"):
        made = (MusicgenMelodyForConditionalGeneration if source.melody else MusicgenForConditionalGeneration)(config)
    made.decoder, made.enc_to_dec_proj = model.decoder, model.enc_to_dec_proj
    if source.melody:
        made.audio_enc_to_dec_proj = model.audio_enc_to_dec_proj
    made.text_encoder, made.audio_encoder = load_text_encoder(source), load_codec(source)
    return made.eval()


@functools.cache
def text_of(name: str, text: str | None) -> Tensor | None:
    return states_of(opened(name)[0], text)


def codes_of(name: str, text: str | None = TEXT, melody: str = "chord", **arguments: Any) -> Tensor:
    source, model = opened(name)
    arguments = {"frames": FRAMES, "sampling": GREEDY} | arguments
    notes_C = melody_places(NOTES[melody]) if source.melody else None
    made = generate_codes(model, text_of(name, text), melody_C=notes_C, **arguments)
    assert made is not None
    return made


def inputs_of(name: str, text: str | None, melody: str) -> dict[str, Tensor]:
    """What transformers' whole models take for a prompt and a melody."""
    source, _ = opened(name)
    inputs = dict(source.load_tokenizer()([text or ""], return_tensors="pt"))
    if text is None:
        inputs["attention_mask"] = torch.zeros_like(inputs["attention_mask"])
    if source.melody and len(NOTES[melody]):
        places_C = melody_places(NOTES[melody])
        inputs["input_features"] = torch.nn.functional.one_hot(places_C, 12)[None].float()
    return inputs


class Seen:
    """A stopping criterion that keeps the tokens: what is decoded lacks the delays."""

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        self.tokens = input_ids
        return torch.zeros(len(input_ids), dtype=torch.bool)


def their_codes(
    name: str, text: str | None = TEXT, melody: str = "chord", *,
    sampling: Sampling = GREEDY, prefix_KT: Tensor | None = None, use_cache: bool = True,
) -> Tensor:  # fmt: skip
    """The codes (K, FRAMES) of transformers' whole model."""
    source, _ = opened(name)
    given, seen = 0 if prefix_KT is None else prefix_KT.shape[1], Seen()
    asked: dict[str, Any] = {"do_sample": not sampling.greedy, "guidance_scale": sampling.guidance}
    if not sampling.greedy:
        asked |= {"top_k": sampling.top_k, "temperature": sampling.temperature}
    if prefix_KT is not None:
        asked["decoder_input_ids"] = prefix_KT
    delays = (source.codebooks - 1) // source.channels
    special = dict.fromkeys(("bos_token_id", "pad_token_id", "decoder_start_token_id"), 2048)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sampling.seed)
        whole(name).generate(
            **inputs_of(name, text, melody), **asked, **special, use_cache=use_cache,
            max_new_tokens=FRAMES + delays - given, stopping_criteria=StoppingCriteriaList([seen]),
        )  # fmt: skip
    late = [1 + k // source.channels for k in range(source.codebooks)]
    made = torch.stack([row[by : by + FRAMES] for row, by in zip(seen.tokens, late, strict=True)])
    if prefix_KT is not None:
        made[:, :given] = prefix_KT  # which `generate` puts in place of what was drawn there, before it decodes
    return made


def prefix_of(source: Source, given: int) -> Tensor | None:
    draw = torch.Generator().manual_seed(3)
    return torch.randint(0, 2048, (source.codebooks, given), generator=draw) if given else None


@pytest.mark.parametrize("given", [0, 5])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(guidance=1.0, top_k=50, temperature=0.9, seed=7)])
def test_a_stereo_models_codes_are_those_of_transformers_bit_for_bit(sampling: Sampling, given: int) -> None:
    prefix_KT = prefix_of(opened("debug-stereo")[0], given)
    made = codes_of("debug-stereo", sampling=sampling, prefix_KT=prefix_KT)
    assert made.shape == (8, FRAMES) and made.max() < 2048
    assert torch.equal(made, their_codes("debug-stereo", sampling=sampling, prefix_KT=prefix_KT))
    assert prefix_KT is None or torch.equal(made[:, :given], prefix_KT)


@pytest.mark.numbers
@pytest.mark.parametrize(
    ("name", "text", "melody", "guidance", "given"),
    [
        ("debug-melody", TEXT, "chord", 3.0, 0),
        ("debug-melody", TEXT, "other", 1.0, 5),
        ("debug-melody", None, "chord", 3.0, 5),
        ("debug-stereo-melody", TEXT, "none", 3.0, 0),
        ("debug-stereo-melody", None, "none", 3.0, 5),
    ],
)
def test_a_melody_models_greedy_codes_are_those_of_transformers(
    name: str, text: str | None, melody: str, guidance: float, given: int
) -> None:
    """Not bit for bit: transformers computes melody, text and the first codes in one pass, and here they are two."""
    prefix_KT, sampling = prefix_of(opened(name)[0], given), Sampling(greedy=True, guidance=guidance)
    made = codes_of(name, text, melody, sampling=sampling, prefix_KT=prefix_KT)
    assert torch.equal(made, their_codes(name, text, melody, sampling=sampling, prefix_KT=prefix_KT))
    assert prefix_KT is None or torch.equal(made[:, :given], prefix_KT)


@pytest.mark.numbers
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@torch.no_grad()
def test_a_slow_loop_without_a_cache_gives_the_same_greedy_codes(guidance: float) -> None:
    """The guided row has the null melody, note 0 projected, and zeros for the text."""
    _, model = opened("debug-melody")
    made = codes_of("debug-melody", sampling=Sampling(greedy=True, guidance=guidance))
    states_SD = text_of("debug-melody", TEXT)
    assert states_SD is not None
    text_BSD, mask_BS = states_SD[None].expand(2, -1, -1), torch.ones(2, len(states_SD))
    mask_BS[1] = 0
    melody_BC = torch.stack([melody_places(NOTES["chord"]), torch.zeros(235, dtype=torch.int64)])
    codes = torch.full((1, 4, FRAMES + 3), 2048)
    for step in range(FRAMES + 3):
        inputs_BKT, _ = inputs_and_labels(codes, 2048)
        read_BKT = inputs_BKT[..., : step + 1].expand(2, -1, -1)
        logits_BKV = model(read_BKT, text_BSD, mask_BS, melody_BC=melody_BC)[:, :, -1]
        best_K = (logits_BKV[1] + guidance * (logits_BKV[0] - logits_BKV[1])).argmax(-1)
        for k in range(4):
            if 0 <= step - k < FRAMES:
                codes[0, k, step - k] = best_K[k]
    assert torch.equal(made, codes[0, :, :FRAMES])


MAKERS: dict[str, Callable[..., Tensor]] = {
    "ours, guidance 1": functools.partial(codes_of, sampling=Sampling(greedy=True, guidance=1.0)),
    "ours, guidance 3": codes_of,
    "ours, drawn": functools.partial(codes_of, sampling=Sampling(seed=2)),
    "theirs, guidance 1": functools.partial(their_codes, sampling=Sampling(greedy=True, guidance=1.0)),
    "theirs, guidance 3": their_codes,
    "theirs, without a cache": functools.partial(their_codes, use_cache=False),
    "theirs, drawn": functools.partial(their_codes, sampling=Sampling(seed=2)),
}


@pytest.mark.parametrize("name", [MELODIES[0], pytest.param(MELODIES[1], marks=pytest.mark.full)])
@pytest.mark.parametrize(
    "maker", [pytest.param(one, marks=pytest.mark.full) if "without" in one else one for one in MAKERS]
)
def test_another_melody_and_another_text_give_other_codes(maker: str, name: str) -> None:
    make = MAKERS[maker]
    base = make(name)
    assert torch.equal(make(name), base)
    for other in (make(name, TEXT, "other"), make(name, TEXT, "none"), make(name, None)):
        assert (other == base).float().mean() < 0.5


@pytest.mark.parametrize("name", MELODIES)
@torch.no_grad()
def test_another_melody_gives_other_logits_in_transformers_forward_pass(name: str) -> None:
    source, _ = opened(name)
    ids = torch.full((source.codebooks, 6), 2048)
    ids[:, 1:] = torch.arange(5)
    found = [whole(name)(**inputs_of(name, TEXT, melody), decoder_input_ids=ids).logits[:, -6:] for melody in NOTES]
    assert all((found[0] - other).abs().max() > 1 for other in found[1:])


def test_codes_with_a_melody_disturb_no_random_state_and_depend_on_nothing_before() -> None:
    alone = codes_of("debug-melody", sampling=Sampling(seed=5))
    torch.manual_seed(11)
    states = torch.get_rng_state()
    codes_of("debug-melody", melody="other", sampling=Sampling(seed=6))
    assert torch.equal(codes_of("debug-melody", sampling=Sampling(seed=5)), alone)
    assert torch.equal(torch.get_rng_state(), states)


@pytest.mark.parametrize("before", [0, 1, 5])
def test_no_token_is_made_once_it_should_stop(before: int) -> None:
    _, model = opened("debug-stereo-melody")
    passes: list[int] = []
    handle = model.decoder.register_forward_hook(lambda *_: passes.append(1))
    try:
        stopped = generate_codes(
            model, None, frames=FRAMES, sampling=Sampling(), melody_C=melody_places(NOTES["chord"]),
            should_stop=lambda: len(passes) >= before,
        )  # fmt: skip
    finally:
        handle.remove()
    assert stopped is None and len(passes) == before


def test_a_melody_that_the_model_cannot_read_is_refused() -> None:
    for name, shape, words in (("debug", (235,), "reads none"), ("debug-melody", (100,), "235 places")):
        with pytest.raises(ValueError, match=words):
            generate_codes(
                opened(name)[1], None, frames=8, sampling=GREEDY, melody_C=torch.zeros(shape, dtype=torch.int64)
            )


def test_a_short_melody_is_repeated_and_a_long_one_cut() -> None:
    assert melody_places(np.array([], np.uint8)) is None
    short, long = np.arange(100) % 12, np.arange(300) % 12
    assert melody_places(short).tolist() == [*short, *short, *short[:35]]
    assert melody_places(long).tolist() == [*long[:235]]
    assert len(notes_of(tones(30.0).numpy())) == 235


def test_each_channel_is_decoded_by_itself_and_a_wav_holds_both(tmp_path) -> None:
    codec = load_codec(opened("debug-stereo")[0])
    codes_KT = torch.randint(0, 2048, (8, 10), generator=torch.Generator().manual_seed(1))
    audio = decode(codec, codes_KT)
    assert audio.shape == (6400, 2) and audio.dtype == np.float32
    for channel in (0, 1):
        assert np.array_equal(audio[:, channel], decode(codec, codes_KT[channel::2]))
    assert decode(codec, codes_KT[::2]).shape == (6400,)
    write_wav(tmp_path / "a.wav", 4 * audio / abs(audio).max(), 32_000)
    written, rate_hz = soundfile.read(tmp_path / "a.wav")
    # Both channels are turned down by the same factor, until the louder one has a peak of 1.
    assert written.shape == (6400, 2) and rate_hz == 32_000
    assert np.abs(written - audio / abs(audio).max()).max() < 2 / 2**15


@pytest.mark.parametrize("name", ["debug-stereo", "debug-stereo-melody"])
def test_the_sound_is_that_of_transformers_whole_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = opened(name)
    delays = dict.fromkeys(("bos_token_id", "pad_token_id", "decoder_start_token_id"), 2048)
    sound = whole(name).generate(
        **inputs_of(name, TEXT, "chord"), **delays, do_sample=False, guidance_scale=3.0, max_new_tokens=FRAMES + 3
    )
    assert isinstance(whole(name).audio_encoder, EncodecModel)
    assert torch.equal(torch.from_numpy(decode(load_codec(source), codes_of(name)).T.copy()), sound[0])
