"""Genre, instruments and mood of a sound by CLAP, which compares sound with words; a guess for a person to check."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from captioning.draft import Part, start_of
from trainer.errors import ModelError

RATE_HZ = 48_000  # of CLAP's models
WINDOW_SECONDS, WINDOWS, HEARD_SECONDS = 10.0, 3, 60.0

# What is offered for each field of a caption, the sentence in which CLAP is asked, and how many are taken at most.
CHOICES: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "genre": ("This is {} music.", 1, (
        "ambient", "blues", "chiptune", "classical", "country", "disco", "drum and bass", "dub", "dubstep", "electro",
        "film score", "flamenco", "folk", "funk", "gospel", "heavy metal", "hip hop", "house", "indie rock", "jazz",
        "latin", "lo-fi hip hop", "opera", "pop", "punk rock", "reggae", "rhythm and blues", "rock", "salsa", "soul",
        "swing", "synthwave", "techno", "trance", "trap", "world",
    )),
    "instrument": ("The sound of {}.", 2, (
        "accordion", "acoustic guitar", "bass guitar", "bells", "brass section", "cello", "choir", "clarinet",
        "distorted electric guitar", "clean electric guitar", "drum kit", "drum machine", "female singing", "flute",
        "hand drums", "harmonica", "harp", "male singing", "orchestra", "organ", "piano", "saxophone", "sitar",
        "strings", "synthesizer", "trumpet", "ukulele", "violin",
    )),
    "mood": ("This music is {}.", 1, (
        "aggressive", "calm", "dark", "dreamy", "energetic", "epic", "happy", "melancholic", "mysterious", "playful",
        "romantic", "sad", "tense", "uplifting",
    )),
}  # fmt: skip
LEAST_SHARE = 0.25  # of the probability among the choices of a field; less is not taken


class ZeroShot:
    """A CLAP model with the choices as vectors."""

    def __init__(self, model: str):
        """Load `model`, a hub id or a folder. Raises ModelError where it is not there, or is no CLAP model."""
        import torch
        from transformers import ClapModel, ClapProcessor

        try:
            self._processor = ClapProcessor.from_pretrained(model)
            self._model = ClapModel.from_pretrained(model).eval()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"--clap {model} cannot be loaded ({str(error).splitlines()[0]}): give laion/clap-htsat-unfused, which "
                "has to be downloaded once, or the folder of a CLAP model in transformers' layout"
            ) from error
        self._torch = torch
        prompts = [sentence.format(choice) for sentence, _, choices in CHOICES.values() for choice in choices]
        self._texts, _ = self._embed(prompts, [np.zeros(round(WINDOW_SECONDS * RATE_HZ), np.float32)])

    def parts_of(self, path: Path) -> tuple[Part, ...]:
        """What CLAP hears in a file's first minute. Raises AudioFault where it cannot be decoded."""
        samples = start_of(path, RATE_HZ, HEARD_SECONDS)
        size = round(WINDOW_SECONDS * RATE_HZ)
        starts = np.linspace(0, max(0, len(samples) - size), WINDOWS if len(samples) > size else 1).astype(int)
        _, sounds = self._embed(["music"], [samples[start : start + size] for start in starts])
        scale = float(self._model.logit_scale_a.detach().exp())
        scores = scale * (sounds @ self._texts.T).mean(axis=0)
        parts, begin = [], 0
        for field, (_, most, choices) in CHOICES.items():
            shares = _shares(scores[begin : begin + len(choices)])
            best = [index for index in np.argsort(-shares)[:most] if shares[index] >= LEAST_SHARE]
            begin += len(choices)
            if best:
                text, share = ", ".join(choices[index] for index in best), float(sum(shares[index] for index in best))
                parts.append(Part(field=field, text=text, source="CLAP", confidence=share))
        return tuple(parts)

    def _embed(self, texts: Sequence[str], sounds: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Unit vectors (texts, D) and (sounds, D).

        By the whole model: get_text_features returns a tensor in some versions of transformers, an object in others.
        """
        words = self._processor.tokenizer(list(texts), padding=True, return_tensors="pt")
        heard = self._processor.feature_extractor(list(sounds), sampling_rate=RATE_HZ, return_tensors="pt")
        inputs = {"input_ids": words.input_ids, "attention_mask": words.attention_mask}
        with self._torch.inference_mode():
            output = self._model(**inputs, **heard)
        return output.text_embeds.float().numpy(), output.audio_embeds.float().numpy()


def _shares(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max())
    return powers / powers.sum()
