"""EnCodec's codes of every sound file and T5's states of every caption, computed once and kept on disk.

Codes are kept under a digest of the file's bytes, states under a digest of the caption. So a renamed file costs
nothing, an added or changed one costs its own encoding only, and runs over different folders may share one cache.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from tqdm import tqdm
from transformers import EncodecModel, PreTrainedTokenizerBase, T5EncoderModel

from trainer.data import audio
from trainer.data.arrow_store import KEY, Binaries, Row, Rows, Store
from trainer.data.audio_fault import AudioFault
from trainer.data.codec import encode_tracks, view_offsets
from trainer.data.codec_windows import codebooks_of, reproducible
from trainer.data.decoding import Decoders
from trainer.data.excerpt import Excerpt
from trainer.data.manifest import Columns
from trainer.data.places import reading_order, sound_at
from trainer.data.progress import check_room, counting_bar, duration, hours_bar
from trainer.data.treatment import AS_IT_IS, Treatment
from trainer.errors import StorageError
from trainer.spec.encoding import encoding_pass

BLOCK_SECONDS = 10.0
ROW_BYTES = 128  # what a part holds of each row beside its codes or states: the key, offsets, numbers
# Tokens of one pass of T5, which keeps its attention below about 1 GiB for captions of up to 1,000 tokens.
PASS_TOKENS = 16_384
# Captions of one pass: with few the products of T5 are too small for a GPU. On a CPU it changes the states' last bits.
CPU_CAPTIONS, GPU_CAPTIONS = 32, 512


@dataclass(frozen=True, kw_only=True)
class CachedCodes:
    """The cached codes of a list of clips, which are numbered from 0 as they stand in it.

    frames     (clips, views) int64: codec frames of each view
    codebooks  K

    The codes themselves stay in the memory-mapped files: `_values` has them by row of the store, and `_row_of_clip`,
    (clips,) int64, gives each clip's row.
    """

    frames: np.ndarray
    codebooks: int
    _values: Binaries
    _row_of_clip: np.ndarray

    def crop(self, clip: int, view: int, start: int, frames: int) -> np.ndarray:
        """Codes (K, frames) int16 of one view from frame `start`: a read-only view of the mapped file, not a copy.

        Raises IndexError where the view does not have all these frames.
        """
        lengths = self.frames[clip]
        if not (0 <= view < len(lengths) and 0 <= start <= start + frames <= lengths[view]):
            raise IndexError(f"frames {start} to {start + frames} of view {view}: clip {clip} has {lengths}")
        before, length = self.codebooks * int(lengths[:view].sum()), int(lengths[view])
        values = np.frombuffer(self._values[int(self._row_of_clip[clip])], "<i2")
        track = values[before : before + self.codebooks * length].reshape(self.codebooks, length)
        return track[:, start : start + frames]


@dataclass(frozen=True, kw_only=True)
class CachedText:
    """The cached T5 states of some captions, in the memory-mapped files: `_row_of` gives a caption's row there."""

    _values: Binaries
    _row_of: Mapping[str, int]
    _width_of_row: np.ndarray

    def states(self, caption: str) -> np.ndarray:
        """T5's last hidden states (S, D) float32 of the caption, its end token </s> included.

        Raises KeyError for a caption that was not among those opened.
        """
        row = self._row_of[caption]
        return np.frombuffer(self._values[row], "<f4").reshape(-1, int(self._width_of_row[row])).copy()

    def tokens(self, caption: str) -> int:
        """The number of a caption's states, which are not read for it."""
        row = self._row_of[caption]
        return int(self._values[row].size // (4 * self._width_of_row[row]))


def code_store(
    cache_dir: Path, codec_identity: str, views: int, treatment: Treatment = AS_IT_IS, channels: int = 1
) -> Store:
    """The store of `views` views of tracks that were treated so, under one codec, in mono or in stereo; made on first
    use."""
    columns = {
        "views": pa.int32(),
        "codebooks": pa.int32(),
        "frames": pa.list_(pa.int64()),
        "codes": pa.large_binary(),
    }
    stereo = "" if channels == 1 else "-stereo"
    return Store(cache_dir / "codes" / f"{codec_identity}-{views}{treatment.key}{stereo}", columns)


def text_store(cache_dir: Path, text_identity: str) -> Store:
    """The store of captions' states under one text encoder; made on first use."""
    columns = {"tokens": pa.int32(), "width": pa.int32(), "states": pa.large_binary()}
    return Store(cache_dir / "text" / text_identity, columns)


def fill_codes(
    store: Store,
    clips: Columns,
    load_codec: Callable[[], EncodecModel],
    *,
    sample_rate_hz: int,
    views: int,
    device: torch.device,
    channels: int = 1,
    show_progress: bool = True,
    rank: int = 0,
    world_size: int = 1,
) -> list[tuple[int, AudioFault]]:
    """Encode the clips whose content the store lacks; returns the rows whose file could not be read, and why.

    clips       with the columns content, path_bytes, seconds, first_frame, frames and gain of the manifest
    load_codec  called only if something is missing
    channels    of the sound that is encoded, those of the store: 1, or 2 with twice as many codebooks, see `encode`
    rank        of `world_size`: what is encoded is its share, see `missing_codes`

    On a GPU several files share a pass, on a CPU each is encoded by itself; threads decode ahead of it. A file that no
    longer has the content it is listed under fails. Of several files with one content only the first that can be read
    is encoded. Raises StorageError where the store cannot be written, or its disk lacks the room for what all ranks
    will add, and does so before anything is encoded.
    """
    missing = missing_codes(store, clips, rank=rank, world_size=world_size)
    if not missing:
        return []
    codec = load_codec().to(device)
    seconds = clips["seconds"][:]
    _check_room_for_codes(store, clips, codec, sample_rate_hz, views, channels, say=show_progress)
    faults: list[tuple[int, AudioFault]] = []
    hours = sum(seconds[rows[0]] for rows in missing.values()) / 3600
    what = "encoding audio" if world_size == 1 else f"encoding audio, the first of {world_size} shares"
    with hours_bar(what, hours, show_progress) as bar:

        def counted(blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
            for block in blocks:
                yield block
                # Rounded, and a file may be decoded twice: not beyond the end, where tqdm would warn.
                bar.update(min(len(block) / sample_rate_hz / 3600, hours - bar.n))

        def blocks(row: int) -> Iterator[np.ndarray]:
            excerpt = Excerpt(**{name: clips[name][row] for name in ("first_frame", "frames", "gain")})
            return sound_blocks(clips["path_bytes"][row], clips["content"][row], sample_rate_hz, excerpt, channels)

        store.append_all(_code_rows(codec, missing, blocks, counted, views, channels, faults))
    return sorted(faults, key=lambda fault: fault[0])


def sound_blocks(
    reference: bytes, content: str, sample_rate_hz: int, excerpt: Excerpt, channels: int = 1
) -> Iterator[np.ndarray]:
    """The sound of a clip as `audio.stream` gives it; AudioFault at its end where it is not `content` any more.

    Codes must be of the content under which they are kept; the file may have changed since its inspection.
    """
    sound = sound_at(reference)
    yield from audio.stream(sound, sample_rate_hz, BLOCK_SECONDS, excerpt, channels)
    if audio.content_of(sound) != content:
        raise AudioFault("unreadable", "changed since it was inspected: run again with --rehash 1")


def missing_codes(store: Store, clips: Columns, *, rank: int = 0, world_size: int = 1) -> dict[str, list[int]]:
    """What a rank has to encode: each content of its share that the store lacks, with its rows; see `missing_rows`."""
    return missing_rows(store, clips["content"], clips["seconds"], clips["path_bytes"], rank, world_size)


def missing_rows(
    store: Store, keys: Sequence[str], seconds: Sequence[float], references: Sequence[bytes], rank: int, world_size: int
) -> dict[str, list[int]]:
    """Each key of a rank's share that the store lacks, with the rows of the clips that have it.

    keys, seconds, references  of each clip: its key in the store, its length, and where its sound lies

    Keys are dealt out in turn, longest first, whatever other ranks have stored meanwhile: every key is some rank's, so
    that the store is full once all ranks have done theirs. Those that lie in tables come last, in the order of their
    rows, so that each row group is read once.
    """
    rows_of_key = defaultdict(list)
    for row, key in enumerate(keys):
        rows_of_key[key].append(row)
    seconds, references = seconds[:], references[:]
    longest_first = sorted(rows_of_key, key=lambda key: (-seconds[rows_of_key[key][0]], key))
    present = store.keys()
    share = [key for key in longest_first[rank::world_size] if key not in present]
    share.sort(key=lambda key: reading_order(references[rows_of_key[key][0]]))
    return {key: rows_of_key[key] for key in share}


def open_codes(store: Store, contents: Sequence[str]) -> CachedCodes:
    """The codes of the clips with these contents, in this order. Raises StorageError where the store lacks some."""
    rows = store.open()
    row_of_clip = stored_rows(store, rows, contents, "clips")
    codebooks = rows.integers("codebooks")[row_of_clip]
    return CachedCodes(
        frames=rows.integers("frames")[row_of_clip],
        codebooks=int(codebooks[0]) if len(codebooks) else 0,
        _values=rows.binaries("codes"),
        _row_of_clip=row_of_clip,
    )


def fill_text(
    store: Store,
    captions: Iterable[str],
    load: Callable[[], tuple[T5EncoderModel, PreTrainedTokenizerBase]],
    *,
    device: torch.device,
    batch_size: int | None = None,
    show_progress: bool = True,
    rank: int = 0,
    world_size: int = 1,
) -> None:
    """Store T5's states of the captions that the store lacks, each as long as its own tokens.

    load        called only if something is missing
    batch_size  the most captions of one pass, None: as many as suit the device. They all have the same number of
                tokens, so that none is padded
    rank        of `world_size`: it takes its share of the distinct captions, as in `fill_codes`

    No caption is cut, however long: T5's positions are relative. Raises StorageError where the store cannot be written.
    """
    longest_first = sorted(set(captions), key=lambda caption: (-len(caption), caption))
    present = store.keys()
    missing = [caption for caption in longest_first[rank::world_size] if _text_key(caption) not in present]
    if not missing:
        return
    encoder, tokenizer = load()
    encoder = encoder.to(device)
    batch_size = batch_size or (GPU_CAPTIONS if device.type == "cuda" else CPU_CAPTIONS)
    by_length: dict[int, list[tuple[str, list[int]]]] = defaultdict(list)
    for caption in missing:
        tokens = tokenizer(caption, truncation=False, verbose=False).input_ids
        by_length[len(tokens)].append((caption, tokens))
    states = world_size * sum(length * len(group) for length, group in by_length.items())  # of a share, and of as many
    needed = 4 * encoder.config.d_model * states + ROW_BYTES * world_size * len(missing)
    what = f"encoding {len(missing)} captions" if world_size == 1 else "encoding captions, by this process's share,"
    check_room(store.folder, needed, what, instead="lower --caption_variants", say=show_progress)
    with counting_bar("encoding captions", len(missing), "captions", show_progress) as bar:
        store.append_all(_text_rows(encoder, by_length, device, batch_size, bar))


def open_text(store: Store, captions: Iterable[str], *, alone: bool = False) -> CachedText:
    """The states of these captions. Raises StorageError where the store lacks some.

    alone  see `text_keys`
    """
    rows = store.open()
    distinct = sorted(set(captions))
    found = stored_rows(store, rows, text_keys(distinct, alone=alone), "captions")
    return CachedText(
        _values=rows.binaries("states"),
        _row_of=dict(zip(distinct, found.tolist(), strict=True)),
        _width_of_row=rows.integers("width"),
    )


def text_keys(captions: Iterable[str], *, alone: bool = False) -> list[str]:
    """The keys under which the store of states has these captions.

    alone  those of texts that T5 was given one by one: in a batch, as captions are, the last bits may be others
    """
    return [_text_key(caption, b"alone" if alone else b"") for caption in captions]


def _check_room_for_codes(
    store: Store, clips: Columns, codec: EncodecModel, sample_rate_hz: int, views: int, channels: int, *, say: bool
) -> None:
    """Say what the codes of all ranks will add to the cache. Raises StorageError where the disk lacks the room."""
    seconds = clips["seconds"][:]
    missing = missing_codes(store, clips)
    frames = sum(int(seconds[rows[0]] * sample_rate_hz) // codec.config.hop_length for rows in missing.values())
    needed = 2 * views * channels * codebooks_of(codec) * frames + ROW_BYTES * len(missing)
    length = duration(sum(seconds[rows[0]] for rows in missing.values()))
    in_stereo = "" if channels == 1 else " in stereo"
    what = f"encoding {length} of audio{in_stereo} at {views} offset{'s' if views > 1 else ''}"
    check_room(store.folder, needed, what, instead="lower --code_views", say=say)


def _code_rows(
    codec: EncodecModel,
    rows_of: Mapping[str, Sequence[int]],
    blocks: Callable[[int], Iterator[np.ndarray]],
    counted: Callable[[Iterator[np.ndarray]], Iterator[np.ndarray]],
    views: int,
    channels: int,
    faults: list[tuple[int, AudioFault]],
) -> Iterator[Row]:
    """The store's row for each content. Where none of its files can be read, all of them are added to `faults`.

    blocks   of a row's file; counted: the same blocks, counted as they are used
    """
    size = encoding_pass(on_gpu=codec.device.type == "cuda", views=views, channels=channels)
    failed: dict[str, list[tuple[int, AudioFault]]] = defaultdict(list)
    waiting = deque((content, rows[0]) for content, rows in rows_of.items())
    opened: deque[tuple[tuple[str, int], Iterator[np.ndarray]]] = deque()
    with Decoders(2 * size.windows) as decoders:

        def next_track() -> tuple[tuple[str, int], Iterator[np.ndarray]] | None:
            while waiting and len(opened) < 2:  # one more than is asked for: it is decoded meanwhile
                content, row = waiting.popleft()
                opened.append(((content, row), counted(decoders.ahead(blocks(row)))))
            return opened.popleft() if opened else None

        offsets = view_offsets(views, codec.config.hop_length)
        encoded = encode_tracks(codec, next_track, offsets=offsets, size=size, channels=channels)
        for (content, row), tracks in encoded:
            if isinstance(tracks, AudioFault):
                failed[content].append((row, tracks))
                others = rows_of[content][len(failed[content]) :]
                if others:
                    waiting.appendleft((content, others[0]))
                else:
                    faults.extend(failed[content])
                continue
            yield {
                KEY: content,
                "views": views,
                "codebooks": channels * codebooks_of(codec),
                "frames": [track.shape[1] for track in tracks],
                "codes": b"".join(track.astype("<i2").tobytes() for track in tracks),
            }


def _text_rows(
    encoder: T5EncoderModel,
    by_length: Mapping[int, Sequence[tuple[str, list[int]]]],
    device: torch.device,
    batch_size: int,
    bar: tqdm,
) -> Iterator[Row]:
    """The store's row for each caption; `by_length` has the captions and their tokens by how many tokens they are."""
    for length in sorted(by_length, reverse=True):
        group = by_length[length]
        batch_rows = max(1, min(batch_size, PASS_TOKENS // length))
        for start in range(0, len(group), batch_rows):
            batch = group[start : start + batch_rows]
            tokens_BS = torch.tensor([tokens for _, tokens in batch], device=device)
            with torch.inference_mode(), reproducible(device):
                states_BSD = encoder(input_ids=tokens_BS).last_hidden_state.float().cpu().numpy()
            for (caption, _), states_SD in zip(batch, states_BSD, strict=True):
                yield {
                    KEY: _text_key(caption),
                    "tokens": length,
                    "width": states_SD.shape[1],
                    "states": states_SD.astype("<f4").tobytes(),
                }
            bar.update(len(batch))


def _text_key(caption: str, purpose: bytes = b"") -> str:
    return hashlib.blake2b(caption.encode(), digest_size=16, person=purpose).hexdigest()


def stored_rows(store: Store, rows: Rows, keys: Sequence[str], what: str) -> np.ndarray:
    """The row of each key, (len(keys),) int64. Raises StorageError where some are missing."""
    missing = sum(key not in rows.index for key in keys)
    if missing:
        raise StorageError(
            f"cache folder {store.folder} lacks {missing} of {len(keys)} {what}: were its files removed or"
            " damaged while this ran? Run again with the same --cache_dir to make them again"
        )
    return np.array([rows.index[key] for key in keys], dtype=np.int64)
