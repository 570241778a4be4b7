"""Which sounds of which runs a listening page compares, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.report.runs_with_samples import PROMPTS, sample, sound, write_run, write_step
from trainer.errors import ConfigError, DataError
from trainer.report.blind_sides import matched, sides_of


def steps_of(*runs: Path, steps: list[str] | None = None) -> list[int]:
    return [side.step for side in sides_of(runs, steps or [])]


def test_one_run_is_heard_before_training_and_as_it_is_exported(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert steps_of(run) == [0, 120]
    (run / "best.json").write_text('{"step": 60, "validation_loss": 3.2}')
    assert steps_of(run) == [0, 60]
    (run / "best.json").write_text('{"step": 75, "validation_loss": 3.2}')  # of which there are no samples
    assert steps_of(run) == [0, 120]
    (run / "best.json").write_text('{"step": 60, "validation_loss": 3.2}')
    (run / "finished.json").write_text('{"step": 120, "exported_step": 120}')  # by --export last
    assert steps_of(run) == [0, 120]
    (run / "finished.json").write_text('{"step": 60, "exported_step": 0}')  # of before it went on
    assert steps_of(run) == [0, 60]


def test_several_runs_are_heard_at_their_last_steps_under_names_that_differ(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / one / "models", steps) for one, steps in (("a", (0, 60)), ("b", (0, 120)))]
    assert [side.name for side in sides_of(runs)] == ["a/models, step 60", "b/models, step 120"]


def test_steps_are_numbers_best_and_last(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "best.json").write_text('{"step": 60, "validation_loss": 3.2}')
    assert steps_of(run, steps=["0", "best", "last"]) == [0, 60, 120]
    assert steps_of(run, steps=["last", "60", "best"]) == [120, 60]  # best is 60 already


def test_an_unfinished_step_and_replaced_ones_do_not_count(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", (0, 60))
    (run / "samples/step-00000120").mkdir()
    (run / "samples/replaced-1/step-00000180").mkdir(parents=True)
    assert steps_of(run) == [0, 60]


def test_what_cannot_be_compared_is_refused_with_what_would_work(tmp_path: Path) -> None:
    run, one_step = write_run(tmp_path / "run"), write_run(tmp_path / "one", (120,))
    (tmp_path / "empty").mkdir()
    cases = [
        ([tmp_path / "absent"], [], "is no folder"),
        ([tmp_path / "empty"], [], "train with --sample_every N"),
        ([one_step], [], "only one side to listen to, one, step 120, and no other step has samples"),
        ([run], ["60"], "as in --steps 60,120"),
        ([run], ["0", "61"], "only of 0, 60, 120"),
        ([run], ["0", "best"], "no best.json"),
        ([run], ["0", "-1"], "is no step"),
        ([run], ["0", ""], "is no step"),
        ([run, tmp_path / "x/../run"], [], "is given twice"),
    ]
    for runs, steps, said in cases:
        with pytest.raises(ConfigError) as refusal:
            sides_of(runs, steps)
        assert said in str(refusal.value)
    with pytest.raises(ConfigError, match="9 sounds of each prompt are too many"):
        sides_of([write_run(tmp_path / name, prompts=[""]) for name in "xyz"], ["0", "60", "120"])


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2}, {"format": "x"}, {"samples": None}, {"step": "x"}, {"top_k": None},
        {"samples": [sample("x") | {"file": "../01.flac"}]}, {"samples": [sample("x") | {"file": 1}]},
        {"samples": [{"file": "x"}]}, {"samples": [sample("x", continued_seconds=float("nan")) | {"file": "x"}]},
    ],
)  # fmt: skip
def test_a_list_of_samples_that_is_not_as_it_should_be_is_named(tmp_path: Path, change: dict) -> None:
    run = write_run(tmp_path / "run", (0, 60), ["x"])
    path = run / "samples/step-00000060/samples.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | change))
    with pytest.raises(DataError, match=r"step-00000060/samples\.json is no list of samples in version 1"):
        sides_of([run])


def test_prompts_are_matched_by_text_seed_and_what_is_continued(tmp_path: Path) -> None:
    run = tmp_path / "run"
    asked = [sample("a"), sample("a", seed=1), sample("b"), sample("b"), sample("c")]
    going_on = [sample("a", origin="continuation", clip=clip, continued_seconds=1.0) for clip in ("x.wav", "y.wav")]
    write_step(run, 0, [sound(n) for n in range(6)], [*asked, going_on[0]])
    # In another order, with what is not on the other side, and with a sound that failed.
    others = [going_on[0], going_on[1], sample("b"), sample("a", seed=1), sample("a", seed=2), sample("b"), sample("c")]
    write_step(run, 60, [*(sound(n) for n in range(6)), np.zeros(0)], others, guidance=1.0)
    sides = sides_of([run])
    prompts, notes = matched(sides)
    assert [(one.text, one.seed, one.clip) for one in prompts] == [
        ("a", 1, None), ("b", 0, None), ("b", 0, None), ("a", 0, "x.wav"),
    ]  # fmt: skip
    assert [[file.name[:2] for file in one.files] for one in prompts] == [
        ["02", "04"], ["03", "03"], ["04", "06"], ["06", "01"],
    ]  # fmt: skip
    assert notes == [
        "4 prompts left out: not on all sides with the same seed",
        "the sides also differ in guidance: 3 for run, step 0 (before training), 1 for run, step 60",
    ]


def test_sides_without_a_prompt_in_common_are_refused(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, (60,), [name]) for name in ("one", "two")]
    with pytest.raises(DataError, match=r"no prompt has a sound on all.*'one' with seed 0.*same --sample_prompts"):
        matched(sides_of(runs))


def test_all_prompts_of_like_sides_are_compared_without_a_note(tmp_path: Path) -> None:
    prompts, notes = matched(sides_of([write_run(tmp_path / "run")]))
    assert tuple(one.text for one in prompts) == PROMPTS and notes == []
