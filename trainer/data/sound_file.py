"""Opens a sound of any format: finds by its content who decodes it, and what about its container is wrong."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import soundfile

from trainer.data.audio_fault import AudioFault, unreadable
from trainer.data.decoder import Decoder
from trainer.data.raw_file import raw_file
from trainer.data.sndfile_decoder import SndfileDecoder, reason
from trainer.data.text_content import why_no_sound
from trainer.data.wav_header import CutOff, MendedWav, sound_of, wav_layout

SAMPLE_RATES_HZ = (1_000, 1_000_000)  # a header with another rate is damaged; by it, seconds could last for days


@contextmanager
def opened(sound: Path | bytes) -> Iterator[Decoder]:
    """The decoder of a sound file, or of the bytes of one; raises AudioFault for what is none.

    It is opened by descriptor, because libsndfile can be given no name that is not UTF-8.
    """
    with ExitStack() as stack:
        raw = stack.enter_context(raw_file(sound))
        try:
            decoder = _decoder(raw.fileno(), stack)
        except CutOff as cut:
            raise truncated(cut) from cut
        except OSError as error:
            raise unreadable(error) from error
        if not SAMPLE_RATES_HZ[0] <= decoder.rate_hz <= SAMPLE_RATES_HZ[1]:
            detail = f"its header gives a sample rate of {decoder.rate_hz:,} Hz: export it again"
            raise AudioFault("unreadable", detail)
        yield decoder


def truncated(cut: CutOff) -> AudioFault:
    """The fault of a file that ends before its header says."""
    return AudioFault("truncated", f"{cut} of audio: copy or export it again")


def _decoder(descriptor: int, stack: ExitStack) -> Decoder:
    size = os.fstat(descriptor).st_size
    wav, remark = wav_layout(descriptor, size), ""
    readable: int | io.RawIOBase = descriptor
    if wav:
        sound_bytes = sound_of(descriptor, size, wav)
        remark = sound_bytes.remark
        if sound_bytes.mended:
            readable = stack.enter_context(MendedWav(descriptor, wav, sound_bytes))
    try:
        decoder = SndfileDecoder([readable], remark)
    except soundfile.LibsndfileError as error:
        text = why_no_sound(os.pread(descriptor, 4096, 0))
        detail = f"not a sound file that libsndfile reads ({reason(error)}): export it again as .wav"
        raise AudioFault("unreadable", text or detail) from error
    stack.callback(decoder.close)
    return decoder
