"""The notes of a sound: at each time the strongest of the octave's 12, which is what a melody model reads of a melody.

These are the argmax of audiocraft 1.3.0's ChromaExtractor (n_chroma 12, radix2_exp 14) and of transformers'
MusicgenMelodyFeatureExtractor: power spectra of windows of half a second, summed by a chroma filter bank. What those
normalise by cannot change which note is the strongest, and is left out. Silence has note 0.

Sums of float32 are rounded otherwise on a GPU, on another processor, and in audiocraft: where two notes are equally
strong to about six digits, another one of them may be found. What is cached is kept, so that this is no matter of
which machine goes on with a run.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from transformers.audio_utils import chroma_filter_bank

from trainer.data.codec_windows import reproducible

# Another one where other notes are found of the same sound: those in the cache are then found anew. Neither a prepared
# folder nor a checkpoint says by which version its notes were found: what was made by version 1 must say so then.
VERSION = 1
SAMPLE_RATE_HZ = 32_000
WINDOW_SAMPLES = 16_384
NOTE_SAMPLES = 4_096  # between two notes that a model reads
FRAME_SAMPLES = 640  # between two notes that are cached: one for each frame of the codes, so that crops find theirs
# Windows of one pass, always as many: how a product is rounded depends on its shape, and a note must depend on neither
# the blocks in which a sound comes nor what is heard beside it. A pass of 64 holds 4 MiB of samples.
PASS_WINDOWS = 64
CPU = torch.device("cpu")


def notes_of(samples_n: np.ndarray, device: torch.device = CPU) -> np.ndarray:
    """The notes (m,) uint8 in [0, 12) of a whole mono sound (n,) float32 at 32 kHz: one for every 4096 samples.

    m = 1 + n // 4096; of a sound shorter than a window as for one of 16,384 samples: 5; none of no samples.
    """
    return _notes(NOTE_SAMPLES, [samples_n], device)


def frame_notes(blocks: Iterable[np.ndarray], device: torch.device = CPU) -> np.ndarray:
    """The same for every 640 samples, from consecutive blocks (n_i,) of a sound, of which little is held at once.

    Whatever the blocks, the notes are the same: 1 + n // 640 of n samples, 26 of fewer than 16,384, none of none.
    """
    return _notes(FRAME_SAMPLES, blocks, device)


class NoteFinder:
    """Finds the notes of a sound that comes block by block: one for every `hop_samples`, which is at most 8,000.

    Note j is of the window around sample j x hop_samples; beyond both ends the sound is mirrored. A sound shorter than
    a window first gets zeros around it, equally many before and behind, one more behind where they are uneven.
    """

    def __init__(self, hop_samples: int, device: torch.device):
        self._hop, self._device = hop_samples, device
        self._pass_samples = (PASS_WINDOWS - 1) * hop_samples + WINDOW_SAMPLES
        self._held: list[np.ndarray] = []  # what follows the passes that are done, with what the next windows share
        self._held_samples = self._samples = 0
        self._found: list[Tensor] = []  # (PASS_WINDOWS,) uint8 of each pass, on the device

    def add(self, block: np.ndarray) -> None:
        """The next samples of the sound, (n,) float32."""
        self._held.append(block)
        self._held_samples += len(block)
        self._samples += len(block)
        if self._held_samples < self._pass_samples:
            return
        held = self._joined()
        while len(held) >= self._pass_samples:
            held = self._run(held)
        self._held, self._held_samples = [held.copy()], len(held)

    def notes(self) -> np.ndarray:
        """The notes (m,) uint8 of the sound, which ends here."""
        if self._samples == 0:
            return np.zeros(0, np.uint8)
        held = self._joined()
        # A pass leaves more than half a window behind it, so that what is mirrored here is held.
        held = np.concatenate((held, held[-2 : -2 - WINDOW_SAMPLES // 2 : -1]))
        count = 1 + max(self._samples, WINDOW_SAMPLES) // self._hop
        while len(self._found) * PASS_WINDOWS < count:
            held = self._run(np.pad(held, (0, max(0, self._pass_samples - len(held)))))
        return torch.cat(self._found)[:count].cpu().numpy()

    def _joined(self) -> np.ndarray:
        """What is held, with the mirrored start where no pass was done yet."""
        held = np.concatenate(self._held, dtype=np.float32)
        if self._found:
            return held
        if (missing := WINDOW_SAMPLES - len(held)) > 0:
            held = np.pad(held, (missing // 2, missing - missing // 2))
        return np.concatenate((held[WINDOW_SAMPLES // 2 : 0 : -1], held))

    def _run(self, held: np.ndarray) -> np.ndarray:
        """One pass; returns what the next one begins with."""
        window_n, bank_CF = _window_and_bank(self._device)
        samples = torch.from_numpy(held[: self._pass_samples]).to(self._device)
        with torch.inference_mode(), reproducible(self._device):
            spectrum_NF = torch.fft.rfft(samples.unfold(0, WINDOW_SAMPLES, self._hop) * window_n)
            power_NF = spectrum_NF.real.square() + spectrum_NF.imag.square()
            # argmax takes the first of equal ones, on a GPU too: of silence note 0
            self._found.append((power_NF @ bank_CF.T).argmax(-1).to(torch.uint8))
        return held[PASS_WINDOWS * self._hop :]


def _notes(hop_samples: int, blocks: Iterable[np.ndarray], device: torch.device) -> np.ndarray:
    finder = NoteFinder(hop_samples, device)
    for block in blocks:
        finder.add(block)
    return finder.notes()


@lru_cache(maxsize=4)
def _window_and_bank(device: torch.device) -> tuple[Tensor, Tensor]:
    """The window (n,) and the filter bank (12, n // 2 + 1), both float32. transformers' bank is librosa's, bit for bit:
    tests/data/test_chroma.py."""
    bank = chroma_filter_bank(
        num_frequency_bins=WINDOW_SAMPLES, sampling_rate=SAMPLE_RATE_HZ, tuning=0, num_chroma=12
    )
    return torch.hann_window(WINDOW_SAMPLES, device=device), torch.from_numpy(bank).float().to(device)
