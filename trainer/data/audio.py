"""Reads sound files of any length in constant memory, and says what is wrong with them.

libsndfile decodes by content, so an mp3 or flac named .wav works. It also accepts cut-off files,
NaN and silence without a word (measured with soundfile 0.14, libsndfile 1.2.2): those are found here.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import soundfile
import soxr

from trainer.data.wav_header import UnclosedWav, wav_layout

Fault = Literal["not a file", "unreadable", "truncated", "empty", "not finite", "silent"]
FAULTS: tuple[Fault, ...] = get_args(Fault)

SILENCE_PEAK = 1e-4  # -80 dBFS; the last bit of 16-bit audio lies at -90 dBFS
LOUDEST = 1e30  # full scale is 1; beyond this float32 sums overflow, and the file is no sound
SAMPLE_RATES_HZ = (1_000, 1_000_000)  # a header outside is damaged: obeying it would make days out of seconds
BLOCK_VALUES = 1 << 18  # samples x channels decoded at once by inspect: 1 MiB of float32


@dataclass(frozen=True, kw_only=True)
class AudioFacts:
    """What one pass over a sound file found; `content` is the hex blake2b-128 of the file's bytes."""

    seconds: float
    sample_rate_hz: int
    channels: int
    content: str


class AudioFault(Exception):
    """A file that cannot be trained on: `fate` is one of FAULTS, `detail` says why and what would work."""

    def __init__(self, fate: Fault, detail: str):
        super().__init__(f"{fate}: {detail}")
        self.fate: Fault = fate
        self.detail = detail


def inspect(path: Path) -> AudioFacts:
    """The facts of a whole and audible sound file, from one pass over its samples and one over its bytes.

    Seconds are those of the samples read, since the length in an mp3's header is only an estimate.
    Samples beyond [-1, 1] are fine. Raises AudioFault, and nothing else, for every other file.
    """
    with _opened(path) as sound:
        frames = _check_samples(sound)
        rate, channels = sound.samplerate, sound.channels
    return AudioFacts(seconds=frames / rate, sample_rate_hz=rate, channels=channels, content=content_of(path))


def content_of(path: Path) -> str:
    """Hex blake2b-128 of the file's bytes. Raises AudioFault where it cannot be read."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        with open(path, "rb", buffering=0) as raw:
            while piece := raw.read(1 << 20):
                digest.update(piece)
    except OSError as error:
        raise unreadable(error) from error
    return digest.hexdigest()


def stream(path: Path, sample_rate_hz: int, block_seconds: float = 10.0) -> Iterator[np.ndarray]:
    """The file as mono float32 blocks (n,) at `sample_rate_hz`, about `block_seconds` each, never empty.

    Mono is the mean over channels. The blocks joined equal soxr.resample(quality="HQ") of the whole
    file, whatever their size; at the file's own rate the samples pass unchanged.
    Raises AudioFault for a file that cannot be decoded (or no longer).
    """
    with _opened(path) as sound:
        block_frames = max(1, round(block_seconds * sound.samplerate))
        blocks = (_mono(block) for block in _blocks(sound, block_frames))
        if sound.samplerate == sample_rate_hz:
            for block in blocks:
                yield block.copy()  # the buffer below it is used again
            return
        resampler = soxr.ResampleStream(sound.samplerate, sample_rate_hz, 1, dtype="float32", quality="HQ")
        for block in blocks:
            resampled = resampler.resample_chunk(block)
            if len(resampled):
                yield resampled
        rest = resampler.resample_chunk(np.zeros(0, np.float32), last=True)
        if len(rest):
            yield rest


@contextmanager
def _opened(path: Path) -> Iterator[soundfile.SoundFile]:
    """The decoder of a regular file. By descriptor, since libsndfile cannot be given a non-UTF-8 name."""
    with ExitStack() as stack:
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):  # before open(), which blocks on a FIFO
                raise AudioFault("not a file", "a folder, pipe or device: put a sound file in its place")
            raw = stack.enter_context(open(path, "rb", buffering=0))
            size = os.fstat(raw.fileno()).st_size
            if size == 0:
                raise AudioFault("unreadable", "zero bytes: copy or export it again")
            wav = wav_layout(raw.fileno(), size)
            if wav and not wav.streamed and wav.data_bytes > wav.held_bytes:
                held = f"{wav.held_bytes:,} of {wav.data_bytes:,} bytes"
                raise AudioFault("truncated", f"holds {held} of audio: copy or export it again")
            source: int | io.FileIO = raw.fileno()
            if wav and wav.unclosed:
                source = stack.enter_context(UnclosedWav(path, wav.size_at))
            sound = stack.enter_context(_Sequential(source, closefd=False))
        except soundfile.LibsndfileError as error:
            detail = f"not a sound file that libsndfile reads ({_reason(error)}): export it again as .wav"
            raise AudioFault("unreadable", detail) from error
        except OSError as error:
            raise unreadable(error) from error
        if not SAMPLE_RATES_HZ[0] <= sound.samplerate <= SAMPLE_RATES_HZ[1]:
            detail = f"its header gives a sample rate of {sound.samplerate:,} Hz: export it again"
            raise AudioFault("unreadable", detail)
        yield sound


def unreadable(error: OSError) -> AudioFault:
    reason = error.strerror or str(error)
    return AudioFault("unreadable", f"cannot be opened or read ({reason}): check the link, rights and disk")


def _reason(error: soundfile.LibsndfileError) -> str:
    return str(error.error_string).strip().rstrip(".")


def _blocks(sound: soundfile.SoundFile, block_frames: int) -> Iterator[np.ndarray]:
    """Decoded blocks (n, channels) float32, all in one buffer that the next block overwrites."""
    # Reading into a buffer stops at the end of the samples, not at the frame count of the header.
    buffer = np.empty((block_frames, sound.channels), np.float32)
    done = 0
    while True:
        try:
            block = sound.read(out=buffer)
        except soundfile.LibsndfileError as error:
            where = f"decoding stops at {done / sound.samplerate:.1f} s ({_reason(error)})"
            raise AudioFault("truncated", f"damaged or cut off, {where}: copy or export it again") from error
        if len(block) == 0:
            return
        done += len(block)
        yield block


def _mono(block: np.ndarray) -> np.ndarray:
    """(n, channels) float32 -> (n,) float32, the mean over channels; one channel passes bit for bit."""
    return block[:, 0] if block.shape[1] == 1 else block.mean(axis=1, dtype=np.float32)


def _check_samples(sound: soundfile.SoundFile) -> int:
    """How many frames the file really holds; raises AudioFault unless they are whole, finite and audible."""
    frames, peak, mono_peak = 0, 0.0, 0.0
    for block in _blocks(sound, max(1, BLOCK_VALUES // sound.channels)):
        block_peak = _max_abs(block)
        if not block_peak < LOUDEST:  # NaN included: a maximum carries it along
            where = f"near {frames / sound.samplerate:.1f} s"
            raise AudioFault("not finite", f"NaN or infinite samples {where}: repair or export it again")
        frames += len(block)
        peak, mono_peak = max(peak, block_peak), max(mono_peak, _max_abs(_mono(block)))
    if frames == 0:
        raise AudioFault("empty", "holds no samples: export it again")
    # An mp3 header may only estimate its length, so a cut mp3 is simply a shorter one.
    if frames < sound.frames and not sound.subtype.startswith("MPEG"):
        held = f"{frames:,} of {sound.frames:,} samples"
        raise AudioFault("truncated", f"holds {held}: copy or export it again")
    if peak < SILENCE_PEAK:
        raise AudioFault("silent", "never louder than -80 dBFS: replace it or take it out")
    if mono_peak < SILENCE_PEAK:
        raise AudioFault("silent", "its channels cancel each other in mono: invert one of them")
    return frames


def _max_abs(samples: np.ndarray) -> float:
    """The largest magnitude in a non-empty array; NaN or infinite if any sample is."""
    return float(np.maximum(samples.max(), -samples.min()))


class _Sequential(soundfile.SoundFile):
    """A sound only read onwards: soundfile would seek after every block, and so restart an mp3's decoder."""

    def seekable(self) -> bool:
        return False
