"""A row's loss is its own: it does not depend on the rows that it shares a micro-batch with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.synthetic import random_examples
from trainer.data.batches import Batch, Examples
from trainer.data.order import Row
from trainer.model.debug_model import build_debug_model
from trainer.model.delay_pattern import IGNORED
from trainer.model.language_model import LanguageModel, load_language_model
from trainer.model.source import open_model
from trainer.spec.shapes import DEBUG_NAMES

pytestmark = pytest.mark.numbers
# Texts of 1 to 5 tokens, none, and one that is dropped; clips of several lengths.
CAPTIONS = ["slow", None, "an upbeat song for strings", "a tune", "two words"]
LENGTHS = [40, 33, 12, 25, 9]
RELATIVE = 1e-6


def rows_of() -> list[Row]:
    return [
        Row(
            clip=clip, epoch=0, view=0, start=0, frames=frames, drop_caption=clip == 3, drop_melody=clip in (2, 3),
        )
        for clip, frames in enumerate(LENGTHS)
    ]  # fmt: skip


def losses_of(logits_BKTV: Tensor, batch: Batch) -> Tensor:
    """The summed cross entropy of each row, (B,)."""
    logits = logits_BKTV.flatten(0, 2).float()
    cells = functional.cross_entropy(logits, batch.labels_BKT.flatten(), ignore_index=IGNORED, reduction="none")
    return cells.view(batch.labels_BKT.shape).double().sum(dim=(1, 2))


def logits_of(model: LanguageModel, batch: Batch) -> Tensor:
    return model(
        batch.inputs_BKT, batch.text_BSD, batch.text_mask_BS, batch.attention_BS, melody_BC=batch.melody_BC
    )


def strong(name: str) -> LanguageModel:
    """Weights with which attention is peaked, so that what is attended to shows."""
    model, draw = load_language_model(open_model(name)).eval(), torch.Generator().manual_seed(0)
    for key, parameter in model.requires_grad_(False).named_parameters():
        if parameter.ndim == 2:
            parameter.mul_(3)
        elif key.endswith("bias"):
            parameter.add_(torch.randn(parameter.shape, generator=draw))
    return model


def alone(model: LanguageModel, examples: Examples) -> Tensor:
    """Each row's loss in a batch of itself."""
    batches = [examples.batch([row]) for row in rows_of()]
    return torch.cat([losses_of(logits_of(model, batch), batch) for batch in batches])


def apart(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).abs() / expected).max())


@pytest.mark.parametrize("name", DEBUG_NAMES)
def test_a_rows_loss_is_that_of_the_row_alone(name: str) -> None:
    model, examples = strong(name), random_examples(LENGTHS, CAPTIONS, model=name)
    batch = examples.batch(rows_of())
    assert batch.attention_BS is not None, "all texts are equally long"
    assert apart(losses_of(logits_of(model, batch), batch), alone(model, examples)) < RELATIVE


@pytest.mark.parametrize("name", DEBUG_NAMES)
def test_without_what_sets_rows_apart_the_loss_would_depend_on_the_others(name: str) -> None:
    """In a text model the mask of the text; in a melody model each row's own place for its codes."""
    model, examples = strong(name), random_examples(LENGTHS, CAPTIONS, model=name)
    batch = examples.batch(rows_of())
    logits = model(batch.inputs_BKT, batch.text_BSD, batch.text_mask_BS, None, melody_BC=batch.melody_BC)
    assert apart(losses_of(logits, batch), alone(model, examples)) > 100 * RELATIVE


@pytest.mark.parametrize("name", [name for name in DEBUG_NAMES if "melody" in name])
@torch.no_grad()
def test_transformers_forward_of_the_same_rows_makes_a_row_depend_on_the_others(name: str) -> None:
    """It pads in front of the codes. The row with the longest text, which nothing pads, has the same loss there."""
    ours, examples = strong(name), random_examples(LENGTHS, CAPTIONS, model=name)
    theirs = build_debug_model(stereo="stereo" in name, melody=True)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    batch = examples.batch(rows_of())
    theirs.text_encoder.forward = lambda **_: (batch.text_BSD,)  # the states that ours has
    logits = theirs(
        input_ids=batch.text_mask_BS.long(),
        attention_mask=batch.text_mask_BS.long(),
        input_features=functional.one_hot(batch.melody_BC, 12).float(),
        decoder_input_ids=batch.inputs_BKT.flatten(0, 1),
    ).logits
    shape = batch.labels_BKT.shape
    found = losses_of(logits[:, -shape[-1] :].view(*shape, -1), batch)
    expected = alone(ours, examples)
    longest = max(range(len(CAPTIONS)), key=lambda row: len((CAPTIONS[row] or "").split()))
    assert found[longest].item() == pytest.approx(expected[longest].item(), rel=RELATIVE)
    assert apart(found, expected) > 100 * RELATIVE
