"""What stereo and melody models are trained for, against audiocraft 1.3.0: same weights, codes, melodies, its loss.

audiocraft computes each row by itself here, so that rows of other lengths beside it do not matter to it; ours are one
micro-batch. Melodies are sounds, which audiocraft hears, and its notes of them are ours.
"""

from __future__ import annotations

from tests.interop.audiocraft_modules import require_audiocraft

require_audiocraft()

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from audiocraft.models.lm import LMModel
from audiocraft.solvers.musicgen import MusicGenSolver
from torch import Tensor

from tests.interop.audiocraft_melody import RATE, attributes, build, notes_of
from tests.synthetic import RandomCodes
from trainer.data.batches import Examples
from trainer.data.order import Row, valid_cells
from trainer.exports.audiocraft_names import lm_from_audiocraft
from trainer.model.delay_pattern import IGNORED, inputs_and_labels
from trainer.model.language_model import LanguageModel, load_language_model
from trainer.model.loss import step_loss
from trainer.model.source import Source, load_text_encoder, open_model
from trainer.spec.shapes import DEBUG_NAMES

pytestmark = pytest.mark.numbers
KINDS = tuple(name for name in DEBUG_NAMES if name != "debug")
SEGMENT = 30  # frames of the codes; a melody has its 235 places whatever they are
LOSS, GRADIENT, STEPS = 1e-6, 1e-4, 1e-5  # relative, as in test_audiocraft_objective.py


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row: frames, caption, seconds of its melody's sound; what of them the order drops."""

    frames: int = SEGMENT
    caption: str | None = "slow rock guitar"
    sound: float | None = 30.0
    dropped: bool = False
    no_melody: bool = False


CASES = {
    "equal": [Case(), Case(caption="fast drum machine"), Case(caption="happy synth melody")],
    "ragged": [Case(frames=11), Case(caption="a"), Case(frames=28, caption="an upbeat song with drums and a choir")],
    "null": [Case(frames=9), Case(caption=None), Case(frames=20, caption="a slow song", dropped=True)],
    "melodies": [
        Case(frames=25, sound=12.0),
        Case(caption="a tune", sound=0.3),
        Case(caption="a long tune for piano", no_melody=True),
        Case(frames=14, caption="strings", sound=None),
        Case(caption=None, sound=7.0),
        Case(caption="a power ballad", dropped=True),
    ],
    "two": [Case(frames=25, sound=12.0), Case(frames=14, caption="a tune", dropped=True)],
}


class Clips:
    """Codes, sounds and T5's states of the rows of a case; `melody` is what audiocraft hears in a clip."""

    def __init__(self, source: Source, cases: Sequence[Case]):
        self.source, self.cases = source, cases
        draw = torch.Generator().manual_seed(3)
        self.sounds = [
            None if case.sound is None else 0.1 * torch.randn(1, 1, int(case.sound * RATE), generator=draw)
            for case in cases
        ]
        self.notes: list[np.ndarray] = []
        self.tokenizer, self.encoder = source.load_tokenizer(), load_text_encoder(source)

    def hear(self, theirs: LMModel) -> None:
        self.notes = [notes_of(theirs, sound).numpy().astype(np.uint8) for sound in self.sounds]

    def crop(self, clip: int, view: int, start: int, frames: int) -> np.ndarray:
        return self.notes[clip]

    @torch.no_grad()
    def states(self, caption: str) -> np.ndarray:
        return self.encoder(**self.tokenizer(caption, return_tensors="pt")).last_hidden_state[0].numpy()

    def tokens(self, caption: str) -> int:
        return len(self.tokenizer(caption).input_ids)

    @property
    def rows(self) -> list[Row]:
        return [
            Row(
                clip=clip, epoch=0, view=0, start=0, frames=case.frames, drop_caption=case.dropped,
                drop_melody=case.dropped or case.no_melody,
            )
            for clip, case in enumerate(self.cases)
        ]  # fmt: skip

    def examples(self, seed: int = 0) -> Examples:
        shape = self.source.shape
        return Examples(
            codes=RandomCodes([case.frames for case in self.cases], codebooks=shape.codebooks, seed=seed),
            text=self,
            captions=[case.caption for case in self.cases],
            names=["clip.wav"] * len(self.cases),
            shape=shape,
            special_token=2048,
            segment_frames=SEGMENT,
            melodies=self if shape.melody else None,
        )


def strong_model(source: Source) -> LanguageModel:
    """Weights blown up, so that text, melody and every layer matter to the loss."""
    model, draw = load_language_model(source), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(2.5)
            elif name.endswith("bias"):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
        if model.audio_enc_to_dec_proj is not None:
            model.audio_enc_to_dec_proj.weight.mul_(4)  # of the size of the projected text
    return model


Opened = Callable[..., tuple[LanguageModel, LMModel, Clips]]


@pytest.fixture
def opened(tmp_path: Path) -> Opened:
    def both(name: str, case: str) -> tuple[LanguageModel, LMModel, Clips]:
        source = open_model(name)
        ours = strong_model(source)
        theirs, clips = build(source, ours.state_dict(), tmp_path).train(), Clips(source, CASES[case])
        if source.melody:
            clips.hear(theirs)
        return ours, theirs, clips

    return both


def our_loss(model: LanguageModel, examples: Examples, rows: Sequence[Row]) -> Tensor:
    batch, shape = examples.batch(rows), examples.shape
    sums = model(
        batch.inputs_BKT, batch.text_BSD, batch.text_mask_BS, batch.attention_BS, batch.labels_BKT, batch.melody_BC
    )
    cells = torch.from_numpy(valid_cells(rows, shape.codebooks, SEGMENT, shape.audio_channels))
    return step_loss(sums, cells)


def their_loss(lm: LMModel, clips: Clips, examples: Examples) -> Tensor:
    """audiocraft's run_step of rows that are each computed alone: its pattern, its mask, its cross entropy."""
    shape = (len(clips.rows), examples.shape.codebooks, SEGMENT)
    codes, mask, logits = torch.full(shape, lm.special_token_id), torch.zeros(shape, dtype=torch.bool), []
    for index, row in enumerate(clips.rows):
        crop = examples.codes.crop(row.clip, 0, 0, row.frames).astype(np.int64)
        codes[index, :, : row.frames] = torch.from_numpy(crop)
        output = lm.compute_predictions(codes[index : index + 1], [], conditions_alone(lm, clips, index))
        logits.append(output.logits)
        mask[index, :, : row.frames] = output.mask[0, :, : row.frames]
    loss, _ = MusicGenSolver._compute_cross_entropy(None, torch.cat(logits), codes, mask)
    return loss


def conditions_alone(lm: LMModel, clips: Clips, index: int) -> dict[str, tuple[Tensor, Tensor]]:
    """The condition tensors of one row.

    A dropped caption is what guidance puts beside a prompt when music is made: of the two rows of captions [prompt,
    None], the second, which has as many vectors as the prompt's, all zero.
    """
    case, row = clips.cases[index], clips.rows[index]
    sound = None if row.drop_melody else clips.sounds[index]
    if not clips.source.melody:
        sound = None
    provider = lm.condition_provider
    wanted = [attributes(case.caption, sound)]
    if row.drop_caption:
        wanted.append(attributes(None, sound))
    if not clips.source.melody:
        for one in wanted:
            one.wav.clear()
    tensors = provider(provider.tokenize(wanted))
    return {name: (values[-1:], mask[-1:]) for name, (values, mask) in tensors.items()}


# The case "melodies" has a row of every kind.
LOSSES = [
    pytest.param(name, case, marks=[] if case == "melodies" else [pytest.mark.full]) for name in KINDS for case in CASES
]


@pytest.mark.parametrize(("name", "case"), LOSSES)
def test_loss_and_every_gradient_are_audiocrafts_of_each_row_alone(name: str, case: str, opened: Opened) -> None:
    ours, theirs, clips = opened(name, case)
    examples = clips.examples()
    loss, reference = our_loss(ours, examples, clips.rows), their_loss(theirs, clips, examples)
    assert loss.item() == pytest.approx(reference.item(), rel=LOSS)
    loss.backward()
    reference.backward()
    gradients = {key: parameter.grad for key, parameter in theirs.named_parameters()}
    buffers = {key: value for key, value in theirs.state_dict().items() if key not in gradients}  # a melody's window
    state = {key: torch.zeros(1) if grad is None else grad for key, grad in gradients.items()}
    expected = lm_from_audiocraft(state | buffers)
    assert set(expected) == {key for key, _ in ours.named_parameters()}
    for key, parameter in ours.named_parameters():
        norm = torch.linalg.norm(expected[key])
        assert parameter.grad is not None and norm > 0, key
        assert torch.linalg.norm(parameter.grad - expected[key]) <= GRADIENT * norm, key


@pytest.mark.parametrize(
    "name", [name if name == KINDS[-1] else pytest.param(name, marks=pytest.mark.full) for name in KINDS]
)
def test_twenty_optimizer_steps_stay_together(name: str, opened: Opened) -> None:
    ours, theirs, clips = opened(name, "two")
    settings = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1, "eps": 1e-8}
    optimizers = [torch.optim.AdamW(model.parameters(), **settings) for model in (ours, theirs)]
    losses = []
    for step in range(20):
        examples = clips.examples(seed=step % 4)
        pair = [our_loss(ours, examples, clips.rows), their_loss(theirs, clips, examples)]
        for model, optimizer, loss in zip((ours, theirs), optimizers, pair, strict=True):
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        losses.append([loss.item() for loss in pair])
    found, expected = np.array(losses).T
    np.testing.assert_allclose(found, expected, rtol=STEPS)
    assert found[-1] < found[0] - 0.1


@pytest.mark.parametrize("mistake", ["mono delays", "dropped caption left out", "melody not repeated"])
def test_a_wrong_objective_fails_the_parity(mistake: str, opened: Opened) -> None:
    ours, theirs, clips = opened("debug-stereo-melody", "melodies")
    examples, rows = clips.examples(), clips.rows
    batch = examples.batch(rows)
    assert batch.attention_BS is not None and batch.melody_BC is not None
    if mistake == "mono delays":
        codes = torch.full((len(rows), 8, SEGMENT), 2048)
        for index, row in enumerate(rows):
            codes[index, :, : row.frames] = torch.from_numpy(examples.codes.crop(index, 0, 0, row.frames).astype(int))
        inputs, labels = inputs_and_labels(codes, 2048, channels=1)
        batch = replace(batch, inputs_BKT=inputs, labels_BKT=labels)
    elif mistake == "dropped caption left out":
        dropped = [row.drop_caption for row in rows].index(True)
        batch.attention_BS[dropped, 1:] = False
    else:
        batch.melody_BC[0, len(clips.notes[0]) :] = 0
    sums = ours(
        batch.inputs_BKT, batch.text_BSD, batch.text_mask_BS, batch.attention_BS, batch.labels_BKT, batch.melody_BC
    )
    loss = step_loss(sums, (batch.labels_BKT != IGNORED).sum(dim=(0, 2)))
    assert abs(loss.item() / their_loss(theirs, clips, examples).item() - 1) > 10 * LOSS


@torch.no_grad()
def test_audiocraft_trains_another_null_condition_than_it_makes_music_with(opened: Opened) -> None:
    """docs/decisions.md: why a null melody here is that of generation."""
    _, theirs, clips = opened("debug-melody", "null")
    codes = torch.from_numpy(clips.examples().codes.crop(1, 0, 0, SEGMENT).astype(np.int64))[None]

    def of_form(match_len_on_eval: bool, use_masking: bool) -> tuple[Tensor, int]:
        conditioner = theirs.condition_provider.conditioners["self_wav"]
        conditioner.match_len_on_eval, conditioner._use_masking = match_len_on_eval, use_masking
        provider = theirs.condition_provider
        tensors = provider(provider.tokenize([attributes(None, None)]))
        output = theirs.eval().compute_predictions(codes, [], tensors)
        return output.logits[output.mask], tensors["self_wav"][0].shape[1]

    (generation, places), (training, training_places) = of_form(True, False), of_form(False, True)
    assert (places, training_places) == (235, 5)
    apart = (generation - training).abs()
    spread = generation.std()
    print(f"logits differ by {apart.max():.2f} at most, {apart.mean():.2f} on average; their deviation is {spread:.2f}")
    assert apart.mean() > 0.1 * spread
