"""Each small file that a run leaves, empty, cut or garbled as by a power loss: done without, or refused with advice."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from trainer.data import audio_facts, clip_table
from trainer.data.arrow_store import Store
from trainer.data.cache import code_store, text_store
from trainer.errors import TrainerError
from trainer.exports.init_from import find_starting_point
from trainer.exports.saved_models import open_saved
from trainer.report.run_facts import RunReader
from trainer.report.run_page import page_of_run
from trainer.run.exit_code import ExitCodeFile
from trainer.run.metrics import Tracker, reports
from trainer.run.output_dir import OutputDir, open_output_dir
from trainer.wiring.finished_run import config_of_run

LARGE = 1_000_000
DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda whole: b"",
    "cut": lambda whole: whole[: len(whole) // 2],
    "zeros": lambda whole: bytes(len(whole)),
    "garbage": lambda whole: bytes(byte ^ 0xA5 for byte in whole),
}
# What is done without, by what shows it: each takes the folder of the run, and fails where the file is missed.


def exports_again(run: Path) -> None:
    folder, checkpoint = open_output_dir(str(run / "models"), "auto")
    assert checkpoint is not None and checkpoint.step == 3 and folder.finished_step() is None


def starts_and_leaves_its_code(run: Path) -> None:
    with ExitCodeFile(str(run / "models"), first=True) as exit_code:
        _, checkpoint = open_output_dir(str(run / "models"), "auto")
        assert checkpoint is not None and checkpoint.step == 3
        exit_code.code = 75
    assert (run / "models/exit_code").read_text() == "75\n"


def gets_another_id(run: Path) -> None:
    folder, _ = open_output_dir(str(run / "models"), "auto")
    made = folder.tracker_id()
    assert re.fullmatch("[0-9a-f]{16}", made) and folder.tracker_id() == made


def reports_what_is_whole(run: Path) -> None:
    path = run / "models/metrics.jsonl"
    Tracker(path, start_step=3, external=None).log({"step": 4, "loss": 1.0})
    assert reports(path)[-1] == {"step": 4, "loss": 1.0}
    assert len(reports(path)) == len(path.read_text().splitlines())


def reads_the_sounds_again(run: Path) -> None:
    assert audio_facts._load(run / "cache/scan") == {}


def writes_the_table_anew(run: Path) -> None:
    file = next(path for path in (run / "cache/scan").glob("*.arrow") if path.stat().st_ino in damaged_inodes)
    kind, types = file.name.split("-")[0], {"clips": clip_table.TYPES, "fates": clip_table.FATE_TYPES}
    with pytest.raises(TrainerError, match=r"damaged .* run again, and the first process writes it anew"):
        clip_table._columns(file, types[kind])


def makes_the_part_again(run: Path) -> None:
    stores: list[Store] = []
    for folder in (run / "cache/codes").iterdir():
        name, views = folder.name.rsplit("-", 1)
        stores.append(code_store(run / "cache", name, int(views)))
    stores += [text_store(run / "cache", folder.name) for folder in (run / "cache/text").iterdir()]
    assert sorted(len(store.keys()) for store in stores) == [0, 3]


def is_for_readers_alone(run: Path) -> None:
    starts_and_leaves_its_code(run)
    open_saved(str(run / "models"))
    find_starting_point(str(run / "models"))


def is_shown_without(run: Path) -> None:
    is_for_readers_alone(run)
    assert "run.json" not in page_of_run(RunReader(run / "models"), run / "models", {})
    assert OutputDir(root=run / "models").read_json("run.json") == {}, "the next start writes it anew"


damaged_inodes: set[int] = set()

# By file. A text is what the refusal says, with the advice, to the readers below it.
REFUSED: dict[str, tuple[str, tuple[Callable[[Path], object], ...]]] = {
    "models/checkpoints/*/checkpoint.json": (
        r"checkpoint\.json is empty or damaged .*Delete this folder to use an older checkpoint, or to start anew",
        (
            lambda run: open_output_dir(str(run / "models"), "auto"),
            lambda run: open_output_dir(str(run / "new"), str(run / "models/checkpoints/step-00000003")),
            lambda run: find_starting_point(str(run / "models")),
        ),
    ),
    "models/config.json": (
        r"add --base with that model|is no output_dir of a run: its config.json cannot be read",
        (lambda run: open_saved(str(run / "models/lm_2.pt")), lambda run: config_of_run(run / "models")),
    ),
    "models/huggingface/config.json": (
        r"holds no readable config\.json", (lambda run: open_saved(str(run / "models/huggingface")),)
    ),
    "models/huggingface/generation_config.json": (
        r"generation_config\.json is empty or damaged .*: download or export the model again",
        (lambda run: open_saved(str(run / "models/huggingface")),),
    ),
    "models/huggingface/p*rocessor_config.json": (
        r"lacks preprocessor_config\.json: save the base model's processor there",
        (lambda run: open_saved(str(run / "models/huggingface")),),
    ),
    "models/huggingface/tokenizer*.json": (
        r"the tokenizer in .* cannot be read .*: download the model again",
        (lambda run: open_saved(str(run / "models/huggingface")).load_tokenizer(),),
    ),
}  # fmt: skip
DONE_WITHOUT: dict[str, Callable[[Path], None]] = {
    "models/finished.json": exports_again,
    "models/exit_code": starts_and_leaves_its_code,
    "models/.lock": starts_and_leaves_its_code,
    "models/.holder.json": starts_and_leaves_its_code,
    "models/tracker_id.txt": gets_another_id,
    "models/metrics.jsonl": reports_what_is_whole,
    "models/.told.json": reports_what_is_whole,
    "models/log.txt": is_for_readers_alone,
    "models/plan.json": is_for_readers_alone,
    "models/dataset.csv": is_for_readers_alone,
    "models/dataset.json": is_for_readers_alone,
    "models/dataset.html": is_for_readers_alone,
    "models/report.html": is_for_readers_alone,
    "models/run.json": is_shown_without,
    "models/*/README.md": is_for_readers_alone,
    "models/audiocraft/config.json": is_for_readers_alone,
    "cache/scan/audio_facts.json": reads_the_sounds_again,
    "cache/scan/clips-*.arrow": writes_the_table_anew,
    "cache/scan/fates-*.arrow": writes_the_table_anew,
    "cache/codes/*/*.arrow": makes_the_part_again,
    "cache/text/*/*.arrow": makes_the_part_again,
}
# Of another program's format, and read by that program: transformers opens the T5 of debug.
OTHERS = ("models/audiocraft/t5-small/*",)
# What only some runs leave, as those write it.
SOMETIMES = {
    "models/.holder.json": b'{\n "host": "n7",\n "machine": "n7 boot",\n "pid": 4,\n "job": "812"\n}',
    "models/tracker_id.txt": b"0123456789abcdef",
    "models/.told.json": json.dumps([["4", "loss", "step"]]).encode(),
}


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of a finished run with its cache; what is not written over shares the disk with the original."""
    for name in ("models", "cache"):
        shutil.copytree(finished_run.parent / name, tmp_path / name, copy_function=os.link)
    for name, content in SOMETIMES.items():
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).write_bytes(content)
    for name in ("models/.lock", "models/metrics.jsonl"):  # which are written to in place
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
        (tmp_path / name).write_bytes(content)
    damaged_inodes.clear()
    return tmp_path


def damage_all(run: Path, pattern: str, how: str) -> int:
    """Damages all files of the pattern; returns how many there are."""
    files = list(run.glob(pattern))
    for path in files:
        whole = path.read_bytes()
        path.unlink()  # the original of the fixture stays as it is
        path.write_bytes(DAMAGE[how](whole))
        damaged_inodes.add(path.stat().st_ino)
    return len(files)


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("pattern", DONE_WITHOUT)
def test_a_small_file_that_a_crash_damaged_is_done_without(pattern: str, how: str, run: Path) -> None:
    if damage_all(run, pattern, how) or pattern != "models/audiocraft/config.json":
        DONE_WITHOUT[pattern](run)


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("pattern", REFUSED)
def test_a_small_file_that_cannot_be_done_without_is_refused_with_what_to_do(
    pattern: str, how: str, run: Path
) -> None:
    message, readers = REFUSED[pattern]
    assert damage_all(run, pattern, how)
    for read in readers:
        with pytest.raises(TrainerError, match=message):
            read(run)


@pytest.mark.parametrize("how", DAMAGE)
def test_of_the_reports_only_the_damaged_line_is_lost(how: str, run: Path) -> None:
    path = run / "models/metrics.jsonl"
    *kept, last = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(kept) + DAMAGE[how](last.rstrip(b"\n")))
    Tracker(path, start_step=3, external=None).close()
    assert path.read_bytes().splitlines(keepends=True) == kept


def test_every_small_file_of_a_run_is_tried_here(run: Path) -> None:
    known = {path for pattern in (*DONE_WITHOUT, *REFUSED, *OTHERS) for path in run.glob(pattern)}
    found = {path for path in run.rglob("*") if path.is_file() and path.stat().st_size < LARGE}
    large_elsewhere = {path for path in found if path.suffix in (".pt", ".bin", ".safetensors")}
    assert found - large_elsewhere <= known
