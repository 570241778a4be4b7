"""Sound files in the formats of --format, complete or not at all."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import soundfile

from trainer.atomic import write_whole
from trainer.errors import StorageError
from trainer.evaluation import samples
from trainer.evaluation.generation import write_wav
from trainer.run.signals import held_back

MP3_BITS_PER_SECOND = 192_000
# libsndfile goes by a level from 0 (most bits per second) to 1 (fewest), of MPEG-1's 320 to 32 kbit/s (libsndfile 1.2,
# mpeg_l3_encode.c).
MPEG1 = 320_000, 32_000


def write_sound(path: Path, audio: np.ndarray, sample_rate_hz: int) -> None:
    """Write mono or stereo sound in the format that the file's name ends in: wav, flac or mp3.

    audio  (samples,) or (samples, 2) float32; where a sample exceeds 1, all of it is turned down until none does. FLAC
           and WAV have the same 16-bit values

    Ctrl-C acts once the file is whole. Raises StorageError.
    """
    try:
        with held_back():
            match path.suffix:
                case ".wav":
                    write_wav(path, audio, sample_rate_hz)
                case ".flac":
                    samples.write_sound(path, audio, sample_rate_hz)
                case ".mp3":
                    write_whole(path, _mp3(audio / max(float(abs(audio).max(initial=0.0)), 1.0), sample_rate_hz))
                case other:
                    raise ValueError(f"no sound is written as {other}")
    except (OSError, soundfile.LibsndfileError) as error:
        raise StorageError(f"{path} cannot be written ({error}): choose another --output") from error


def _mp3(audio: np.ndarray, sample_rate_hz: int) -> bytes:
    # In memory, because from inside libsndfile an error of the disk reaches nobody.
    made = io.BytesIO()
    most, fewest = MPEG1
    level = (most - MP3_BITS_PER_SECOND) / (most - fewest)
    soundfile.write(made, audio, sample_rate_hz, format="MP3", bitrate_mode="CONSTANT", compression_level=level)
    return made.getvalue()
