"""Music of several windows, against the real audiocraft: greedy codes with guidance, which go on from window to window.

A window lasts a second and a stride 0.6 s here, so that it stays fast; audiocraft has 30 s and 18 s.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.blown_up import blown_up, states_of, tones
from tests.interop.audiocraft_modules import require_audiocraft
from trainer.data.melody_places import melody_places
from trainer.evaluation.generation import Request, Sampling, generate_all
from trainer.evaluation.melody import notes_of_window
from trainer.evaluation.windows import generate_long, window_starts
from trainer.model.source import Source, load_codec, open_model

require_audiocraft()

from audiocraft.models import MusicGen

from tests.interop.audiocraft_melody import attributes, build
from tests.interop.audiocraft_models import conditions

TEXT, GUIDANCE = "a rock song with guitar", 3.0
WINDOW_SECONDS, STRIDE_SECONDS = 1.0, 0.6
WINDOW, STRIDE = 50, 30


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class _Codec(torch.nn.Module):
    """What MusicGen asks of its EnCodec while it makes codes from codes."""

    def __init__(self, source: Source):
        super().__init__()
        self.codec = load_codec(source)
        self.frame_rate, self.sample_rate, self.channels = 50, 32_000, source.channels


def windowed(source: Source, lm: Any, seconds: float) -> Any:
    """audiocraft's MusicGen, which makes so many seconds greedily in windows."""
    musicgen = MusicGen("ours", _Codec(source), lm, max_duration=30.0)  # above its default stride
    musicgen.max_duration = WINDOW_SECONDS
    musicgen.set_generation_params(
        use_sampling=False, cfg_coef=GUIDANCE, duration=seconds, extend_stride=STRIDE_SECONDS
    )
    return musicgen


def compare(name: str, seconds: float, prompt_frames: int, melody_seconds: float | None, folder: Path) -> Tensor:
    """Our codes (K, T) of several windows, which are audiocraft's."""
    source = open_model(name)
    model = blown_up(source)
    prompt_KT = torch.randint(2048, (source.codebooks, prompt_frames), generator=torch.Generator().manual_seed(3))
    sound = None if melody_seconds is None else tones(melody_seconds, notes_hz=(329.63, 440.0))
    asked = conditions([TEXT])
    if source.melody:
        asked = [attributes(TEXT, None if sound is None else sound[None, None])]
    else:  # which MusicGen gives to every model
        asked[0].wav["self_wav"] = attributes(TEXT, None).wav["self_wav"]
    musicgen = windowed(source, build(source, model.state_dict(), folder), seconds)
    with torch.no_grad():
        their_BKT = musicgen._generate_tokens(asked, prompt_KT[None] if prompt_frames else None)

    def melody_at(start: int) -> Tensor | None:
        assert sound is not None
        return melody_places(notes_of_window(sound.numpy(), start * 640, round(WINDOW_SECONDS * 32_000)))

    frames = round(seconds * 50)
    assert len(window_starts(frames, WINDOW, STRIDE)) >= 2
    request = Request(
        text_SD=states_of(source, TEXT),
        generator=torch.Generator(),
        prefix_KT=prompt_KT if prompt_frames else None,
    )
    made = generate_long(
        model,
        [request],
        frames=frames,
        sampling=Sampling(greedy=True, guidance=GUIDANCE),
        window_frames=WINDOW,
        stride_frames=STRIDE,
        melody_at=None if sound is None else melody_at,
    )
    assert made is not None
    assert made[0].shape == (source.codebooks, frames) and len(made[0].unique()) > 15
    assert torch.equal(made[0], their_BKT[0])
    if sound is None:
        at_once = generate_all(model, [request], frames=frames, sampling=Sampling(greedy=True, guidance=GUIDANCE))
        assert at_once is not None and not torch.equal(at_once[0], made[0]), "windows have no effect on this model"
    return made[0]


@pytest.mark.numbers
def test_codes_of_three_windows_are_audiocrafts(tmp_path: Path) -> None:
    compare("debug", 2.0, 0, None, tmp_path)


@pytest.mark.numbers
def test_so_are_those_that_go_on_from_a_prompt(tmp_path: Path) -> None:
    compare("debug", 1.5, 12, None, tmp_path)


@pytest.mark.full
@pytest.mark.numbers
@pytest.mark.parametrize("seconds", [1.02, 1.6, 1.62, 2.2])
@pytest.mark.parametrize("prompt_frames", [0, 49])
def test_so_are_those_of_all_kinds_of_last_windows(seconds: float, prompt_frames: int, tmp_path: Path) -> None:
    compare("debug", seconds, prompt_frames, None, tmp_path)


@pytest.mark.full
@pytest.mark.numbers
@pytest.mark.parametrize("prompt_frames", [0, 12])
def test_so_are_those_of_a_stereo_model(prompt_frames: int, tmp_path: Path) -> None:
    compare("debug-stereo", 1.5, prompt_frames, None, tmp_path)


@pytest.mark.full
@pytest.mark.numbers
@pytest.mark.parametrize("name", ["debug-melody", "debug-stereo-melody"])
def test_so_are_those_of_a_melody_that_begins_anew_and_is_followed_from_each_windows_place(
    name: str, tmp_path: Path
) -> None:
    """The sound of 1.3 s ends inside the second window, and begins again there."""
    codes = {seconds: compare(name, 2.0, 0, seconds, tmp_path) for seconds in (1.3, 5.0, None)}
    assert not torch.equal(codes[1.3], codes[5.0]) and not torch.equal(codes[5.0], codes[None])
