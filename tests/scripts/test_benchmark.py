"""scripts/benchmark.py runs, on this machine, and what it writes adds up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from benchmarks import data_sets, encode_each_epoch, generating
from benchmarks.steps import of_datasheet
from benchmarks.work import Work

from scripts import benchmark as script
from tests.blown_up import blown_up
from tests.close_codes import equal_steps
from tests.runs import environ
from trainer.evaluation.generation import Sampling
from trainer.exports.export import write_huggingface
from trainer.model.source import DECODER, PROJECTION, open_model
from trainer.spec.flops import clip_flops
from trainer.spec.shapes import KNOWN


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the processes of the contestants."""
    for name, value in environ().items():
        monkeypatch.setenv(name, value)


def benchmark(folder: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> list[dict]:
    """The rows of a finished run."""
    models = [] if "--models" in flags else ["--models", "debug"]
    assert script.main([*models, "--rounds", "1", "--out", str(folder), *flags]) == 0
    assert "| case |" in capsys.readouterr().out
    return json.loads((folder / "benchmark.json").read_text())["rows"]


@pytest.mark.full
@pytest.mark.parametrize("model", ["debug-stereo", "debug-melody", "debug-stereo-melody"])
def test_every_contestant_steps_through_stereo_and_melody_models(model, tmp_path, capsys):
    """The same work: none of them refuses the model, and the FLOPs are the plan's."""
    names = ("step", "bare", "seq2seq", "audiocraft")
    rows = benchmark(tmp_path, capsys, "--cases", *names, "save", "--models", model, "--frames", "30")
    *steps, saved = rows
    assert [row["case"] for row in steps] == list(names)
    assert all("failure" not in row for row in steps), steps
    for row in steps:
        flops = row["tera_flops_per_second"] * 1e12 * row["seconds"]
        assert flops == pytest.approx(clip_flops(KNOWN[model], 30, 20), rel=1e-6)
    assert saved["parameters_m"] * 1e6 == KNOWN[model].parameters


@pytest.mark.full
@pytest.mark.parametrize("peer", ["bare", "seq2seq"])
def test_steps_of_ours_and_of_a_peer_are_measured_side_by_side(peer, tmp_path, capsys):
    names = ("step", peer)
    rows = {row["case"]: row for row in benchmark(tmp_path, capsys, "--cases", *names, "--frames", "30")}
    for name in names:
        row = rows[name]
        assert row["frames_per_second"] == pytest.approx(30 / row["seconds"])
        assert row["clips_per_second"] == pytest.approx(1 / row["seconds"])
        assert 0 < row["mfu"] < 2
        assert row["peak_gib"] > 0
    assert rows[peer].get("throughput_of_bare") == (1 if peer == "bare" else None)
    assert (tmp_path / "benchmark.png").stat().st_size > 1000


def test_a_step_is_also_told_as_a_share_of_the_datasheet_where_the_card_is_known():
    """large: 17.9 GFLOPs for each frame, of which an H100 computed 24,800 a second (docs/benchmarks.md)."""
    work = Work(model="large", layers=None, frames=1500, micro_batch=9, precision="bf16")
    share = of_datasheet(work, 9 * 1500 / 24_800, "NVIDIA H100 80GB HBM3")
    assert share == pytest.approx(24_800 * 17.9e9 / 989.4e12, rel=0.01)
    assert of_datasheet(work, 1.0, "NVIDIA GeForce RTX 4090 Laptop GPU") is None and of_datasheet(work, 1.0, "") is None


def test_saving_is_measured(tmp_path, capsys):
    [save] = benchmark(tmp_path, capsys, "--cases", "save", "--frames", "20")
    # Weights and two moments, 4 bytes each; the files' headers come on top.
    assert save["gigabytes"] == pytest.approx(12 * save["parameters_m"] / 1000, rel=0.02)
    assert 0 < save["pause_seconds"] <= save["on_disk_after_seconds"]


@pytest.mark.full
def test_all_that_generate_give_the_same_greedy_codes_and_are_timed(tmp_path, capsys):
    """What is timed beside each other does the same work: ours in each way, transformers' and audiocraft's."""
    asked = generating.Asked(
        model=blown_up(open_model("debug")),
        text_BSD=torch.randn(3, 7, 512, generator=torch.Generator().manual_seed(0)),
        frames=40,
        sampling=Sampling(greedy=True),
    )
    made = {name: make() for name, make in generating.ways(asked).items()}
    for other in made.values():
        steps = equal_steps(asked.model, asked.text_BSD, made["together"], other, guidance=3.0, close=1e-4)
        assert sum(steps) > 60
    flags = ("--suite", "generating", "--frames", "20", "--clips", "3")
    rows = {row["what"]: row for row in benchmark(tmp_path, capsys, *flags)}
    assert list(rows) == list(made)
    assert rows[generating.THEIRS]["codes_of_transformers"] == 1
    assert all(row["codes_per_second"] > 0 for row in rows.values())
    with pytest.raises(SystemExit, match="debug-melody reads melodies"):
        script.main(["--suite", "generating", "--models", "debug-melody", "--out", str(tmp_path)])


@pytest.mark.full
def test_growth_is_measured_against_what_is_computed(tmp_path, capsys):
    rows = benchmark(tmp_path, capsys, "--cases", "growth", "--frames", "20")
    flops = {(row["what"], row["times"]): row["flops"] for row in rows if "times" in row}
    assert flops["clips", 16] == 16
    assert 16 < flops["frames", 16] < 32  # attention grows with the square


@pytest.mark.full
@pytest.mark.timeout(900)  # ten cases, each with processes of its own
def test_every_other_case_runs(tmp_path, capsys):
    flags = ["--clips", "2", "--clip_seconds", "2", "--frames", "50", "--processes", "1", "2"]
    cases = ("audiocraft", "run", "encode", "encode_files", "scan", "epochs", "scale", "start", "flat", "read")
    rows = benchmark(tmp_path, capsys, "--cases", *cases, *flags, "--files", "50")
    assert {row["case"] for row in rows} == set(cases)
    assert all("failure" not in row for row in rows)


@pytest.mark.full
def test_large_data_sets_are_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data_sets, "PREPARED_HOURS", 4.0)
    monkeypatch.setattr(data_sets, "CACHED_CLIPS", 200)
    rows = benchmark(tmp_path, capsys, "--cases", "prepared", "cached")
    opened = next(row for row in rows if "open_seconds" in row)
    assert (opened["hours"], opened["clips"]) == (4.0, 60)
    # 4 views of 4 codebooks at 50 Hz and 2 bytes; the text of 60 captions comes on top.
    assert opened["gigabytes"] == pytest.approx(4 * 3600 * 50 * 4 * 4 * 2 / 1e9 + 60 * 20 * 512 * 4 / 1e9, rel=0.02)
    assert [row["step"] for row in rows if "step" in row] == [100, 400, 1600]
    assert [row["clips"] for row in rows if row["case"] == "cached"] == [200] * 3


@pytest.mark.full
def test_what_a_run_foretells_stands_beside_what_it_takes(tmp_path, capsys):
    rows = benchmark(tmp_path, capsys, "--cases", "forecast", "--layers", "1", "--frames", "50", "--micro_batch", "4")
    found = {row["what"]: row for row in rows}
    assert len(rows) == 6 and all(row["predicted"] > 0 and row["measured"] > 0 for row in rows)
    for what in ("MB of a checkpoint", "MB of the exports"):
        assert found[what]["predicted_of_measured"] == pytest.approx(1, rel=0.02)
    assert found["seconds of the run"]["predicted"] == pytest.approx(12 * found["seconds of a step"]["predicted"])


def test_the_gpu_suite_says_that_it_needs_a_gpu(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        script.main(["--suite", "gpu", "--out", str(tmp_path)])


@pytest.mark.full
def test_the_trainer_without_a_cache_takes_the_mean_over_micro_batches(tmp_path, monkeypatch):
    """Two clips have one gradient, whether they are one micro-batch or two that accumulate."""
    source, folder, gradients = open_model("debug"), tmp_path / "data", []
    write_huggingface(source, source.weights.starting_with(DECODER, PROJECTION), tmp_path / "model", "")
    folder.mkdir()
    for name in ("one", "two"):
        sound = np.random.default_rng(len(gradients)).standard_normal(32_000).astype("float32")
        soundfile.write(folder / f"{name}.wav", sound * 0.1, 32_000)
        (folder / f"{name}.txt").write_text(f"slow {'rock' if name == 'one' else 'techno'}")

    class Recording(torch.optim.AdamW):
        def step(self, closure: Callable[[], float] | None = None) -> None:
            parameters = self.param_groups[0]["params"]
            gradients.append(torch.cat([parameter.grad.flatten() for parameter in parameters]))

    monkeypatch.setattr(torch.optim, "AdamW", Recording)
    for micro_batch in (1, 2):
        encode_each_epoch.main(str(tmp_path / "model"), str(folder), micro_batch, "no", epochs=1)
    accumulated, whole = gradients
    assert torch.linalg.norm(accumulated - whole) < 1e-4 * torch.linalg.norm(whole)
