"""Reads sound files of any length in constant memory, and says what is wrong with them.

libsndfile decodes by content, so that an mp3 or flac file named .wav works. It also accepts files that are cut off,
NaN samples and silence, and reports none of them (measured with soundfile 0.14, libsndfile 1.2.2): they are found here.
"""

from __future__ import annotations

import errno
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

from trainer.data.fingerprint import Fingerprint
from trainer.data.text_content import why_no_sound
from trainer.data.wav_header import CutOff, MendedWav, sound_of, wav_layout

# What can be wrong with a sound file. Each is also a kind of fate, which the file then has (trainer/data/fates.py).
FaultKind = Literal["not a file", "unreadable", "truncated", "empty", "not finite", "out of range", "silent"]
FAULT_KINDS: tuple[FaultKind, ...] = get_args(FaultKind)

SILENCE_PEAK = 1e-4  # of full scale, -80 dBFS; the last bit of 16-bit audio lies at -90 dBFS
# Of full scale, 18 dB. Music is mastered to 1, and what decoders and mixes add stays far below this. Numbers of 16 bits
# that were saved as floats lie far above it, and EnCodec's codes of them have nothing to do with the sound.
LARGEST_PEAK = 8.0
INTEGER_SCALES = {16: 2.0**15, 24: 2.0**23, 32: 2.0**31}  # full scale of numbers of so many bits
LOUDEST = 1e30  # full scale is 1; sums of samples beyond this overflow float32, and no sound has them
SAMPLE_RATES_HZ = (1_000, 1_000_000)  # a header with another rate is damaged; by it, seconds could last for days
FAILED_READS = (errno.EIO, errno.EINVAL, errno.ETIMEDOUT, errno.ENODATA, errno.EOPNOTSUPP)  # what such files give
ONLINE_ONLY = "If OneDrive, Dropbox, Google Drive or iCloud keeps it online only, have it kept on this machine"
BLOCK_VALUES = 1 << 18  # samples x channels that `inspect` decodes at once: 1 MiB of float32


@dataclass(frozen=True, kw_only=True)
class AudioFacts:
    """What is known of a sound file that can be trained on.

    seconds         of the samples that were read
    sample_rate_hz  of the file
    channels        of the file
    content         as `content_of` gives it
    fingerprint     as trainer/data/fingerprint.py gives it; "" for a sound of less than a quarter of a second
    remark          what is unusual about it and was done, for the report; "" for nothing
    """

    seconds: float
    sample_rate_hz: int
    channels: int
    content: str
    fingerprint: str = ""
    remark: str = ""


class AudioFault(Exception):
    """A sound file that cannot be trained on; `detail` says what was found and what the user can do about it."""

    def __init__(self, fate: FaultKind, detail: str):
        super().__init__(f"{fate}: {detail}")
        self.fate: FaultKind = fate
        self.detail = detail


def inspect(path: Path) -> AudioFacts:
    """The facts of a sound file that is whole and audible, from one pass over its samples and one over its bytes.

    Its seconds are counted from the samples, because the length in the header of an mp3 file is only an estimate.
    Samples somewhat beyond [-1, 1] are accepted. Raises AudioFault for every file that is not whole and audible.
    """
    with _opened(path) as (sound, header_remark):
        meter = Fingerprint(sound.samplerate)
        frames, peak_remark = _check_samples(sound, meter)
        rate, channels = sound.samplerate, sound.channels
    remark = "; ".join(filter(None, (header_remark, peak_remark)))
    return AudioFacts(
        seconds=frames / rate, sample_rate_hz=rate, channels=channels, content=content_of(path),
        fingerprint=meter.result(), remark=remark,
    )


def content_of(path: Path) -> str:
    """Hex blake2b-128 of the file's bytes, by which its codes are found. Raises AudioFault where it cannot be read.

    Where versions before 2026-11-27 read other samples of these bytes, the place where the sound ends is hashed too,
    so that the codes which they cached are not taken for those of the whole sound.
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        with open(path, "rb", buffering=0) as raw:
            while piece := raw.read(1 << 20):
                digest.update(piece)
            size = os.fstat(raw.fileno()).st_size
            wav = wav_layout(raw.fileno(), size)
            sound = sound_of(raw.fileno(), size, wav) if wav else None
    except OSError as error:
        raise unreadable(error) from error
    except CutOff as cut:
        raise _truncated(cut) from cut
    if sound and sound.reread:
        digest.update(f"sound to byte {sound.end}".encode())
    return digest.hexdigest()


def stream(path: Path, sample_rate_hz: int, block_seconds: float = 10.0) -> Iterator[np.ndarray]:
    """The file as mono float32 blocks (n,) at `sample_rate_hz`, about `block_seconds` each, never empty.

    Mono is the mean over channels. Joined, the blocks equal soxr.resample(quality="HQ") of the whole file, whatever
    their size; at the file's own rate the samples pass unchanged. Raises AudioFault for a file that cannot be decoded,
    also in the middle of it.
    """
    with _opened(path) as (sound, _):
        block_frames = max(1, round(block_seconds * sound.samplerate))
        blocks = (_mono(block) for block in _blocks(sound, block_frames))
        if sound.samplerate == sample_rate_hz:
            for block in blocks:
                yield block.copy()  # the next block is decoded into the same buffer
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
def _opened(path: Path) -> Iterator[tuple[soundfile.SoundFile, str]]:
    """The decoder of a regular file, and a remark on its header or ""; raises AudioFault for what is none.

    It is opened by descriptor, because libsndfile can be given no name that is not UTF-8.
    """
    with ExitStack() as stack:
        try:
            # Before open(), which waits for ever on a pipe into which nobody writes.
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise AudioFault("not a file", "a folder, pipe or device: put a sound file in its place")
            raw = stack.enter_context(open(path, "rb", buffering=0))
            size = os.fstat(raw.fileno()).st_size
            if size == 0:
                raise AudioFault("unreadable", f"zero bytes: copy or export it again. {ONLINE_ONLY}")
            wav, remark = wav_layout(raw.fileno(), size), ""
            readable: int | io.RawIOBase = raw.fileno()
            if wav:
                sound_bytes = sound_of(raw.fileno(), size, wav)
                remark = sound_bytes.remark
                if sound_bytes.mended:
                    readable = stack.enter_context(MendedWav(path, wav, sound_bytes))
            sound = stack.enter_context(_Sequential(readable, closefd=False))
        except soundfile.LibsndfileError as error:
            text = why_no_sound(os.pread(raw.fileno(), 4096, 0))
            detail = f"not a sound file that libsndfile reads ({_reason(error)}): export it again as .wav"
            raise AudioFault("unreadable", text or detail) from error
        except CutOff as cut:
            raise _truncated(cut) from cut
        except OSError as error:
            raise unreadable(error) from error
        if not SAMPLE_RATES_HZ[0] <= sound.samplerate <= SAMPLE_RATES_HZ[1]:
            detail = f"its header gives a sample rate of {sound.samplerate:,} Hz: export it again"
            raise AudioFault("unreadable", detail)
        yield sound, remark


def unreadable(error: OSError) -> AudioFault:
    """The fault of a file at which the operating system failed."""
    reason = error.strerror or str(error)
    detail = f"cannot be opened or read ({reason}): check the link, rights and disk. {ONLINE_ONLY}"
    return AudioFault("unreadable", detail if error.errno in FAILED_READS else detail.removesuffix(f". {ONLINE_ONLY}"))


def _truncated(cut: CutOff) -> AudioFault:
    return AudioFault("truncated", f"{cut} of audio: copy or export it again")


def _reason(error: soundfile.LibsndfileError) -> str:
    return str(error.error_string).strip().rstrip(".")


def _blocks(sound: soundfile.SoundFile, block_frames: int) -> Iterator[np.ndarray]:
    """Decoded blocks (n, channels) float32. They share one buffer: each overwrites the one before."""
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
    """(n, channels) float32 to (n,) float32, the mean over channels; a single channel passes bit for bit."""
    return block[:, 0] if block.shape[1] == 1 else block.mean(axis=1, dtype=np.float32)


def _check_samples(sound: soundfile.SoundFile, meter: Fingerprint) -> tuple[int, str]:
    """How many frames the file really holds, and a remark on how loud they are or "".

    Raises AudioFault unless they are whole, finite, audible and not far beyond full scale.
    """
    frames, peak, mono_peak = 0, 0.0, 0.0
    for block in _blocks(sound, max(1, BLOCK_VALUES // sound.channels)):
        block_peak = _max_abs(block)
        # Not `peak >= LOUDEST`, which is false for NaN: a block's maximum is NaN if one of its samples is.
        if not block_peak < LOUDEST:
            where = f"near {frames / sound.samplerate:.1f} s"
            raise AudioFault("not finite", f"NaN or infinite samples {where}: repair or export it again")
        frames += len(block)
        meter.add(block)
        peak, mono_peak = max(peak, block_peak), max(mono_peak, _max_abs(_mono(block)))
    if frames == 0:
        raise AudioFault("empty", "holds no samples: export it again")
    # The header of an mp3 file only estimates its length. One that is cut off cannot be told from a shorter one.
    if frames < sound.frames and not sound.subtype.startswith("MPEG"):
        held = f"{frames:,} of {sound.frames:,} samples"
        raise AudioFault("truncated", f"holds {held}: copy or export it again")
    if peak > LARGEST_PEAK:
        raise AudioFault("out of range", _how_to_scale(peak))
    if peak < SILENCE_PEAK:
        raise AudioFault("silent", "never louder than -80 dBFS: replace it or take it out")
    if mono_peak < SILENCE_PEAK:
        raise AudioFault("silent", "its channels cancel each other in mono: invert one of them")
    return frames, f"its peak is {peak:.3g} of full scale: used as it is" if peak > 1 else ""


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


class _Sequential(soundfile.SoundFile):
    """A sound that is only read onwards.

    Where it can, soundfile seeks after every block to where it is already, which makes libsndfile begin an mp3 anew.
    """

    def seekable(self) -> bool:
        return False
