"""Every clip counts, by its share of the valid cells, however a step is split."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from tests.plans import engine_for, plan_for
from tests.rounding import LOSS, NORM
from tests.synthetic import random_examples
from trainer.data.captions import texts_of
from trainer.data.cut import cut_for, micro_batches
from trainer.data.order import Order, Row, rows_of_step, valid_cells
from trainer.flags.config import Config
from trainer.model.language_model import load_language_model
from trainer.model.loss import step_loss
from trainer.model.source import open_model

pytestmark = pytest.mark.numbers
LENGTHS = [5, 40, 60, 33, 17, 40, 90, 12]
SEGMENT = 40


def rows_of(lengths) -> list[Row]:
    return [
        Row(clip=clip, epoch=0, view=0, start=0, frames=min(length, SEGMENT), drop_caption=False)
        for clip, length in enumerate(lengths)
    ]


def gradient(model, examples, rows, cells) -> dict[str, torch.Tensor]:
    model.zero_grad()
    batch = examples.batch(rows)
    sums = model(batch.inputs_BKT, batch.text_BSD, batch.text_mask_BS, batch.attention_BS, labels_BKT=batch.labels_BKT)
    step_loss(sums, torch.from_numpy(cells)).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def in_float64(tensor):
    return tensor.double() if tensor.is_floating_point() else tensor


def test_the_gradient_of_a_batch_is_the_sum_of_its_clips_gradients(monkeypatch):
    model = load_language_model(open_model("debug")).double()
    examples = random_examples(LENGTHS)
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)  # float64 throughout
    original = type(examples).batch
    monkeypatch.setattr(type(examples), "batch", lambda self, rows: original(self, rows).map(in_float64))
    rows = rows_of(LENGTHS)
    cells = valid_cells(rows, 4, SEGMENT)
    together = gradient(model, examples, rows, cells)
    alone = [gradient(model, examples, [row], cells) for row in rows]
    for name, whole in together.items():
        total = sum(part[name] for part in alone)
        assert torch.linalg.norm(whole - total) <= 1e-12 * max(1e-3, torch.linalg.norm(whole)), name


def test_a_clips_loss_does_not_depend_on_its_batch_mates():
    model = load_language_model(open_model("debug")).eval()
    examples = random_examples(LENGTHS)
    rows = rows_of(LENGTHS)
    with torch.no_grad():
        batch = examples.batch(rows)
        logits = model(batch.inputs_BKT, batch.text_BSD, batch.text_mask_BS, batch.attention_BS)
        for row in rows:
            one = examples.batch([row])
            alone = model(one.inputs_BKT, one.text_BSD, one.text_mask_BS, one.attention_BS)
            steps = one.inputs_BKT.shape[-1]
            valid = one.labels_BKT[0] >= 0
            torch.testing.assert_close(logits[row.clip, :, :steps][valid], alone[0][valid], rtol=0, atol=2e-6)


def ten_steps(
    micro_batch, accumulation, lengths=LENGTHS, global_batch=8, precision="no", word_dropout=0.0, by_duration=False
):
    examples = random_examples(lengths)
    if word_dropout:
        rules = {"word_dropout": word_dropout, "variants": 5, "seed": 1}
        examples = replace(examples, texts=[texts_of(caption, **rules) for caption in examples.captions])
    order = Order(
        seed=1,
        epochs=10 * global_batch,
        global_batch=global_batch,
        segment_frames=SEGMENT,
        codebooks=4,
        caption_drop_rate=0.3,
        frames=examples.codes.frames,
        texts=None if examples.texts is None else np.array([len(texts) for texts in examples.texts]),
        max_steps=10,
        by_duration=by_duration,
    )
    plan = plan_for(micro_batch=micro_batch, accumulation=accumulation, precision=precision)
    config = Config(dataset_path="unused", lr=1e-3)
    engine = engine_for(plan, config)
    results = []
    for step in range(10):
        rows = rows_of_step(order, step)
        cut = cut_for(order, micro_batch=micro_batch, accumulation=accumulation, world_size=1, row_places=6)
        shares = micro_batches(rows, cut, 0)
        cells = valid_cells(rows, 4, SEGMENT)
        results.append(engine.step([examples.batch(share) for share in shares], cells, step=step, learning_rate=1e-3))
    return np.array([r.loss for r in results]), np.array([r.grad_norm for r in results])


def test_batch_times_accumulation_may_be_split_at_will():
    losses, norms = ten_steps(8, 1)
    assert losses[-1] < losses[0]
    for micro_batch, accumulation in [(4, 2), (1, 8), (3, 3), (5, 2)]:
        other_losses, other_norms = ten_steps(micro_batch, accumulation)
        np.testing.assert_allclose(other_losses, losses, rtol=0, atol=LOSS)
        np.testing.assert_allclose(other_norms, norms, rtol=NORM)


def test_batches_may_be_split_at_will_with_words_dropped():
    losses, norms = ten_steps(8, 1, word_dropout=0.4)
    assert (losses != ten_steps(8, 1)[0]).all(), "no word was dropped"
    for micro_batch, accumulation in [(1, 8), (3, 3)]:
        other_losses, other_norms = ten_steps(micro_batch, accumulation, word_dropout=0.4)
        np.testing.assert_allclose(other_losses, losses, rtol=0, atol=LOSS)
        np.testing.assert_allclose(other_norms, norms, rtol=NORM)


def test_batches_may_be_split_at_will_where_long_clips_have_several_crops():
    lengths = [5, 40, 130, 33, 90]
    losses, norms = ten_steps(8, 1, lengths, by_duration=True)
    assert (losses != ten_steps(8, 1, lengths)[0]).any(), "no clip has a second crop"
    for micro_batch, accumulation in [(1, 8), (3, 3)]:
        other_losses, other_norms = ten_steps(micro_batch, accumulation, lengths, by_duration=True)
        np.testing.assert_allclose(other_losses, losses, rtol=0, atol=LOSS)
        np.testing.assert_allclose(other_norms, norms, rtol=NORM)


def test_fewer_files_than_the_batch_still_train():
    losses, _ = ten_steps(4, 2, lengths=[30, 12])
    assert losses[-1] < losses[0] - 0.5


def test_bf16_stays_near_float32():
    losses, norms = ten_steps(8, 1)
    half_losses, half_norms = ten_steps(8, 1, precision="bf16")
    # 8 bits of mantissa in every product: about 0.4 % of the logits, of which the loss sees the mean
    np.testing.assert_allclose(half_losses, losses, rtol=2e-3)
    np.testing.assert_allclose(half_norms, norms, rtol=3e-2)
    assert (half_losses != losses).all(), "nothing was computed in bf16"


def test_a_null_condition_contributes_exactly_zero_in_float32_and_bf16():
    model = load_language_model(open_model("debug")).eval()
    examples = random_examples([20, 20], [None, "some words here"])
    with torch.no_grad():
        model.enc_to_dec_proj.bias.normal_()  # 0 at the start, which would hide text that is not masked
    attention = model.decoder.model.decoder.layers[0].encoder_attn
    outputs = []
    attention.register_forward_hook(lambda module, inputs, output: outputs.append(output[0]))
    batch = examples.batch(rows_of([20, 20]))
    for dtype in (torch.float32, torch.bfloat16):
        outputs.clear()
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = model(batch.inputs_BKT, batch.text_BSD, batch.text_mask_BS, batch.attention_BS)
        assert (outputs[0][0] == 0).all() and (outputs[0][1] != 0).any()
        assert torch.isfinite(logits).all()


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_gradients_of_a_batch_of_null_conditions_are_finite(precision):
    model = load_language_model(open_model("debug"))
    batch = random_examples([20, 9], [None, None]).batch(rows_of([20, 9]))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss = model(
            batch.inputs_BKT,
            batch.text_BSD,
            batch.text_mask_BS,
            batch.attention_BS,
            labels_BKT=batch.labels_BKT,
        ).sum()
    loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters() if parameter.grad is not None)


def test_the_loss_is_the_mean_over_codebooks_of_the_mean_over_cells():
    logits, labels = torch.randn(3, 4, 10, 2048), torch.randint(0, 2048, (3, 4, 10))
    labels[0, 1, 4:], labels[2, :, :5] = -100, -100
    from trainer.model.loss import summed_cross_entropy

    expected = sum(functional.cross_entropy(logits[:, k].reshape(-1, 2048), labels[:, k].reshape(-1)) for k in range(4))
    cells = (labels >= 0).sum(dim=(0, 2))
    assert step_loss(summed_cross_entropy(logits, labels), cells).item() == pytest.approx(expected.item() / 4, abs=1e-6)
