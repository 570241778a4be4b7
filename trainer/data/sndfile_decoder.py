"""Decodes through libsndfile: wav, flac, ogg, mp3, aiff, caf, au, w64 and others, told by their content.

libsndfile also accepts files that are cut off and reports nothing (measured with soundfile 0.14, libsndfile 1.2.2):
trainer/data/sound_file.py finds them before, and `inspect` counts what was read.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence

import numpy as np
import soundfile

from trainer.data.audio_fault import changes, damaged

UNKNOWN_FRAMES = 1 << 62  # libsndfile says 2^63 - 1 of a FLAC file that was written into a pipe


class SndfileDecoder:
    """One sound, in one file or in several that follow each other; see Decoder for its attributes."""

    def __init__(self, parts: Sequence[int | io.RawIOBase], remark: str, *, is_counted: bool = True):
        """parts       descriptors or files, which stay open
        is_counted  whether an MPEG file says how many frames it has; else libsndfile only estimates their number

        Raises soundfile.LibsndfileError where the first part is no file that libsndfile reads.
        """
        self._parts = parts
        self._first = _Sequential(parts[0], closefd=False)
        container, coding = self._first.format, self._first.subtype
        is_mpeg = coding.startswith("MPEG")
        known = len(parts) == 1 and self._first.frames < UNKNOWN_FRAMES and (is_counted or not is_mpeg)
        self.format = "MP3" if coding == "MPEG_LAYER_III" else f"{container} {coding}"
        self.rate_hz: int = self._first.samplerate
        self.channels: int = self._first.channels
        self.declared_frames: int | None = self._first.frames if known else None
        self.is_exact = not is_mpeg
        self.remark = remark

    def blocks(self, block_frames: int) -> Iterator[np.ndarray]:
        """See Decoder."""
        buffer, done = np.empty((block_frames, self.channels), np.float32), 0
        for number, part in enumerate(self._parts):
            seconds = done / self.rate_hz
            try:
                sound = _Sequential(part, closefd=False) if number else self._first
            except soundfile.LibsndfileError as error:
                raise damaged(seconds, reason(error)) from error
            with sound:
                then, now = (self.rate_hz, self.channels), (sound.samplerate, sound.channels)
                if then != now:
                    raise changes(seconds, then, now)
                while True:
                    try:
                        # Reading into a buffer stops at the end of the samples, not at the frame count of the header.
                        block = sound.read(out=buffer)
                    except soundfile.LibsndfileError as error:
                        raise damaged(done / self.rate_hz, reason(error)) from error
                    if len(block) == 0:
                        break
                    done += len(block)
                    yield block

    def close(self) -> None:
        """Free what libsndfile holds."""
        self._first.close()


def reason(error: soundfile.LibsndfileError) -> str:
    """What libsndfile says, without a full stop."""
    return str(error.error_string).strip().rstrip(".")


class _Sequential(soundfile.SoundFile):
    """A sound that is only read onwards.

    Where it can, soundfile seeks after every block to where it is already, which makes libsndfile begin an mp3 anew.
    """

    def seekable(self) -> bool:
        return False
