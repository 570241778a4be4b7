"""Reads sound files of any length in constant memory, and says what is wrong with them.

Files are decoded by content, so that an mp3 or flac file named .wav works. What no decoder reports (NaN samples,
silence, a length that is not that of the header) is found here.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import soxr

from trainer.data.audio_fault import COPY_AGAIN, AudioFault, unreadable
from trainer.data.decoder import Decoder, mono, stereo
from trainer.data.excerpt import Excerpt
from trainer.data.fingerprint import Fingerprint
from trainer.data.levels import LevelMeter, Levels
from trainer.data.raw_file import raw_file
from trainer.data.sound_file import opened, truncated
from trainer.data.wav_header import CutOff, sound_of, wav_layout

SILENCE_PEAK = 1e-4  # of full scale, -80 dBFS; the last bit of 16-bit audio lies at -90 dBFS
# Of full scale, 18 dB. Music is mastered to 1, and what decoders and mixes add stays far below this. Numbers of 16 bits
# that were saved as floats lie far above it, and EnCodec's codes of them have nothing to do with the sound.
LARGEST_PEAK = 8.0
INTEGER_SCALES = {16: 2.0**15, 24: 2.0**23, 32: 2.0**31}  # full scale of numbers of so many bits
LOUDEST = 1e30  # full scale is 1; sums of samples beyond this overflow float32, and no sound has them
# What is wrong with a sound for a mono model alone. Versions before stereo models kept it as what is wrong with a file.
CANCELS = "its channels cancel each other in mono: invert one of them"
DOUBLED = "mono: both channels of a stereo model get the same sound"
BLOCK_VALUES = 1 << 18  # samples x channels that `inspect` decodes at once: 1 MiB of float32


@dataclass(frozen=True, kw_only=True)
class AudioFacts:
    """What is known of a sound file that can be trained on.

    seconds         of the samples that were read
    sample_rate_hz  of the file
    channels        of the file
    content         as `content_of` gives it
    format          as the decoder names it: "WAV PCM_16", "MP3", "AAC"
    sound           hex blake2b-128 of rate, channels and decoded samples: equal for song.wav and its song.flac
    levels          how loud it is, and where it is silent
    fingerprint     as trainer/data/fingerprint.py gives it; "" for a sound of less than a quarter of a second
    remark          what is unusual about it and was done, for the report; "" for nothing
    cancels         whether its channels cancel each other in mono: there it is silent
    silent_front    whether its first two channels are silent, and others are not: so it is in stereo. None where a
                    version before stereo models looked at a sound of more than two channels: it did not say
    """

    seconds: float
    sample_rate_hz: int
    channels: int
    content: str
    format: str
    sound: str
    levels: Levels
    fingerprint: str
    remark: str = ""
    cancels: bool = False
    silent_front: bool | None = False

    def heard(self, channels: int) -> AudioFacts | AudioFault:
        """The facts for a model of so many channels, 1 or 2; or what is wrong with the sound for it."""
        if channels == 1 and self.cancels:
            return AudioFault("silent", CANCELS)
        if channels == 2 and self.silent_front:
            return AudioFault("silent", "its first two channels are silent, which a stereo model has: mix it to stereo")
        if channels == 2 and self.channels == 1:
            return replace(self, remark="; ".join(filter(None, (self.remark, DOUBLED))))
        return self


def inspect(sound: Path | bytes) -> AudioFacts:
    """The facts of a sound file that is whole and audible, from one pass over its samples and one over its bytes.

    Whether it is audible to a mono or a stereo model, `AudioFacts.heard` says.

    Its seconds are counted from the samples, because the length in the header of an mp3 file is only an estimate.
    Samples somewhat beyond [-1, 1] are accepted. Raises AudioFault for every file that is not whole and audible.
    """
    with opened(sound) as decoder:
        peaks, samples = _Peaks(), _SampleHash(decoder.rate_hz, decoder.channels)
        levels, fingerprint = LevelMeter(decoder.rate_hz, decoder.channels), Fingerprint(decoder.rate_hz)
        frames = 0
        for block in decoder.blocks(max(1, BLOCK_VALUES // decoder.channels)):
            _check_finite(block, frames / decoder.rate_hz)
            for meter in (peaks, samples, levels, fingerprint):
                meter.add(block)
            frames += len(block)
        length_remark = _check_length(decoder, frames)
        peak_remark = peaks.result()
    return AudioFacts(
        seconds=frames / decoder.rate_hz, sample_rate_hz=decoder.rate_hz, channels=decoder.channels,
        content=content_of(sound), format=decoder.format, sound=samples.result(),
        levels=levels.result(), fingerprint=fingerprint.result(),
        remark="; ".join(filter(None, (decoder.remark, length_remark, peak_remark))),
        cancels=peaks.cancel, silent_front=peaks.silent_front,
    )


def content_of(sound: Path | bytes) -> str:
    """Hex blake2b-128 of the file's bytes, by which its codes are found. Raises AudioFault where it cannot be read.

    Where versions before 2026-11-27 read other samples of these bytes, the place where the sound ends is hashed too,
    so that the codes which they cached are not taken for those of the whole sound.
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        with raw_file(sound) as raw:
            while piece := raw.read(1 << 20):
                digest.update(piece)
            size = os.fstat(raw.fileno()).st_size
            wav = wav_layout(raw.fileno(), size)
            wav_sound = sound_of(raw.fileno(), size, wav) if wav else None
    except OSError as error:
        raise unreadable(error) from error
    except CutOff as cut:
        raise truncated(cut) from cut
    if wav_sound and wav_sound.reread:
        digest.update(f"sound to byte {wav_sound.end}".encode())
    return digest.hexdigest()


def stream(
    sound: Path | bytes, sample_rate_hz: int, block_seconds: float = 10.0, excerpt: Excerpt | None = None,
    channels: int = 1,
) -> Iterator[np.ndarray]:
    """The file as float32 blocks at `sample_rate_hz`, about `block_seconds` each, never empty: (n,) in mono, (n, 2) in
    stereo.

    excerpt   the part that is wanted and its gain, which are those of the decoded samples; None: all, as it is
    channels  1: the mean over all channels; 2: the first two, where a mono file's one is both

    Joined, the blocks equal soxr.resample(quality="HQ") of the whole, whatever their size; at the file's own rate the
    samples pass unchanged. Raises AudioFault for a file that cannot be decoded, also in the middle of it.
    """
    with opened(sound) as decoder:
        block_frames = max(1, round(block_seconds * decoder.rate_hz))
        decoded = decoder.blocks(block_frames)
        wanted = mono if channels == 1 else stereo
        blocks = (wanted(block) for block in (decoded if excerpt is None else excerpt.of(decoded)))
        if decoder.rate_hz == sample_rate_hz:
            for block in blocks:
                yield block.copy()  # the next block may be decoded into the same buffer
            return
        resampler = soxr.ResampleStream(decoder.rate_hz, sample_rate_hz, channels, dtype="float32", quality="HQ")
        for block in blocks:
            resampled = resampler.resample_chunk(block)
            if len(resampled):
                yield resampled
        nothing = np.zeros(0 if channels == 1 else (0, channels), np.float32)
        rest = resampler.resample_chunk(nothing, last=True)
        if len(rest):
            yield rest


def _check_finite(block: np.ndarray, seconds: float) -> None:
    """Raise AudioFault unless all samples (n, channels) of a block are numbers; it begins after so many seconds."""
    # Not `>= LOUDEST`, which is false for NaN: a block's maximum is NaN if one of its samples is.
    if not _max_abs(block) < LOUDEST:
        raise AudioFault("not finite", f"NaN or infinite samples near {seconds:.1f} s: repair or export it again")


def _check_length(decoder: Decoder, frames: int) -> str:
    """A remark on the number of samples per channel that were read, or ""; raises AudioFault where some are missing."""
    if frames == 0:
        raise AudioFault("empty", "holds no samples: export it again")
    declared = decoder.declared_frames
    if declared is None or frames >= declared - decoder.spare_frames:
        return ""
    if decoder.is_exact:
        raise AudioFault("truncated", f"holds {frames:,} of {declared:,} samples: {COPY_AGAIN}")
    given, found = declared / decoder.rate_hz, frames / decoder.rate_hz
    return f"its header gives {given:,.2f} s and {found:,.2f} s are there, as of a file that was cut: used as it is"


class _Peaks:
    """How loud a sound is at most, by its blocks (n, channels) float32."""

    def __init__(self) -> None:
        self._peak = self._mono_peak = self._front_peak = 0.0

    def add(self, block: np.ndarray) -> None:
        self._peak = max(self._peak, _max_abs(block))
        self._mono_peak = max(self._mono_peak, _max_abs(mono(block)))
        self._front_peak = self._peak if block.shape[1] <= 2 else max(self._front_peak, _max_abs(block[:, :2]))

    @property
    def cancel(self) -> bool:
        """Whether the mean of the channels is silent."""
        return self._mono_peak < SILENCE_PEAK

    @property
    def silent_front(self) -> bool:
        """Whether the first two channels are."""
        return self._front_peak < SILENCE_PEAK

    def result(self) -> str:
        """A remark or ""; raises AudioFault for a sound that is not audible, or far beyond full scale."""
        if self._peak > LARGEST_PEAK:
            raise AudioFault("out of range", _how_to_scale(self._peak))
        if self._peak < SILENCE_PEAK:
            raise AudioFault("silent", "never louder than -80 dBFS: replace it or take it out")
        return f"its peak is {self._peak:.3g} of full scale: used as it is" if self._peak > 1 else ""


class _SampleHash:
    """What a sound is, whatever format it is kept in, by its blocks (n, channels) float32."""

    def __init__(self, rate_hz: int, channels: int) -> None:
        self._digest = hashlib.blake2b(f"{rate_hz} {channels} ".encode(), digest_size=16)

    def add(self, block: np.ndarray) -> None:
        self._digest.update(np.ascontiguousarray(block, "<f4").data)

    def result(self) -> str:
        """Hex, 32 digits."""
        return self._digest.hexdigest()


def _how_to_scale(peak: float) -> str:
    """What to do with samples whose peak is this many times full scale."""
    of_bits = [(bits, scale) for bits, scale in INTEGER_SCALES.items() if 256 < peak <= scale]
    if of_bits:
        bits, scale = of_bits[0]
        return f"its peak is {peak:,.0f} of 1, as of {bits}-bit numbers saved as floats: divide them by {scale:.0f}"
    return f"its peak is {peak:,.4g}, and full scale is 1: divide its samples by {peak:.4g} or more"


def _max_abs(samples: np.ndarray) -> float:
    """The largest magnitude in a non-empty array; NaN or infinite if any sample is."""
    return float(np.maximum(samples.max(), -samples.min()))
