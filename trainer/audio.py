"""Reads sound files of any length in constant memory, and says, and remembers, what is wrong with them.

libsndfile decodes by content, so an mp3 or flac named .wav works. It also accepts cut-off files,
NaN and silence without a word (measured with soundfile 0.14, libsndfile 1.2.2): those are found here.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import soundfile
import soxr
from tqdm import tqdm

from trainer.errors import StorageError

Fault = Literal["not a file", "unreadable", "truncated", "empty", "not finite", "silent"]
FAULTS: tuple[Fault, ...] = get_args(Fault)

SILENCE_PEAK = 1e-4  # -80 dBFS; the last bit of 16-bit audio lies at -90 dBFS
LOUDEST = 1e30  # full scale is 1; beyond this float32 sums overflow, and the file is no sound
SAMPLE_RATES_HZ = (1_000, 1_000_000)  # a header outside is damaged: obeying it would make days out of seconds
BLOCK_VALUES = 1 << 18  # samples x channels decoded at once by inspect: 1 MiB of float32
MAX_CHUNKS = 4096  # a real file has a few; a sparse file of zeros would offer one every 8 bytes

MEMORY_NAME = "audio_facts.json"
MEMORY_VERSION = 1  # to be raised when inspect judges a file differently: all is then read again
SAVE_SECONDS = 5.0  # what a kill can lose
THREADS = 4
BAR_AFTER_SECONDS = 2.0


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
        raise _unreadable(error) from error
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


def inspect_all(
    paths: Sequence[str], memory: Path, *, rehash: bool = False, show_progress: bool = True
) -> dict[str, AudioFacts | AudioFault]:
    """What `inspect` returns or raises for each absolute path, in a few threads.

    Results are kept in a file in the folder `memory` under path, size and modification time: an unchanged
    file is not read again unless `rehash`. Raises StorageError if `memory` cannot be written.
    """
    known = _recall(memory)
    results: dict[str, AudioFacts | AudioFault] = {}
    stamps: dict[str, tuple[int, int]] = {}
    for path in dict.fromkeys(paths):
        try:
            status = os.stat(path)
        except OSError as error:
            results[path] = _unreadable(error)
            continue
        stamp = (status.st_size, status.st_mtime_ns)
        if not rehash and path in known and known[path][0] == stamp:
            results[path] = known[path][1]
        else:
            stamps[path] = stamp
    if stamps:
        _remember(memory, known)  # a folder that cannot be written shows now, not after an hour of reading
        _inspect_new(stamps, known, results, memory, show_progress)
    return results


# What is known of a file: its size and modification time (ns), and what inspect said.
_Known = dict[str, tuple[tuple[int, int], AudioFacts | AudioFault]]


def _inspect_new(
    stamps: dict[str, tuple[int, int]], known: _Known, results: dict[str, AudioFacts | AudioFault],
    memory: Path, show_progress: bool,
) -> None:
    """Inspect the files of `stamps` into `results` and `known`; soundfile and hashing release the GIL."""
    pool = ThreadPoolExecutor(THREADS)
    bar = tqdm(total=len(stamps), desc="Inspecting audio", unit="file", delay=BAR_AFTER_SECONDS,
               disable=not show_progress)
    paths, pending, unsaved, save_at = iter(stamps), dict[Future, str](), False, time.monotonic() + SAVE_SECONDS
    try:
        while True:
            for path in islice(paths, 2 * THREADS - len(pending)):
                pending[pool.submit(_verdict, path)] = path
            if not pending:
                break
            # Not longer than until the next save: one of the files may take minutes.
            done, _ = wait(pending, max(0.1, save_at - time.monotonic()), FIRST_COMPLETED)
            for future in done:
                path = pending.pop(future)
                results[path], lasting = future.result()
                if lasting:
                    known[path] = (stamps[path], results[path])
                    unsaved = True
                bar.update()
            if unsaved and time.monotonic() >= save_at:
                began = time.monotonic()
                _remember(memory, known)
                unsaved, save_at = False, time.monotonic() + max(SAVE_SECONDS, 20 * (time.monotonic() - began))
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()
        _remember(memory, known)


def _verdict(path: str) -> tuple[AudioFacts | AudioFault, bool]:
    """What inspect says, and whether that holds until the file changes: a missing right or a bad disk may not."""
    try:
        return inspect(Path(path)), True
    except AudioFault as fault:
        lasting = fault.fate != "not a file" and not isinstance(fault.__cause__, OSError)
        return AudioFault(fault.fate, fault.detail), lasting  # a new one: the traceback holds decoded blocks


def _recall(memory: Path) -> _Known:
    """What was remembered; nothing if the file is missing, damaged or from another version."""
    try:
        stored = json.loads((memory / MEMORY_NAME).read_bytes())
        if stored["version"] != MEMORY_VERSION:
            return {}
        return {
            path: ((size, mtime_ns), AudioFault(**said) if "fate" in said else AudioFacts(**said))
            for path, (size, mtime_ns, said) in stored["files"].items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _remember(memory: Path, known: _Known) -> None:
    files = {}
    for path, (stamp, said) in known.items():
        values = {"fate": said.fate, "detail": said.detail} if isinstance(said, AudioFault) else asdict(said)
        files[path] = [*stamp, values]
    # ASCII JSON, so that names which are no UTF-8 survive as escaped surrogates.
    content = json.dumps({"version": MEMORY_VERSION, "files": files}).encode("ascii")
    try:
        memory.mkdir(parents=True, exist_ok=True)
        write_whole(memory / MEMORY_NAME, content)
    except OSError as error:
        raise StorageError(
            f"cache folder {os.fspath(memory)!r}: what was learnt of the sound files cannot be kept there "
            f"({error.strerror}). Free some space or permit access, or choose another folder with --cache_dir"
        ) from error


def write_whole(path: Path, content: bytes) -> None:
    """Write beside, flush and rename: `path` holds all of `content`, or on OSError what it held before."""
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(beside, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        with suppress(OSError):  # it is there only if something failed
            beside.unlink(missing_ok=True)


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
            wav = _wav_layout(raw.fileno(), size)
            if wav and not wav.streamed and wav.data_bytes > wav.held_bytes:
                held = f"{wav.held_bytes:,} of {wav.data_bytes:,} bytes"
                raise AudioFault("truncated", f"holds {held} of audio: copy or export it again")
            source: int | io.FileIO = raw.fileno()
            if wav and wav.unclosed:
                source = stack.enter_context(_UnclosedWav(path, wav.size_at))
            sound = stack.enter_context(_Sequential(source, closefd=False))
        except soundfile.LibsndfileError as error:
            detail = f"not a sound file that libsndfile reads ({_reason(error)}): export it again as .wav"
            raise AudioFault("unreadable", detail) from error
        except OSError as error:
            raise _unreadable(error) from error
        if not SAMPLE_RATES_HZ[0] <= sound.samplerate <= SAMPLE_RATES_HZ[1]:
            detail = f"its header gives a sample rate of {sound.samplerate:,} Hz: export it again"
            raise AudioFault("unreadable", detail)
        yield sound


def _unreadable(error: OSError) -> AudioFault:
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


@dataclass(frozen=True, kw_only=True)
class _WavLayout:
    """The data chunk of a RIFF file: what its header claims and what the file holds."""

    size_at: int  # where in the file the chunk's 32-bit size stands
    data_bytes: int
    held_bytes: int
    streamed: bool  # the size is a placeholder: it says nothing about what should be there
    unclosed: bool  # streamed with size 0, of which libsndfile reads no sample by itself


def _wav_layout(descriptor: int, file_bytes: int) -> _WavLayout | None:
    """The data chunk found by walking the chunks; None if there is none or the file is not RIFF.

    Source: Multimedia Programming Interface 1.0 (RIFF, chunks padded to even sizes), EBU Tech 3306 (RF64).
    """
    head = os.pread(descriptor, 12, 0)
    if len(head) < 12 or head[:4] not in (b"RIFF", b"RIFX", b"RF64", b"BW64") or head[8:] != b"WAVE":
        return None
    order: Literal["big", "little"] = "big" if head[:4] == b"RIFX" else "little"
    riff_bytes, at, long_bytes = int.from_bytes(head[4:8], order), 12, None
    for _ in range(MAX_CHUNKS):
        chunk = os.pread(descriptor, 24, at)
        if len(chunk) < 8:
            return None
        size = int.from_bytes(chunk[4:8], order)
        if chunk[:4] == b"ds64" and len(chunk) == 24:
            long_bytes = int.from_bytes(chunk[16:24], order)
        if chunk[:4] == b"data":
            held = file_bytes - at - 8
            if size == 0xFFFFFFFF and long_bytes is not None:
                return _WavLayout(size_at=at + 4, data_bytes=long_bytes, held_bytes=held,
                                  streamed=long_bytes == 0, unclosed=False)
            unclosed = size == 0 and held > 0 and riff_bytes + 8 < file_bytes
            return _WavLayout(size_at=at + 4, data_bytes=size, held_bytes=held,
                              streamed=_is_placeholder(size), unclosed=unclosed)
        at += 8 + size + size % 2
    return None


def _is_placeholder(size: int) -> bool:
    """Whether a pipe left this size, unable to seek back: ffmpeg 2^32-1, sox 0x7FFFF000, arecord 2^31."""
    return size == 0 or size >= 0xFFFF0000 or 0x7FFF0000 <= size <= 0x80000000


class _Sequential(soundfile.SoundFile):
    """A sound only read onwards: soundfile would seek after every block, and so restart an mp3's decoder."""

    def seekable(self) -> bool:
        return False


class _UnclosedWav(io.FileIO):
    """A WAV file whose data size of 0 reads as 2^32-1, which libsndfile takes as 'to the end of the file'."""

    def __init__(self, path: Path, size_at: int):
        super().__init__(path, "rb")
        self._size_at = size_at

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        start = self.tell()
        count = super().readinto(buffer) or 0
        for at in range(max(start, self._size_at), min(start + count, self._size_at + 4)):
            memoryview(buffer).cast("B")[at - start] = 0xFF
        return count
