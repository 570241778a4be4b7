"""A stereo model made of a mono one: with equal channels it predicts what the mono model does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import EncodecFeatureExtractor

from tests.synthetic import random_examples
from trainer.data.order import Row
from trainer.errors import ModelError
from trainer.exports.audiocraft_names import lm_to_audiocraft
from trainer.exports.export import write_huggingface
from trainer.model.delay_pattern import inputs_and_labels
from trainer.model.language_model import load_language_model
from trainer.model.source import LANGUAGE_MODEL, Source, open_model
from trainer.model.stereo import Embeddings, in_stereo

pytestmark = pytest.mark.numbers
LENGTHS, CAPTIONS = [40, 21, 33], ["a tune for strings", None, "slow"]
MONO = ("debug", "debug-melody")


def logits_of(source: Source, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits of the same clips, and where they count; a stereo model gets each codebook twice, as both channels."""
    mono = random_examples(LENGTHS, CAPTIONS, model="debug-melody" if source.melody else "debug")
    rows = [Row(clip=clip, epoch=0, view=0, start=0, frames=n, drop_caption=False) for clip, n in enumerate(LENGTHS)]
    batch = mono.batch(rows)
    inputs, labels = batch.inputs_BKT, batch.labels_BKT
    if source.channels == 2:
        inputs, labels = inputs.repeat_interleave(2, dim=1), labels.repeat_interleave(2, dim=1)
    model = load_language_model(source).requires_grad_(False).eval().to(dtype)
    for parameter in model.parameters():  # so that embeddings are not small beside the positions
        if parameter.ndim == 2:
            parameter.mul_(3)
    text, mask = batch.text_BSD.to(dtype), batch.text_mask_BS.to(dtype)
    return model(inputs, text, mask, batch.attention_BS, melody_BC=batch.melody_BC), labels >= 0


def apart(model_id: str, embeddings: Embeddings, dtype: torch.dtype) -> float:
    """The largest difference of a channel's logits from the mono model's where both channels are equal."""
    source = open_model(model_id)
    mono, _ = logits_of(source, dtype)
    stereo, counts = logits_of(in_stereo(source, embeddings), dtype)
    return float((stereo - mono.repeat_interleave(2, dim=1)).abs()[counts].max())


@pytest.mark.parametrize("model_id", MONO)
def test_with_halved_embeddings_equal_channels_give_the_mono_models_logits(model_id: str) -> None:
    assert apart(model_id, "halved", torch.float64) < 1e-12
    # Logits are about 10 here. Some 30 roundings of 2**-24 in a row, of the embeddings' sum in another order first.
    assert apart(model_id, "halved", torch.float32) < 10 * 30 * 2**-24


@pytest.mark.parametrize("model_id", MONO)
def test_with_copied_embeddings_they_do_not(model_id: str) -> None:
    assert apart(model_id, "copied", torch.float64) > 0.1


def test_equal_channels_have_the_mono_models_delays() -> None:
    codes = torch.randint(0, 2048, (2, 4, 30))
    mono, stereo = inputs_and_labels(codes, 2048), inputs_and_labels(codes.repeat_interleave(2, dim=1), 2048, 2)
    for of_mono, of_stereo in zip(mono, stereo, strict=True):
        assert torch.equal(of_stereo, of_mono.repeat_interleave(2, dim=1))


def test_copied_is_metas_published_recipe() -> None:
    """audiocraft 1.3.0, docs/MUSICGEN.md, "Fine tuning mono model to stereo": nbs[k] = bs[k // 2] for both of these."""
    source = open_model("debug")
    state = lm_to_audiocraft({name: source.weights[name] for name in source.weights if name.startswith(LANGUAGE_MODEL)})
    recipe = dict(state)
    for k in range(8):
        for name in ("linears", "emb"):
            recipe[f"{name}.{k}.weight"] = state[f"{name}.{k // 2}.weight"]
    made = in_stereo(source, "copied").weights
    found = lm_to_audiocraft({name: made[name] for name in made if name.startswith(LANGUAGE_MODEL)})
    assert found.keys() == recipe.keys() and all(torch.equal(found[name], recipe[name]) for name in recipe)


@pytest.mark.parametrize("model_id", MONO)
def test_the_model_made_stereo_is_a_stereo_model_in_shape_and_names(model_id: str) -> None:
    source, stereo = open_model(model_id), open_model(model_id.replace("debug", "debug-stereo"))
    made = in_stereo(source)
    assert {name: made.weights.shape(name) for name in made.weights} == {
        name: stereo.weights.shape(name) for name in stereo.weights
    }
    assert (made.codebooks, made.channels, made.decoder_shape()) == (8, 2, stereo.decoder_shape())
    assert made.codec_identity() == source.codec_identity() and made.text_identity() == source.text_identity()
    assert made.probe() != source.probe() and in_stereo(source, "copied").probe() != made.probe()
    extractor, former = made.load_feature_extractor(), source.load_feature_extractor()
    if isinstance(extractor, EncodecFeatureExtractor):
        assert (extractor.feature_size, former.feature_size) == (2, 1)
    assert source.codebooks == 4, "the mono model was changed"
    with pytest.raises(ModelError, match="is a stereo model already"):
        in_stereo(made)


@pytest.mark.parametrize("embeddings", ["halved", "copied"])
def test_a_model_made_stereo_is_written_without_training_and_opens_bit_for_bit(
    embeddings: Embeddings, tmp_path: Path
) -> None:
    """transformers refuses to save tensors that share memory, as copies of one tensor may."""
    made = in_stereo(open_model("debug"), embeddings)
    write_huggingface(made, made.weights.starting_with(*LANGUAGE_MODEL), tmp_path / "model", "# made stereo\n")
    found = open_model(str(tmp_path / "model"))
    names = [name for name in made.weights if name.startswith(LANGUAGE_MODEL)]
    assert found.channels == 2 and all(torch.equal(found.weights[name], made.weights[name]) for name in names)


def test_ranges_of_halved_embeddings_are_read_alone() -> None:
    source = open_model("debug")
    name = "decoder.model.decoder.embed_tokens.{}.weight"
    made = in_stereo(source)
    for k in (0, 5):
        whole = source.weights[name.format(k // 2)]
        assert torch.equal(made.weights[name.format(k)], whole / 2)
        assert torch.equal(made.weights.read(name.format(k), 100, 333), whole.reshape(-1)[100:333] / 2)
