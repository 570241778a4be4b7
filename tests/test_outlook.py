"""What a dry run says of a folder, and what clips that are shorter than the segment save."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.plans import plan_for
from tests.runs import EXAMPLES, ROOT, environ
from tests.synthetic import random_examples
from trainer.data import outline
from trainer.data.cut import cut_for, micro_batches
from trainer.data.order import Order, rows_of_step
from trainer.flags.config import parse
from trainer.outlook import average_step, full_step, of_dry_run, sounds_bytes
from trainer.plan.dry_run import cluster_of, plan_of
from trainer.spec.flops import clip_flops
from trainer.spec.shapes import KNOWN

DEBUG, SEGMENT = KNOWN["debug"], 40


def order_of(lengths: list[int], **changes) -> Order:
    values = {"seed": 1, "epochs": 3, "global_batch": 8, "segment_frames": SEGMENT, "codebooks": 4} | changes
    return Order(caption_drop_rate=0.0, frames=np.array([[one] * 2 for one in lengths]), **values)  # type: ignore[arg-type]


def test_steps_of_clips_that_fill_the_segment_cost_what_a_full_step_does():
    layout = plan_for(micro_batch=4, accumulation=2).layout
    order = order_of([SEGMENT] * 8)
    assert average_step(order, layout, DEBUG, 5, 0) == full_step(layout, DEBUG, SEGMENT, 5)


@pytest.mark.parametrize("world_size,micro_batch,accumulation", [(1, 4, 2), (1, 3, 3), (2, 2, 2)])
def test_an_average_step_costs_what_its_real_batches_compute_with_their_padding(world_size, micro_batch, accumulation):
    lengths = [5, 40, 60, 33, 17, 40, 90, 12]
    examples = random_examples(lengths, segment_frames=SEGMENT)
    order = order_of(lengths)
    strategy = "single" if world_size == 1 else "ddp"
    layout = plan_for(strategy, world_size=world_size, micro_batch=micro_batch, accumulation=accumulation).layout
    cut = cut_for(
        order, micro_batch=micro_batch, accumulation=accumulation, world_size=world_size, row_places=5
    )  # as many as the text has tokens
    computed = 0
    for step in range(order.steps):
        shares = micro_batches(rows_of_step(order, step), cut, rank=0)
        for rows, _, frames in (examples.batch(share).inputs_BKT.shape for share in shares):
            computed += rows * clip_flops(DEBUG, frames, 5)
    assert average_step(order, layout, DEBUG, 5, 0) == pytest.approx(computed / order.steps)
    assert average_step(order, layout, DEBUG, 5, 0) < full_step(layout, DEBUG, SEGMENT, 5)


def test_of_a_resumed_run_only_the_steps_that_are_left_count():
    order, layout = order_of([SEGMENT] * 8 + [4]), plan_for(micro_batch=8).layout
    last = rows_of_step(order, order.steps - 1)
    assert len(last) == 3  # of 27 crops, 8 a step
    alone = average_step(order, layout, DEBUG, 0, order.steps - 1)
    assert average_step(order, layout, DEBUG, 0, order.steps) == alone  # a run that was killed while it exported
    assert alone == 3 / 8 * full_step(layout, DEBUG, SEGMENT, 0)  # 3 rows without fillers


def write_sound(path: Path, seconds: float) -> None:
    soundfile.write(path, np.full(round(8000 * seconds), 0.1, np.float32), 8000)


def test_of_few_files_the_outline_is_exact(tmp_path):
    for number, seconds in enumerate((1.0, 2.5, 4.0)):
        write_sound(tmp_path / f"{number}.wav", seconds)
    (tmp_path / "0.txt").write_text("rock " * 8)
    (tmp_path / "broken.wav").write_bytes(b"none")
    (tmp_path / "notes.md").write_text("no sound")
    found = outline.outline_of(str(tmp_path))
    assert found is not None and found.sounds == 4
    assert sorted(found.seconds) == [1.0, 2.5, 4.0] and found.total_seconds == pytest.approx(4 * 2.5)


def test_of_many_files_the_headers_of_some_are_read_and_the_hours_follow(tmp_path, monkeypatch):
    """400 files of 1 s and 400 of 3 s: 1,600 s, of which 200 drawn at random give the mean to 0.1 s or so."""
    for number, seconds in enumerate((1.0, 3.0)):
        write_sound(tmp_path / f"{number}.wav", seconds)
    for number in range(2, 800):
        (tmp_path / f"{number}.wav").hardlink_to(tmp_path / f"{number % 2}.wav")
    opened, looked_at = outline.opened, []
    monkeypatch.setattr(outline, "opened", lambda path: looked_at.append(path) or opened(path))
    monkeypatch.setattr(outline, "MOST_SECONDS", 60.0)
    found = outline.outline_of(str(tmp_path))
    assert found is not None and found.sounds == 800 and len(looked_at) == len(set(looked_at)) == outline.SAMPLED
    assert found.total_seconds == pytest.approx(1600, rel=0.2)  # 3 deviations of the mean of 200 are 0.21 of 2 s
    assert outline.outline_of(str(tmp_path)) == found


def test_a_disk_that_answers_slowly_is_asked_for_fewer_headers(tmp_path, monkeypatch):
    for number in range(5):
        write_sound(tmp_path / f"{number}.wav", 1.0)
    monkeypatch.setattr(outline, "MOST_SECONDS", -1.0)
    found = outline.outline_of(str(tmp_path))
    assert found is not None and len(found.seconds) == 1 and found.total_seconds == 5


def test_where_there_is_no_sound_there_is_no_outline(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"none")
    assert outline.outline_of(str(tmp_path)) is None and outline.outline_of(str(tmp_path / "absent")) is None


def dry(*words: str) -> str:
    from trainer.plan.dry_run import plan_of_shape
    from trainer.plan.launcher import Launch
    from trainer.plan.strategies import Cluster

    config, typed = parse(["--dry_run", "1", "--model_id", "debug", "--device", "cpu", *words])
    cluster = Cluster(nodes=1, gpus_per_node=1, device="cpu", gpu_memory_bytes=None, host_memory_bytes=None,
                      supports_bf16=False)  # fmt: skip
    return of_dry_run(config)(plan_of_shape(config, typed, cluster, Launch(), DEBUG, 50), DEBUG)


def test_a_dry_run_counts_steps_by_the_files_that_are_there():
    text = dry("--dataset", str(EXAMPLES), "--epochs", "8", "--segment_seconds", "5")
    assert f"{EXAMPLES}: about 10 sound files, 55 s in all (by names and the headers of 10)" in text
    assert "1.2 steps an epoch, 10 steps to do" in text  # 8 x 10 clips, 8 a step
    # 55.3 s in 4 views of 400 bytes a second, and 10 captions of some 20 tokens of 512 values
    assert "cache 0.5 MB" in text and "checkpoints 3 x 32 MB" in text
    assert "4 steps to do" in dry("--dataset", str(EXAMPLES), "--max_steps", "4")


def test_a_dry_run_says_how_often_each_clip_is_heard_of_those_that_are_not_held_out():
    few = ["--dataset", str(EXAMPLES), "--segment_seconds", "30"]
    text = dry(*few, "--epochs", "8", "--validation", "0.2")
    assert "\neach clip is heard 8 times: 8 epochs of 8 clips, 8 steps of 8\n" in text and "note:" not in text
    assert "each clip is heard at most 3 times: 3 epochs of 8 clips, 3 steps of 8" in dry(
        *few, "--max_steps", "3", "--validation", "0.2", "--early_stop", "2"
    )
    assert "each clip is heard 2 times: 2 epochs of 1,000 clips" in dry("--dataset", "user/name", "--epochs", "2")


def test_a_dry_run_of_a_published_size_names_the_recipes_where_it_is_far_outside(tmp_path):
    for number in range(10):
        write_sound(tmp_path / f"{number}.wav", 6.0)
    config, typed = parse(["--dataset", str(tmp_path), "--dry_run", "1", "--gpus", "1", "--epochs", "1000"])
    plan = plan_of(config, typed, cluster_of(config, None)[0], KNOWN["small"])
    [note] = [line for line in of_dry_run(config)(plan, KNOWN["small"]).splitlines() if line.startswith("note: ")]
    assert "1,000 times is far above" in note and "docs/recipes.md" in note and "20 clips" in note


def test_without_a_folder_a_dry_run_reckons_by_a_thousand_clips():
    text = dry("--dataset", "user/name", "--epochs", "2")
    assert "no folder of sounds at user/name: by 1,000 clips of 30 s," in text and "250 steps to do" in text
    assert "cache" in text and "measures before the first" in text


def test_sounds_are_counted_before_the_first_step_and_after_the_last():
    config, _ = parse(["--dataset", "a", "--sample_every", "10", "--sample_seconds", "2"])
    each = sounds_bytes(config, DEBUG, 3, 0)
    assert [sounds_bytes(config, DEBUG, 3, steps) // each for steps in (9, 10, 11, 20)] == [2, 2, 3, 3]
    assert sounds_bytes(config, DEBUG, 0, 20) == 0


def test_a_dry_run_of_a_folder_loads_no_torch():
    program = "import sys, launch; code = launch.main(sys.argv[1:]); assert 'torch' not in sys.modules; sys.exit(code)"
    argv = ["--dataset", str(EXAMPLES), "--dry_run", "1", "--model_id", "debug", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-c", program, *argv], cwd=ROOT, env=environ(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "10 sound files" in done.stdout and "disk: checkpoints" in done.stdout
