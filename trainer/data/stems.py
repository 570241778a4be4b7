"""What of a sound its melody is heard in: all of it, or its voice and other instruments without drums and bass.

The latter is what audiocraft does (ChromaStemConditioner, audiocraft 1.3.0): the stems "vocals" and "other" of htdemucs
are added, and mixed to mono. Here that is done in windows, so that no long sound is held whole. Their places are those
at which demucs cuts the whole sound into pieces, and each piece is computed from itself alone, so that the samples are
those of one pass over all of it. audiocraft shifts each sound by chance (shifts=1); here nothing is.
"""

from __future__ import annotations

import hashlib
import pickle
import socket
from collections.abc import Collection, Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import soxr
import torch
from safetensors import SafetensorError, safe_open

from trainer.data import audio, demucs_files
from trainer.data.excerpt import Excerpt
from trainer.data.peers import Alone, Peers
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from demucs.htdemucs import HTDemucs

HEARD = ("vocals", "other")
OVERLAP = 0.25  # of two pieces; demucs' own default
PIECES = 10  # of a window: those of htdemucs begin every 5.85 s, so that a window takes a minute
# What else a file of htdemucs' weights may hold besides tensors and plain values: settings that were numpy's numbers.
# numpy 2 has moved the first of them; files name the older place.
_SCALARS: list[Any] = [
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
    (np.float64(0).__reduce__()[0], "numpy._core.multiarray.scalar"),
    *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8")),
    np.dtype,
]


class Mix:
    """The sound as it is.

    unsaid  what --stems auto came to, for the console, as long as `tell` has not said it; else ""
    """

    key = "mix"

    def __init__(self, unsaid: str = ""):
        self.unsaid = unsaid

    def blocks(
        self, sound: Path | bytes, sample_rate_hz: int, block_seconds: float, excerpt: Excerpt | None
    ) -> Iterator[np.ndarray]:
        """The mean of its channels as float32 blocks (n,), as `audio.stream` has them."""
        return audio.stream(sound, sample_rate_hz, block_seconds, excerpt)


class Demucs:
    """The voice and the other instruments, as htdemucs tells them from drums and bass.

    key     "demucs-" and a digest of its weights, however they are kept
    unsaid  as of Mix
    """

    def __init__(self, model: HTDemucs, device: torch.device, unsaid: str = ""):
        self._model, self._device, self.unsaid = model.eval(), device, unsaid
        self._turn = Lock()  # several threads may ask at once, and two windows would take twice the memory
        self.key = f"demucs-{_digest(model.state_dict())}"

    def blocks(
        self, sound: Path | bytes, sample_rate_hz: int, block_seconds: float, excerpt: Excerpt | None
    ) -> Iterator[np.ndarray]:
        """The sum of both stems, mean of its channels, as float32 blocks (n,) of about `block_seconds`, never empty.

        excerpt  the part that is separated, with its gain; None: all, as it is. Raises AudioFault as `audio.stream`.
        """
        rate = self._model.samplerate
        heard = self._windows(audio.stream(sound, rate, block_seconds, excerpt, channels=2))
        most = max(1, round(block_seconds * sample_rate_hz))
        for block in _at_rate(heard, rate, sample_rate_hz):
            yield from (block[start : start + most] for start in range(0, len(block), most))

    def _windows(self, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Of blocks (n, 2) at the model's rate what is heard, (n,) each."""
        piece = int(self._model.samplerate * self._model.segment)
        stride = int((1 - OVERLAP) * piece)  # both as demucs' apply_model has them
        # A sample is in the piece that began last before it and perhaps in the one before that. So the first stride of
        # a window is left to the window before it, and what follows its last whole piece to the next.
        window = (PIECES - 1) * stride + piece
        waiting, begins = np.zeros((0, 2), np.float32), 0
        for block in blocks:
            waiting = np.concatenate([waiting, block])
            while len(waiting) > window:
                yield self._heard(waiting[:window])[begins : PIECES * stride]
                waiting, begins = waiting[(PIECES - 1) * stride :], stride
        if len(waiting) > begins:
            yield self._heard(waiting)[begins:]

    def _heard(self, samples: np.ndarray) -> np.ndarray:
        """Both stems of (n, 2) samples in mono, (n,)."""
        from demucs.apply import apply_model

        mix = torch.from_numpy(np.ascontiguousarray(samples.T))
        with self._turn, torch.no_grad():
            stems = apply_model(
                self._model, mix[None].to(self._device), shifts=0, split=True, overlap=OVERLAP, device=self._device
            )
            wanted = [self._model.sources.index(name) for name in HEARD]
            return stems[0, wanted].sum(dim=0).mean(dim=0).cpu().numpy()


def stems_of(
    flag: str, device: torch.device, peers: Peers | None = None, made: Collection[str] = ()
) -> Mix | Demucs:
    """What --stems comes to: "mix", "demucs", or "auto" for demucs on a GPU where it can be had, and else mix.

    made  the keys of the melodies that prepared folders of this run hold: auto is what they were heard in

    The first process decides for all; `tell` says what was not asked for. Raises ConfigError where demucs is missing on
    the machine of one of them, or has other weights there.
    """
    peers = peers or Alone()
    of_this = _choice(flag, device, made) if peers.rank == 0 else None
    peers.wait("stems")
    choice, remark = peers.gather(of_this)[0]
    if choice == Mix.key:
        return Mix(remark)
    if missing := demucs_files.what_is_missing():
        raise ConfigError(
            f"--stems {flag}: the first process hears melodies in demucs' stems, and on {socket.gethostname()}"
            f" {missing}; or give --stems mix"
        )
    path = demucs_files.weights_path()
    assert path is not None
    stems = Demucs(_model_in(path), device, remark)
    peers.wait("weights of demucs")
    found = peers.gather((socket.gethostname(), stems.key))
    for host, key in found:
        if key != found[0][1]:
            raise ConfigError(
                f"--stems {flag}: the weights of {demucs_files.MODEL} differ: {found[0][1]} on {found[0][0]}, {key} on"
                f" {host}. Copy one machine's to the other, or give --stems mix"
            )
    return stems


def tell(stems: Mix | Demucs, melody_contents: Iterable[str], peers: Peers) -> None:
    """Have the first process say, once, what --stems auto came to, if any of these clips is heard in it.

    melody_contents  of each clip, as the manifest has it: "" where its own sound is its melody
    """
    if stems.unsaid and not all(melody_contents):
        if peers.rank == 0:
            print(stems.unsaid, flush=True)
        stems.unsaid = ""


def _choice(flag: str, device: torch.device, made: Collection[str]) -> tuple[str, str]:
    """"mix" or "demucs"; and what is to be said of it, "" for nothing."""
    if flag == "demucs":
        demucs_files.refuse_missing()
    if flag != "auto":
        return flag, ""
    missing = demucs_files.what_is_missing()
    if made:
        kind = min(made).partition("-")[0]
        if kind == "demucs" and missing:
            raise ConfigError(
                "--stems auto: the melodies of the prepared folder were heard in demucs' stems, those of the other"
                f" folder have to be, and {missing}; or prepare the first again with --stems mix"
            )
        return kind, f"--stems auto: melodies are heard with --stems {kind}, as those of the prepared folder were"
    if not missing and device.type == "cuda":
        return "demucs", "--stems auto: melodies are heard in the voice and other instruments alone (demucs)"
    slow = "it is here, but this run has no GPU, and a CPU takes minutes for each of music: --stems demucs does it"
    return Mix.key, (
        "warning: --stems auto: melodies are heard in the full mix, drums and bass in it, so that some 4 of 10 notes"
        " differ from those of the voice and other instruments alone, with which Meta trained. Demucs finds these:"
        f" {missing or slow}. Or give a clip its melody as name.melody.wav beside it. --stems mix means it so"
    )


def _model_in(path: Path) -> HTDemucs:
    """The model whose weights the file holds. Raises ConfigError where it cannot be read, or holds another."""
    from demucs.hf import load_safetensors_model
    from demucs.htdemucs import HTDemucs
    from demucs.states import load_model

    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                kind = (file.metadata() or {}).get("klass")
            if kind != f"{HTDemucs.__module__}.{HTDemucs.__name__}":
                raise ValueError(f"it is of the class {kind}")
            return load_safetensors_model(path)
        # Its pickle names classes. Only those that it needs may be called: the file may have come from anywhere.
        with torch.serialization.safe_globals([HTDemucs, Fraction, *_SCALARS]):
            package = torch.load(path, map_location="cpu", weights_only=True)
        if package["klass"] is not HTDemucs:
            raise ValueError(f"it is of the class {package['klass']}")
        return load_model(package)
    except (OSError, EOFError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError,
            pickle.UnpicklingError) as error:  # fmt: skip
        # torch's own words for a pickle of other classes recommend to load it all the same.
        is_foreign = isinstance(error, pickle.UnpicklingError)
        why = "it holds other things than weights" if is_foreign else str(error).partition("\n")[0]
        raise ConfigError(
            f"--stems demucs: {path} cannot be read as the weights of {demucs_files.MODEL} ({why}): remove it, and"
            f" fetch it again: {demucs_files.FETCH}; or give --stems mix"
        ) from error


def _digest(state: dict[str, Any]) -> str:
    """Of names and values, which may have been kept in half precision or not."""
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].float().numpy().tobytes())
    return digest.hexdigest()


def _at_rate(blocks: Iterable[np.ndarray], from_hz: int, to_hz: int) -> Iterator[np.ndarray]:
    """The blocks, (n,) or (n, channels), at another rate, as soxr makes it of the whole; none of them is empty."""
    if from_hz == to_hz:
        yield from (block.copy() for block in blocks)  # the next one may be decoded into the same buffer
        return
    resampler = None
    for block in blocks:
        if resampler is None:
            channels = 1 if block.ndim == 1 else block.shape[1]
            resampler = soxr.ResampleStream(from_hz, to_hz, channels, dtype="float32", quality="HQ")
        found = resampler.resample_chunk(np.ascontiguousarray(block))
        if len(found):
            yield found
    if resampler is not None:
        shape = (0,) if block.ndim == 1 else (0, block.shape[1])
        rest = resampler.resample_chunk(np.zeros(shape, np.float32), last=True)
        if len(rest):
            yield rest
