"""Each rank opens only its own rows of the dataset: files while encoding, clips while training, pages of the store."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.ranks.harness import launch_rank, run_ranks
from tests.runs import FEW, few_clips
from trainer.data.arrow_store import KEY, PART
from trainer.data.cache import code_store, open_codes
from trainer.data.cut import cut_for, micro_batches
from trainer.data.order import Order, Row, rows_of_step

EPOCHS, STEPS, MICRO_BATCH, ACCUMULATION = 3, 6, 1, 2
FLAGS: tuple[str, ...] = ("--dataset", "data", "--model_id", "debug", "--code_views", "2", "--segment_seconds", "2")
FLAGS += ("--batch_size", str(MICRO_BATCH), "--grad_acc", str(ACCUMULATION), "--epochs", str(EPOCHS))
FLAGS += ("--strategy", "zero2")
CLIPS = (*FEW, "metal_war_of_freedom", "arcade_meadow", "metal_chaosland", "rock_feelings_guitar")
HUGE_PAGE = 2 * 2**20


def counted_run(folder: str) -> dict[str, Any]:
    """A run that notes which files this rank decodes, which rows it crops, which rows of the store it opens."""
    from trainer.data import audio
    from trainer.data.arrow_store import Binaries
    from trainer.data.cache import CachedCodes
    from trainer.training import loop

    seen: dict[str, Any] = {"decoded": [], "crops": [], "rows": [], "order": None}
    stream, crop, get, train = audio.stream, CachedCodes.crop, Binaries.__getitem__, loop.train

    def noting_stream(path: Path, *arguments: Any) -> Any:
        seen["decoded"].append(path.name)
        return stream(path, *arguments)

    def noting_crop(self: CachedCodes, clip: int, view: int, start: int, frames: int) -> np.ndarray:
        seen["crops"].append((clip, view, start, frames))
        seen["codes"] = id(self._values)
        return crop(self, clip, view, start, frames)

    def noting_get(self: Binaries, row: int) -> Any:
        seen["rows"].append((id(self), row))
        return get(self, row)

    def noting_train(run: Any, *arguments: Any) -> int:
        seen["order"], seen["row_of_clip"] = run.order, run.train.codes._row_of_clip.tolist()
        return train(run, *arguments)

    audio.stream, CachedCodes.crop, Binaries.__getitem__ = noting_stream, noting_crop, noting_get  # type: ignore
    loop.train = noting_train  # type: ignore[assignment]
    code, output = launch_rank(folder, *FLAGS)
    assert code == 0, output
    seen["rows"] = [row for owner, row in seen["rows"] if owner == seen["codes"]]
    return seen


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    """What each of two ranks looked at over a run of 21 rows, 4 to a step, with an empty cache before it."""
    folder = tmp_path_factory.mktemp("rows")
    few_clips(folder / "data", CLIPS)
    return run_ranks(2, counted_run, str(folder))


def test_each_rank_crops_its_rows_of_the_order_and_no_others(ranks):
    order = ranks[0]["order"]
    shares = [shares_of(order, rank) for rank in (0, 1)]
    for rank, share in enumerate(shares):
        assert ranks[rank]["crops"] == [(row.clip, row.view, row.start, row.frames) for row in share]
    whole = Counter((row.clip, row.epoch) for share in shares for row in share if row.weight)
    assert set(whole) == {(clip, epoch) for clip in range(len(CLIPS)) for epoch in range(EPOCHS)}
    assert set(whole.values()) == {1}
    assert sum(row.weight == 0 for share in shares for row in share) == 1  # beside the 21st row


def test_nothing_else_of_the_code_store_is_looked_into(ranks):
    for seen in ranks:
        assert seen["rows"] == [seen["row_of_clip"][clip] for clip, *_ in seen["crops"]]


def test_each_file_is_decoded_by_one_rank(ranks):
    decoded = [name for seen in ranks for name in seen["decoded"]]
    assert sorted(decoded) == sorted(f"{name}.wav" for name in CLIPS)
    assert all(seen["decoded"] for seen in ranks)


def shares_of(order: Order, rank: int) -> list[Row]:
    """A rank's rows of the whole run, one after another."""
    assert order.steps == STEPS
    cut = cut_for(order, micro_batch=MICRO_BATCH, accumulation=ACCUMULATION, world_size=2, row_places=1)
    return [
        row
        for step in range(order.steps)
        for batch in micro_batches(rows_of_step(order, step), cut, rank)
        for row in batch
    ]


def test_a_crop_maps_its_own_pages_and_no_others(tmp_path):
    frames, clips, start, length = 2_000_000, 6, 1_000_000, 2_000
    store = code_store(tmp_path, "codec", 1)
    fixed = {"views": 1, "codebooks": 4, "frames": [frames]}
    codes = [np.full((4, frames), clip, "<i2").tobytes() for clip in range(clips)]
    store.append([{KEY: str(clip), "codes": codes[clip], **fixed} for clip in range(clips)])
    opened, cropped = run_ranks(1, mapped_bytes, str(tmp_path), clips, [3, 5], start, length)[0]
    # A touched page comes with the block around it that the page cache holds as one, up to a huge page.
    assert opened <= 3 * HUGE_PAGE  # the table's two ends, and not the codes
    assert 0 < cropped - opened <= 2 * 4 * (2 * length + HUGE_PAGE) < clips * frames * 4 * 2 / 4


def mapped_bytes(folder: str, clips: int, crops: list[int], start: int, frames: int) -> tuple[int, int]:
    """Bytes of the store's files in this process's memory, after opening and after crops of some clips."""
    codes = open_codes(code_store(Path(folder), "codec", 1), [str(clip) for clip in range(clips)])
    opened = resident_bytes(PART)
    for clip in crops:
        crop = codes.crop(clip, 0, start, frames)
        assert crop.shape == (4, frames) and not crop.flags.owndata and not crop.flags.writeable
        assert crop.min() == crop.max() == clip
    return opened, resident_bytes(PART)


def resident_bytes(suffix: str) -> int:
    """Bytes in memory of this process's maps of files whose name ends so."""
    maps = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    sizes = [re.search(r"^Rss:\s+(\d+) kB", text, re.MULTILINE) for text in maps if f"{suffix}\n" in text]
    assert sizes
    return sum(1024 * int(size[1]) for size in sizes if size)
