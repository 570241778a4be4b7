"""Launches that would silently train something else are refused on every rank, with a message, and none hangs."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
from pathlib import Path
from typing import ClassVar

import pytest

from tests.ranks.launches import ends, start
from tests.ranks.test_encoding import keys_of_parts, second_longest
from tests.runs import few_clips
from trainer.errors import EXIT_FAILED, EXIT_USAGE


def refused(folder, *flags, words, code=EXIT_USAGE, **named) -> None:
    for rank, (found, output) in enumerate(ends(start(folder, *flags, **named), folder, 60)):
        assert found == code, f"rank {rank}: exit code {found}\n{output}"
        assert words in output, output
        assert "Traceback" not in output, output
    assert not (folder / "models/checkpoints").exists() or not list((folder / "models/checkpoints").iterdir())


def without_the_lines_for_fsdp_on_cpus() -> None:
    from accelerate import PartialState

    from trainer.engine import accelerator

    class Untouched:
        _shared_state: ClassVar[dict] = {}

        def __init__(self, **settings):
            PartialState(**settings)

    accelerator.PartialState = Untouched  # type: ignore[misc]


def test_fsdp_that_accelerate_turns_into_something_else_is_refused(tmp_path):
    # Fails as well when a new accelerate no longer needs the lines: then they can go.
    words = "the plan says fsdp, but Accelerate"
    refused(tmp_path, "--strategy", "fsdp", change=without_the_lines_for_fsdp_on_cpus, words=words)


def as_if_there_were_gpus() -> None:
    from trainer.engine import accelerator

    accelerator._on_cpu = lambda: False


def test_two_trainings_of_one_process_each_are_refused(tmp_path):
    # A bare Accelerator() on CPUs: each rank believes to be alone.
    refused(
        tmp_path,
        *("--strategy", "ddp"),
        change=as_if_there_were_gpus,
        words="the launcher started 2 process(es), Accelerate found 1",
    )


def one_process_more() -> None:
    os.environ |= {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}


@pytest.mark.parametrize("strategy", ["fsdp", *(pytest.param(s, marks=pytest.mark.full) for s in ("ddp", "zero2"))])
def test_a_process_that_never_comes_ends_the_others_with_a_message(strategy, tmp_path):
    refused(
        tmp_path,
        *("--strategy", strategy, "--timeout_minutes", "0.1"),
        change=one_process_more,
        words="the 3 processes of the run did not meet within 0.1 minutes",
        code=EXIT_FAILED,
    )


def fsdp_by_configuration() -> None:
    os.environ |= {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def test_a_flag_that_contradicts_the_configuration_is_refused(tmp_path):
    refused(tmp_path, "--strategy", "zero2", change=fsdp_by_configuration, words="--strategy zero2 contradicts fsdp")


@pytest.mark.parametrize(
    "of_rank,words",
    [
        ((("--seed", "1"), ("--seed", "2")), "the processes do not agree on seed: rank 0: 1; rank 1: 2"),
        pytest.param(
            (("--strategy", "zero2"), ("--strategy", "fsdp")),
            "the processes do not agree on strategy: rank 0: zero2; rank 1: fsdp",
            marks=pytest.mark.full,
        ),
        pytest.param(
            (("--strategy", "ddp"), ("--strategy", "zero3")), "do not agree on strategy", marks=pytest.mark.full
        ),
        pytest.param((("--epochs", "2"), ()), "do not agree on epochs", marks=pytest.mark.full),
        pytest.param((("--dataset", "other"), ()), "do not agree on dataset_path", marks=pytest.mark.full),
    ],
)
def test_ranks_with_different_flags_are_refused(of_rank, words, tmp_path):
    refused(tmp_path, of_rank=of_rank, words=words)


SHARED = ("--cache_dir", "../cache", "--output_dir", "../models")


def in_a_folder_of_its_own() -> None:
    os.chdir(f"machine-{os.environ['RANK']}")


def on_another_machine() -> None:
    """The second rank has another host name, and the working directory of its own machine."""
    in_a_folder_of_its_own()
    if os.environ["RANK"] == "1":
        socket.gethostname = lambda: "the-other-host"  # type: ignore[assignment]


def two_machines(folder: Path) -> Path:
    """A copy of the data on each of two machines; returns the file that the second has to encode."""
    for machine in ("machine-0", "machine-1"):
        few_clips(folder / machine / "data")
    return second_longest(folder / "machine-1/data")


def test_a_machine_that_lacks_a_file_of_its_share_is_named_with_the_file(tmp_path):
    path = two_machines(tmp_path)
    path.unlink()
    words = f"{path.name} on the-other-host: cannot be opened (No such file or directory)"
    refused(tmp_path, *SHARED, change=on_another_machine, words=words)


@pytest.mark.full  # tests/data/test_shared_scan.py has the same without a run
def test_a_machine_whose_file_has_another_content_of_equal_size_is_named_with_the_file(tmp_path):
    path = two_machines(tmp_path)
    content = bytearray(path.read_bytes())
    content[-1000:] = bytes(1000)
    path.write_bytes(content)
    refused(tmp_path, *SHARED, change=on_another_machine, words=f"{path.name} on the-other-host: changed since")


def test_the_first_machines_captions_are_trained_with_and_a_full_cache_needs_no_copy_of_the_data(tmp_path):
    path = two_machines(tmp_path)
    path.with_suffix(".txt").write_text("an older version")
    flags = ("--max_steps", "1", "--strategy", "ddp", *SHARED)
    for output in ("../models", "../again"):
        ended = ends(start(tmp_path, *flags, "--output_dir", output, change=on_another_machine), tmp_path, 120)
        assert [code for code, _ in ended] == [0, 0], ended
        shutil.rmtree(tmp_path / "machine-1/data", ignore_errors=True)
    captions = {path.read_text().strip() for path in (tmp_path / "machine-0/data").glob("*.txt")}
    keys = {hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16).hexdigest() for text in captions}
    assert {key for part in keys_of_parts(tmp_path, "text") for key in part} == keys


def in_a_folder_of_its_own_soon_missed() -> None:
    from trainer.engine import ranks

    ranks.SHOWN_SECONDS = 1.0
    in_a_folder_of_its_own()


def test_machines_that_share_no_folder_are_refused(tmp_path):
    for machine in ("machine-0", "machine-1"):
        few_clips(tmp_path / machine / "data")
    refused(tmp_path, change=in_a_folder_of_its_own_soon_missed, words="is not the same folder on all machines")
