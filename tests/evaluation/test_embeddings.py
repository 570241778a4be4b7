"""What a sound's vector is, by EnCodec's latents and by CLAP; and that music is told from noise by them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import ClapModel, ClapProcessor, EncodecModel

from tests.runs import EXAMPLES
from tests.small_clap import write_small_clap
from trainer.errors import DataError, ModelError
from trainer.evaluation.distances import kernel_audio_distance
from trainer.evaluation.embeddings import (
    Clap,
    latent_embedding,
    open_clap,
    sound_of_file,
    texts_are_alike,
)
from trainer.model.source import load_codec, open_model

RATE_HZ = 32_000


@pytest.fixture(scope="module")
def codec() -> EncodecModel:
    return load_codec(open_model("debug"))


@pytest.fixture(scope="module")
def clap(tmp_path_factory: pytest.TempPathFactory) -> Clap:
    return open_clap(str(write_small_clap(tmp_path_factory.mktemp("clap"))), torch.device("cpu"))


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(round(seconds * RATE_HZ))).astype(np.float32)


def test_a_latent_embedding_is_mean_and_deviation_of_the_encoder_s_output(codec: EncodecModel) -> None:
    sound = noise(0.5)
    with torch.no_grad():
        values_WT = codec.encoder(torch.from_numpy(sound)[None, None])[0].double().numpy()
    assert values_WT.shape == (codec.config.hidden_size, 25)
    expected = np.concatenate([values_WT.mean(axis=1), values_WT.std(axis=1)])
    np.testing.assert_allclose(latent_embedding(codec, sound), expected, rtol=1e-6, atol=1e-6 * abs(expected).max())
    part_of_a_frame = np.concatenate([sound, noise(0.019)])
    np.testing.assert_array_equal(latent_embedding(codec, part_of_a_frame), latent_embedding(codec, sound))


def test_two_channels_are_heard_one_by_one_and_count_alike(codec: EncodecModel) -> None:
    left, right = noise(0.5, 1), noise(0.5, 2)
    both = latent_embedding(codec, np.stack([left, right], axis=1))
    np.testing.assert_allclose(both, latent_embedding(codec, np.stack([right, left], axis=1)), rtol=1e-9)
    means = [latent_embedding(codec, one)[: len(both) // 2] for one in (left, right)]
    np.testing.assert_allclose(both[: len(both) // 2], np.mean(means, axis=0), rtol=1e-9)
    doubled = latent_embedding(codec, np.stack([left, left], axis=1))
    np.testing.assert_allclose(doubled, latent_embedding(codec, left), rtol=1e-9)


def test_clap_s_vectors_are_those_of_transformers_whole_model(clap: Clap) -> None:
    model, processor = ClapModel.from_pretrained(clap.name).eval(), ClapProcessor.from_pretrained(clap.name)
    sound, texts = noise(2.0), ["slow rock", "a calm piano"]
    heard = processor.feature_extractor(
        [np.zeros(1, np.float32), soxr_48k(sound)], sampling_rate=48_000, return_tensors="pt"
    )  # fmt: skip
    words = processor.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = model(input_ids=words.input_ids, attention_mask=words.attention_mask, **heard)
    # Both are in float32, in batches of other sizes: 2^-24 for each of some hundred roundings, of values up to 1.
    np.testing.assert_allclose(clap.sound_embedding(sound, RATE_HZ), output.audio_embeds[1].numpy(), atol=1e-5)
    np.testing.assert_allclose(clap.text_embeddings(texts), output.text_embeds.numpy(), atol=1e-5)


def soxr_48k(sound: np.ndarray) -> np.ndarray:
    import soxr

    return np.asarray(soxr.resample(sound, RATE_HZ, 48_000, quality="HQ"))


def test_clap_hears_a_long_sound_piece_by_piece_and_the_same_each_time(clap: Clap) -> None:
    long = noise(23.0)
    pieces = np.stack([clap.sound_embedding(long[start * RATE_HZ :][: 10 * RATE_HZ], RATE_HZ) for start in (0, 10)])
    mean = pieces.mean(axis=0) / np.linalg.norm(pieces.mean(axis=0))
    whole = clap.sound_embedding(long, RATE_HZ)
    # A resampler hears a little over the edges of pieces, in 1 ms of 10 s.
    np.testing.assert_allclose(whole, mean, atol=1e-3)
    np.testing.assert_array_equal(whole, clap.sound_embedding(long, RATE_HZ))
    assert np.linalg.norm(whole) == pytest.approx(1)


def test_a_clap_that_is_not_there_or_not_whole_is_named(clap: Clap, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="none_there cannot be loaded"):
        open_clap(str(tmp_path / "none_there"), torch.device("cpu"))
    model = ClapModel.from_pretrained(clap.name)
    state = {name: value for name, value in model.state_dict().items() if "text_projection" not in name}
    model.save_pretrained(tmp_path / "part", state_dict=state)
    ClapProcessor.from_pretrained(clap.name).save_pretrained(tmp_path / "part")
    with pytest.raises(ModelError, match="no whole CLAP model: it lacks text_projection"):
        open_clap(str(tmp_path / "part"), torch.device("cpu"))


def test_texts_that_a_model_cannot_tell_apart_are_noticed(clap: Clap, tmp_path: Path) -> None:
    texts = [path.read_text().strip() for path in sorted(EXAMPLES.glob("*.txt"))]
    alike = open_clap(str(write_small_clap(tmp_path, tells_texts_apart=False)), torch.device("cpu"))
    assert texts_are_alike(alike.text_embeddings(texts)) and not texts_are_alike(clap.text_embeddings(texts))
    assert not texts_are_alike(clap.text_embeddings(texts[:1]))


def test_a_file_that_cannot_be_judged_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_text("no sound")
    with pytest.raises(DataError, match=r"text\.wav cannot be judged"):
        sound_of_file(tmp_path / "text.wav", RATE_HZ, 1, 1.0)
    sound = sound_of_file(EXAMPLES / "metal_madness.wav", RATE_HZ, 2, 1.5)
    assert sound.shape == (48_000, 2)


@pytest.mark.full
@pytest.mark.numbers
@pytest.mark.parametrize("genre", ["arcade", "metal"])
def test_music_is_closer_to_itself_than_to_another_genre_and_than_to_noise(codec: EncodecModel, genre: str) -> None:
    """The other seconds of the same clips, then another genre, then noise as loud, by a codec of random weights.

    It hears the spectrum, which differs between these genres and far more from noise: that distances come in this
    order shows that they measure sound, not that they measure quality.
    """
    clips: dict[str, list[np.ndarray]] = {"arcade": [], "metal": []}
    sounds: dict[str, list[np.ndarray]] = {"arcade": [], "metal": []}
    for path in sorted(EXAMPLES.iterdir()):
        name = path.name.split("_")[0]
        if name in clips and path.suffix in (".wav", ".flac", ".ogg", ".mp3"):
            sound = sound_of_file(path, RATE_HZ, 1, 8.0)
            pieces = [sound[start : start + RATE_HZ] for start in range(0, len(sound) - RATE_HZ + 1, RATE_HZ)]
            sounds[name] += pieces
            clips[name] += [latent_embedding(codec, piece) for piece in pieces]
    loudness = np.sqrt(np.mean([np.square(piece).mean() for pieces in sounds.values() for piece in pieces]))
    made = np.stack([latent_embedding(codec, noise(1.0, seed) * np.float32(10 * loudness)) for seed in range(30)])
    other = np.stack(clips["metal" if genre == "arcade" else "arcade"])
    first, second = np.stack(clips[genre][0::2]), np.stack(clips[genre][1::2])
    itself, another, to_noise = (kernel_audio_distance(rows, first) for rows in (second, other, made))
    assert itself < another < to_noise, (itself, another, to_noise)
    assert to_noise > 10 * abs(itself)
