"""Music of several windows: where they begin, what each goes on from, and that a batch is its requests alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from generating.length import Length
from generating.progress import steps_of
from torch import Tensor

from tests.blown_up import blown_up, states_of
from trainer.data import audio
from trainer.data.chroma import notes_of
from trainer.evaluation import windows
from trainer.evaluation.generation import Request, Sampling, generate_all
from trainer.evaluation.melody import first_samples, notes_of_window
from trainer.evaluation.windows import generate_long, window_starts
from trainer.model.language_model import LanguageModel
from trainer.model.source import Source, open_model

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "arcade_meadow.wav"
SAMPLING = Sampling(guidance=3.0, top_k=50)
WINDOW, STRIDE = 24, 15


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def opened(name: str = "debug") -> tuple[Source, LanguageModel]:
    source = open_model(name)
    return source, blown_up(source)


def requests(prompts: Sequence[str | None], prefix_KT: Tensor | None = None, name: str = "debug") -> list[Request]:
    source, _ = opened(name)
    return [
        Request(
            text_SD=states_of(source, prompt), generator=torch.Generator().manual_seed(seed), prefix_KT=prefix_KT
        )
        for seed, prompt in enumerate(prompts)
    ]


def audiocrafts_windows(total: int, prompt: int, window: int, stride: int) -> list[tuple[int, int]]:
    """Begin and end of each window, as the loop of audiocraft 1.3.0's MusicGen._generate_tokens has them, in frames."""
    if total <= window:
        return [(0, total)]
    found, offset, prompt_length = [], 0, prompt
    while offset + prompt_length < total:
        length = min(total - offset, window)
        found.append((offset, offset + length))
        prompt_length = max(0, length - stride)
        offset += stride
    return found


def test_windows_begin_where_audiocrafts_do() -> None:
    for window, stride in ((1500, 900), (1500, 1499), (10, 3), (10, 9)):
        totals = range(1, 60) if window == 10 else (1, 1500, 1501, 1502, 2400, 2401, 2999, 3000, 30_000)
        for total in totals:
            for prompt in (0, 1, min(total, window) - 1):
                starts = window_starts(total, window, stride)
                ours = [(start, min(start + window, total)) for start in starts]
                assert ours == audiocrafts_windows(total, prompt, window, stride), (total, prompt, window, stride)


@pytest.mark.numbers
def test_each_window_is_given_the_end_of_the_one_before_it() -> None:
    """The whole, made again by hand, a call at a time."""
    _, model = opened()
    [made] = _made(generate_long(model, requests(["rock"]), frames=45, sampling=SAMPLING,
                                 window_frames=WINDOW, stride_frames=STRIDE))  # fmt: skip
    [asked] = requests(["rock"])
    [first] = _made(generate_all(model, [asked], frames=WINDOW, sampling=SAMPLING))
    [second] = _made(generate_all(model, [replace(asked, prefix_KT=first[:, 15:])], frames=WINDOW, sampling=SAMPLING))
    [third] = _made(generate_all(model, [replace(asked, prefix_KT=second[:, 15:])], frames=15, sampling=SAMPLING))
    assert made.shape == (4, 45)
    assert torch.equal(made, torch.cat([first, second[:, 9:], third[:, 9:]], dim=1))
    # The draws go on: with the first window's, the second would begin as that did.
    assert not torch.equal(first[:, :15], second[:, 9:])


@pytest.mark.numbers
def test_several_sounds_of_several_windows_are_each_as_alone() -> None:
    _, model = opened()
    prefix_KT = torch.randint(2048, (4, 7), generator=torch.Generator().manual_seed(1))
    prompts = ["epic rock", None, "slow ballad with a piano"]
    make = functools.partial(
        generate_long, model, frames=50, sampling=SAMPLING, window_frames=WINDOW, stride_frames=STRIDE
    )
    together = _made(make(requests(prompts, prefix_KT)))
    assert len({tuple(codes_KT.flatten().tolist()) for codes_KT in together}) == 3
    for number, request in enumerate(requests(prompts, prefix_KT)):
        [alone] = _made(make([request]))
        assert torch.equal(alone[:, :7], prefix_KT) and torch.equal(alone, together[number])


def test_music_of_one_window_is_that_of_one_call() -> None:
    _, model = opened()
    [long] = _made(generate_long(model, requests(["rock"]), frames=20, sampling=SAMPLING))
    [short] = _made(generate_all(model, requests(["rock"]), frames=20, sampling=SAMPLING))
    assert torch.equal(long, short)


def test_it_stops_inside_a_later_window() -> None:
    _, model = opened()
    asked: list[int] = []

    def should_stop() -> bool:
        asked.append(len(asked))
        return len(asked) == WINDOW + 3 + 5

    made = generate_long(
        model, requests(["rock"]), frames=45, sampling=SAMPLING, window_frames=WINDOW, stride_frames=STRIDE,
        should_stop=should_stop,
    )  # fmt: skip
    assert made is None and len(asked) == WINDOW + 3 + 5


def test_each_windows_melody_is_asked_for_by_its_first_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = opened("debug-melody")
    melodies = {start: torch.full((235,), start % 12) for start in (0, 15, 30)}
    given: list[tuple[int, list[Tensor | None]]] = []

    def listening(model: LanguageModel, asked: Sequence[Request], *, frames: int, **rest: object) -> object:
        given.append((frames, [request.melody_C for request in asked]))
        return generate_all(model, asked, frames=frames, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(windows, "generate_all", listening)
    generate_long(
        model, requests(["rock", "jazz"], name="debug-melody"), frames=45, sampling=SAMPLING, window_frames=WINDOW,
        stride_frames=STRIDE, melody_at=melodies.__getitem__,
    )  # fmt: skip
    assert given == [(24, [melodies[0]] * 2), (24, [melodies[15]] * 2), (15, [melodies[30]] * 2)]


@pytest.mark.parametrize(
    ("name", "prompts", "prefix_frames"),
    [("debug", ["rock", None, "a longer prompt"], 0), ("debug", ["rock"], 6), ("debug-stereo", ["rock"], 0),
     ("debug-melody", ["rock", "a much longer prompt", "jazz"], 0)],
)  # fmt: skip
def test_the_bar_counts_every_step(name: str, prompts: list[str | None], prefix_frames: int) -> None:
    source, model = opened(name)
    length = Length(frames=45, window_frames=WINDOW, stride_frames=STRIDE)
    asked = requests(prompts, torch.zeros(source.codebooks, prefix_frames, dtype=torch.int64), name)
    steps = 0

    def should_stop() -> bool:
        nonlocal steps
        steps += 1
        return False

    generate_long(
        model, asked, frames=45, sampling=SAMPLING, window_frames=WINDOW, stride_frames=STRIDE,
        should_stop=should_stop,
    )  # fmt: skip
    assert steps == steps_of(model, asked, length)


def test_windows_that_cannot_be_are_refused() -> None:
    _, model = opened()
    for stride in (0, 24, 30):
        with pytest.raises(ValueError, match=f"a stride of {stride} frames for windows of 24"):
            generate_long(
                model, requests(["a"]), frames=45, sampling=SAMPLING, window_frames=24, stride_frames=stride
            )
    prefix_KT = torch.zeros(4, 24, dtype=torch.int64)
    with pytest.raises(ValueError, match="a prefix of 24 frames for 45 frames in windows of 24"):
        generate_long(
            model, requests(["a"], prefix_KT), frames=45, sampling=SAMPLING, window_frames=24, stride_frames=15
        )


def test_the_notes_of_a_window_are_those_of_its_samples_alone() -> None:
    """Expected as audiocraft writes it: the wav is repeated, and the window is cut out of that."""
    samples_n = first_samples(EXAMPLE, 40_000)
    whole = np.concatenate(list(audio.stream(EXAMPLE, 32_000)))
    assert np.array_equal(samples_n, whole[:40_000])
    repeated = np.tile(samples_n, 5)
    for start, length in ((0, 64_000), (31_000, 64_000), (100_000, 96_000)):
        notes = notes_of_window(samples_n, start, length)
        assert np.array_equal(notes, notes_of(repeated[start : start + length])) and len(notes) == 1 + length // 4096


def _made(codes: list[Tensor] | None) -> list[Tensor]:
    assert codes is not None
    return codes
