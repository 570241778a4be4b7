"""Opens a sound of any format: finds by its content who decodes it, and what about its container is wrong."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import soundfile

from trainer.data.audio_fault import AudioFault, unreadable
from trainer.data.container_length import check_whole, counts_frames
from trainer.data.decoder import Decoder
from trainer.data.ffmpeg_decoder import FfmpegDecoder
from trainer.data.ogg_pages import sounds_in
from trainer.data.raw_file import FileView, raw_file
from trainer.data.sndfile_decoder import SndfileDecoder, reason
from trainer.data.sound_kind import SoundKind, kind_at
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
            decoder = _decoder(raw, stack)
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


def _decoder(raw: io.FileIO, stack: ExitStack) -> Decoder:
    """Who decodes an open file, freed with `stack`; raises AudioFault, CutOff or OSError where nobody can."""
    descriptor = raw.fileno()
    size = os.fstat(descriptor).st_size
    kind = kind_at(descriptor)
    check_whole(descriptor, size)
    parts, remark = _parts(descriptor, size, kind, stack)
    try:
        decoder = SndfileDecoder(parts, remark, is_counted=counts_frames(descriptor))
    except soundfile.LibsndfileError as error:
        if kind is None:
            text = why_no_sound(os.pread(descriptor, 4096, 0))
            detail = f"not a sound file that libsndfile reads ({reason(error)}): export it again as .wav"
            raise AudioFault("unreadable", text or detail) from error
        raw.seek(0)
        return FfmpegDecoder(raw, kind, stack)
    stack.callback(decoder.close)
    return decoder


def _parts(
    descriptor: int, size: int, kind: SoundKind | None, stack: ExitStack
) -> tuple[list[int | io.RawIOBase], str]:
    """What libsndfile is given of an open file: itself, or views of it, one after the other; and a remark or ""."""
    wav = wav_layout(descriptor, size)
    if wav:
        wav_sound = sound_of(descriptor, size, wav)
        if wav_sound.mended:
            return [stack.enter_context(MendedWav(descriptor, wav, wav_sound))], wav_sound.remark
        return [descriptor], wav_sound.remark
    if kind and kind.demuxer == "ogg":
        places = sounds_in(descriptor, size)
        if len(places) > 1:  # of which libsndfile reads the first alone
            views = [stack.enter_context(FileView(descriptor, start, end)) for start, end in places]
            return list(views), f"{len(places)} sounds in one Ogg file: all are used, one behind the other"
    return [descriptor], ""
