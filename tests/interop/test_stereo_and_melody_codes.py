"""What models generate, several sounds at once, against the real audiocraft one by one: greedy codes."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.blown_up import blown_up, states_of, tones
from tests.interop.audiocraft_modules import require_audiocraft
from trainer.data.chroma import notes_of
from trainer.data.melody_places import melody_places
from trainer.evaluation.decoding import Decoding
from trainer.evaluation.generation import Request, Sampling, generate_all
from trainer.model.delay_pattern import delay, inputs_and_labels
from trainer.model.language_model import LanguageModel
from trainer.model.source import Source, open_model

require_audiocraft()

from tests.interop.audiocraft_melody import attributes, build
from tests.interop.audiocraft_models import conditions

TEXT, GUIDANCE = "a rock song with guitar", 3.0
CLOSE = 1e-4  # logits that differ by less may be rounded to another order
PROMPTS = [(30.0, TEXT), (12.0, None), (None, TEXT), (30.0, None), (12.0, TEXT), (None, None)]


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


def sound_of(seconds: float | None) -> Tensor | None:
    return None if seconds is None else tones(seconds)


def melody_of(seconds: float | None) -> Tensor | None:
    sound = sound_of(seconds)
    return None if sound is None else melody_places(notes_of(sound.numpy()))


@torch.no_grad()
def equal_steps(
    name: str, codes_KT: Tensor, their_KT: Tensor, seconds: float | None, text: str | None, guidance: float, given: int
) -> int:
    """How many steps were compared: all of them, or those before the first at which two codes are nearly as likely.

    The logits are those of one pass over all codes, without a cache.
    """
    source, model = opened(name)
    states_SD, channels = states_of(source, text), source.channels
    text_BSD = torch.zeros(2, 1, 512) if states_SD is None else torch.stack([states_SD, torch.zeros_like(states_SD)])
    mask_BS = torch.zeros(text_BSD.shape[:2])
    mask_BS[0] = float(states_SD is not None)
    melody_BC = None
    if source.melody:
        notes_C = melody_of(seconds)
        melody_BC = torch.zeros(2, 235, dtype=torch.int64)
        melody_BC[0] = torch.zeros(235) if notes_C is None else notes_C
    # The last frames of the later codebooks are predicted at steps beyond the last frame.
    delays = (len(codes_KT) - 1) // channels
    longer_BKT = torch.nn.functional.pad(codes_KT[None], (0, delays), value=2048)
    inputs_BKT, _ = inputs_and_labels(longer_BKT, 2048, channels)
    logits, null = model(inputs_BKT.expand(2, -1, -1), text_BSD, mask_BS, melody_BC=melody_BC)
    best = (null + guidance * (logits - null)).topk(2, dim=-1)
    made_KT, their_KT = (delay(one, 2048, channels)[0] for one in (longer_BKT, _longer(their_KT, delays)))
    frames_KT = torch.arange(made_KT.shape[1]) - torch.arange(len(made_KT))[:, None] // channels
    gaps_KT = (best.values[..., 0] - best.values[..., 1]).where((made_KT != 2048) & (frames_KT >= given), torch.inf)
    assert torch.equal(best.indices[..., 0].where(gaps_KT.isfinite() & (gaps_KT > CLOSE), made_KT), made_KT)
    close = (gaps_KT < CLOSE).any(0).nonzero()
    steps = int(close[0]) if len(close) else made_KT.shape[1]
    assert torch.equal(made_KT[:, :steps], their_KT[:, :steps])
    return steps


def _longer(codes_KT: Tensor, more: int) -> Tensor:
    return torch.nn.functional.pad(codes_KT[None], (0, more), value=2048)


def compared(
    name: str,
    frames: int,
    prompts: list[tuple[float | None, str | None]],
    folder: Path,
    *,
    guidance: float = GUIDANCE,
    given: int = 0,
    decoding: Decoding | None = None,
) -> int:
    """The greedy codes of each prompt are audiocraft's; returns the steps that were compared.

    Ours are made at once. audiocraft's are made one by one, because of texts in one batch it attends to the padding.
    """
    source, model = opened(name)
    theirs = build(source, model.state_dict(), folder)
    prefix_KP = torch.randint(0, 2048, (source.codebooks, given), generator=torch.Generator().manual_seed(3))
    requests = [
        Request(
            text_SD=states_of(source, text),
            generator=torch.Generator(),
            prefix_KT=prefix_KP if given else None,
            melody_C=melody_of(seconds),
        )
        for seconds, text in prompts
    ]
    sampling = Sampling(greedy=True, guidance=guidance)
    made = generate_all(model, requests, frames=frames, sampling=sampling, decoding=decoding or Decoding())
    assert made is not None
    steps = 0
    for (seconds, text), codes_KT in zip(prompts, made, strict=True):
        sound = sound_of(seconds)
        heard = None if sound is None else sound[None, None]
        asked = [attributes(text, heard)] if source.melody else conditions([text])
        with torch.no_grad():
            their_BKT = theirs.generate(
                prefix_KP[None] if given else None, asked, max_gen_len=frames, use_sampling=False, cfg_coef=guidance
            )
        assert codes_KT.shape == (source.codebooks, frames)
        steps += equal_steps(name, codes_KT, their_BKT[0], seconds, text, guidance, given)
    assert len({codes_KT.numpy().tobytes() for codes_KT in made}) == len(made), "a condition has no effect here"
    return steps


@pytest.mark.numbers
@pytest.mark.parametrize(
    ("name", "prompts", "least"),
    [
        ("debug-stereo", [(None, TEXT)], 60),
        ("debug-melody", PROMPTS[:3], 200),
        ("debug-stereo-melody", [(12.0, TEXT)], 60),
    ],
)
def test_greedy_codes_are_audiocrafts(
    name: str, prompts: list[tuple[float | None, str | None]], least: int, tmp_path: Path
) -> None:
    assert compared(name, 72, prompts, tmp_path) >= least


@pytest.mark.full
@pytest.mark.numbers
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(("guidance", "given"), [(GUIDANCE, 10), (1.0, 0)])
@pytest.mark.parametrize("name", ["debug", "debug-stereo", "debug-melody"])
def test_greedy_codes_behind_a_beginning_and_without_guidance_are_audiocrafts(
    name: str, guidance: float, given: int, static: bool, tmp_path: Path
) -> None:
    prompts = PROMPTS[:3] if "melody" in name else [(None, TEXT), (None, "slow ballad"), (None, None)]
    decoding = Decoding(static_cache=static)
    assert compared(name, 72, prompts, tmp_path, guidance=guidance, given=given, decoding=decoding) >= 130


@pytest.mark.full
@pytest.mark.numbers
@pytest.mark.parametrize("name", ["debug-stereo", "debug-melody", "debug-stereo-melody"])
def test_greedy_codes_of_four_seconds_are_audiocrafts(name: str, tmp_path: Path) -> None:
    prompts = PROMPTS if "melody" in name else [(None, TEXT), (None, "slow ballad"), (None, None)]
    assert compared(name, 200, prompts, tmp_path) >= 200 * len(prompts) // 2
