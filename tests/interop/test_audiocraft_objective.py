"""The training objective against audiocraft 1.3.0's own: same weights, same codes, its loss, its solver.

Text is unpadded here (one caption, or captions of equal length), because audiocraft attends to padded text as
zero vectors where we mask it, so that a clip's loss does not depend on its batch-mates.
"""

from __future__ import annotations

from tests.interop.audiocraft_modules import require_audiocraft

require_audiocraft()

import numpy as np
import pytest
import torch
from audiocraft.solvers.musicgen import MusicGenSolver

from tests.interop.audiocraft_models import build_lm, conditions
from trainer.data.batches import Examples
from trainer.data.order import Row, valid_cells
from trainer.exports.audiocraft_names import lm_from_audiocraft
from trainer.model.delay_pattern import IGNORED
from trainer.model.language_model import load_language_model
from trainer.model.loss import step_loss, summed_cross_entropy
from trainer.model.source import load_text_encoder, open_model

pytestmark = pytest.mark.numbers
CAPTIONS = ["slow rock guitar", "fast drum machine", "happy synth melody"]  # equal token counts, see below
SEGMENT = 30


class Codes:
    def __init__(self, lengths, seed=0):
        draw = np.random.default_rng(seed)
        self.clips = [draw.integers(0, 2048, (4, length), dtype=np.int16) for length in lengths]
        self.frames = np.array([[length] for length in lengths])

    def crop(self, clip, view, start, frames):
        return self.clips[clip][:, start : start + frames]


class T5States:
    """States of each caption alone, from the model's own T5."""

    def __init__(self, source):
        self.tokenizer, self.encoder = source.load_tokenizer(), load_text_encoder(source)

    @torch.no_grad()
    def states(self, caption):
        tokens = self.tokenizer(caption, return_tensors="pt")
        return self.encoder(**tokens).last_hidden_state[0].numpy()

    def tokens(self, caption):
        return len(self.tokenizer(caption).input_ids)


@pytest.fixture(scope="module")
def source():
    return open_model("debug")


@pytest.fixture
def ours(source):
    # Weights blown up, so that text and every layer matter to the loss.
    model = load_language_model(source)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(2.5)
            elif name.endswith("bias"):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


@pytest.fixture
def theirs(source, ours, tmp_path):
    return build_lm(source, ours.state_dict(), tmp_path).train()


def examples_of(source, lengths, captions, seed=0) -> Examples:
    return Examples(
        codes=Codes(lengths, seed),
        text=T5States(source),
        captions=captions,
        names=[str(clip) for clip in range(len(lengths))],
        shape=source.shape,
        special_token=2048,
        segment_frames=SEGMENT,
    )


def rows_of(lengths) -> list[Row]:
    return [
        Row(clip=clip, epoch=0, view=0, start=0, frames=length, drop_caption=False)
        for clip, length in enumerate(lengths)
    ]


def our_loss(model, examples, rows):
    batch = examples.batch(rows)
    logits = model(batch.inputs_BKT, batch.text_BSD, batch.text_mask_BS, batch.attention_BS)
    cells = torch.from_numpy(valid_cells(rows, 4, SEGMENT))
    return step_loss(summed_cross_entropy(logits, batch.labels_BKT), cells)


def their_loss(lm, examples, rows):
    """audiocraft's run_step: padded codes replaced by its special token, its pattern, its cross entropy."""
    codes = torch.full((len(rows), 4, SEGMENT), lm.special_token_id)
    padding_mask = torch.zeros_like(codes, dtype=torch.bool)
    for index, row in enumerate(rows):
        clip = torch.from_numpy(examples.codes.crop(row.clip, 0, 0, row.frames).astype(np.int64))
        codes[index, :, : row.frames], padding_mask[index, :, : row.frames] = clip, True
    attributes = conditions([examples.captions[row.clip] for row in rows])
    tensors = lm.condition_provider(lm.condition_provider.tokenize(attributes))
    output = lm.compute_predictions(codes, [], tensors)
    mask = padding_mask & output.mask
    loss, _ = MusicGenSolver._compute_cross_entropy(None, output.logits, codes, mask)
    return loss


CASES = {
    "full": ([SEGMENT] * 3, CAPTIONS),
    "padded audio": ([SEGMENT, 11, 28], CAPTIONS),
    "null captions": ([SEGMENT] * 3, [None] * 3),
    "padded audio, one null caption": ([9, SEGMENT, 20], [CAPTIONS[0], None, CAPTIONS[1]]),
    "one clip alone": ([SEGMENT], ["a caption of another length"]),
}


def test_the_captions_have_equal_token_counts(source):
    tokenizer = source.load_tokenizer()
    assert len({len(tokenizer(caption).input_ids) for caption in CAPTIONS}) == 1


@pytest.mark.parametrize("case", CASES)
def test_loss_and_every_gradient_are_audiocrafts(case, source, ours, theirs):
    lengths, captions = CASES[case]
    examples, rows = examples_of(source, lengths, captions), rows_of(lengths)
    loss, reference = our_loss(ours, examples, rows), their_loss(theirs, examples, rows)
    assert loss.item() == pytest.approx(reference.item(), abs=1e-6)
    loss.backward()
    reference.backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    expected = lm_from_audiocraft({name: torch.zeros(1) if g is None else g for name, g in gradients.items()})
    for name, parameter in ours.named_parameters():
        difference = torch.linalg.norm(parameter.grad - expected[name])
        # 2.2e-5 was measured as the worst relative difference of float32 sums in another order
        assert difference <= 1e-4 * torch.linalg.norm(expected[name]) + 1e-12, name


@pytest.mark.parametrize("mistake", ["no delay", "tail", "dropout"])
def test_a_wrong_objective_fails_the_parity(mistake, source, ours, theirs):
    lengths, captions = CASES["full"]
    examples, rows = examples_of(source, lengths, captions), rows_of(lengths)
    batch = examples.batch(rows)
    if mistake == "no delay":
        codes = torch.stack([torch.from_numpy(clip.astype(np.int64)) for clip in examples.codes.clips])
        inputs = torch.cat([torch.full_like(codes[..., :1], 2048), codes[..., :-1]], -1)
        labels = codes
    elif mistake == "tail":
        longer = examples_of(source, lengths, captions)
        object.__setattr__(longer, "segment_frames", SEGMENT + 3)
        tail = longer.batch(rows)
        inputs, labels = tail.inputs_BKT, tail.labels_BKT
    else:
        inputs, labels = batch.inputs_BKT, batch.labels_BKT
        ours.decoder.model.decoder.dropout = 0.1
    logits = ours(inputs, batch.text_BSD, batch.text_mask_BS, batch.attention_BS)
    cells = (labels != IGNORED).sum(dim=(0, 2))
    loss = step_loss(summed_cross_entropy(logits, labels), cells)
    assert abs(loss.item() - their_loss(theirs, examples, rows).item()) > 1e-4


def test_twenty_optimizer_steps_stay_together(source, ours, theirs):
    settings = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1, "eps": 1e-8}
    optimizers = [torch.optim.AdamW(model.parameters(), **settings) for model in (ours, theirs)]
    lengths, captions = CASES["padded audio, one null caption"]
    rows, differences, first, last = rows_of(lengths), [], None, None
    for step in range(20):
        examples = examples_of(source, lengths, captions, seed=step % 4)
        losses = [our_loss(ours, examples, rows), their_loss(theirs, examples, rows)]
        for model, optimizer, loss in zip((ours, theirs), optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        differences.append(abs(losses[0].item() - losses[1].item()))
        first, last = first or losses[0].item(), losses[0].item()
    assert max(differences) <= 1e-5
    assert last < first - 0.1
