"""report.html says what the run's files say, holds the sounds that it should, and escapes what it is given."""

from __future__ import annotations

import base64
import calendar
import io
import json
import os
import re
import shlex
import time
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import generate
import numpy as np
import pytest
import report as report_script
import soundfile

from tests.audio_files import noise
from tests.report.made_runs import CAPTIONS, RATE_HZ, add_sounds, line, made_run, now, validation
from tests.report.pages import Page
from tests.report.test_report import HOSTILE
from trainer.errors import EXIT_DONE, EXIT_RESUME, EXIT_STORAGE, EXIT_USAGE
from trainer.flags.config import Config, parse
from trainer.flags.flag import defaults_of
from trainer.report import run_sounds, template
from trainer.report.run_facts import FAILED, FINISHED, RUNNING, SILENT, STOPPED, RunReader
from trainer.report.run_page import PROGRAMS, page_of_run
from trainer.report.run_words import commands_of
from trainer.run.metrics import reports

PROGRAM = "".join((template.HERE / name).read_text(encoding="utf-8") for name in PROGRAMS)
OUR_TAGS = {
    *("html", "head", "meta", "title", "style", "body", "header", "main", "section", "footer", "h1", "h2", "h3", "p"),
    *("dl", "div", "dt", "dd", "data", "small", "span", "bdi", "strong", "em", "ul", "li", "details", "summary", "a"),
    *("table", "thead", "tbody", "tr", "th", "td", "noscript", "button", "audio", "script", "pre", "code", "svg"),
    *("path", "i", "b", "text", "circle"),
}
DEFAULTS = defaults_of(Config)


def page_of(run: Path, page_folder: Path | None = None, **options: Any) -> Page:
    return Page(page_of_run(RunReader(run), page_folder or run, DEFAULTS, **options))


def test_a_run_that_goes_on_says_when_it_will_end(tmp_path: Path) -> None:
    reader = RunReader(made_run(tmp_path / "run"))
    facts = reader.read(alive=True)
    assert facts.expected_end == pytest.approx(facts.written + 80)
    [end] = re.findall(r"expected end</dt><dd>([\d: -]+) UTC", page_of(tmp_path / "run", alive=True).text)
    minutes = calendar.timegm(time.strptime(end, "%Y-%m-%d %H:%M")) / 60
    assert 0 <= facts.expected_end / 60 - minutes < 2


def inside(page: Page) -> list[bytes]:
    return [base64.b64decode(one["mp3"]) for one in page.data["sounds"] if "mp3" in one]


def linked(page: Page) -> list[str]:
    return [os.fsdecode(unquote_to_bytes(one["link"])) for one in page.data["sounds"] if "link" in one]


def curve(page: Page, title: str, name: str) -> dict[int, float]:
    (chart,) = [one for one in page.data["charts"] if one["title"] == title]
    (series,) = [one for one in chart["series"] if one["name"] == name]
    return dict(zip(series["x"], series["y"], strict=True))


def test_the_numbers_are_those_of_the_metrics(tmp_path: Path) -> None:
    page, lines = page_of(made_run(tmp_path / "run")), reports(tmp_path / "run/metrics.jsonl")
    training = {one["step"]: one for one in lines if "loss" in one}
    validated = {one["step"]: one["validation_loss"] for one in lines if "validation_loss" in one}
    assert {step: one["loss"] for step, one in training.items()} == pytest.approx(curve(page, "Loss", "training"), 1e-5)
    assert validated == pytest.approx(curve(page, "Loss", "validation"), rel=1e-5)
    rates = curve(page, "Learning rate", "learning rate")
    assert {step: one["lr"] for step, one in training.items()} == pytest.approx(rates, rel=1e-5)
    assert float(page.figures["step"]) == 60 and float(page.figures["loss"]) == training[60]["loss"]
    assert float(page.figures["best"]) == min(validated.values()) == validated[40]
    assert [40, "best"] in page.data["charts"][0]["marks"]
    assert "left, at the present pace</dt><dd>80 s" in page.text  # 40 steps of 2 s
    assert "expected end" not in page.text  # nobody knows that it runs
    assert {chart["title"].split(",")[0] for chart in page.data["charts"]} == {
        "Loss", "Loss of each codebook", "Learning rate", "Gradient norm", "Frames per second",
        "Model FLOPs utilisation (MFU)",
    }  # fmt: skip


def test_a_stereo_runs_codebooks_are_pairs_of_a_line_and_a_dashed_one_in_one_colour(tmp_path: Path) -> None:
    """Codebook 2k is the left channel's, 2k + 1 the right one's, as they stand in metrics.jsonl."""
    run = made_run(tmp_path / "run", sounds=False)
    losses = [1.0 + n for n in range(8)]
    (run / "metrics.jsonl").write_text("".join(line(step, loss_per_codebook=losses) for step in range(1, 61)))
    (run / "run.json").write_text(json.dumps(json.loads((run / "run.json").read_text()) | {"channels": 2}))
    page = page_of(run)
    chart = next(chart for chart in page.data["charts"] if chart["title"].startswith("Loss of each codebook"))
    assert [one["name"] for one in chart["series"]] == [f"codebook {n}{side}" for n in (1, 2, 3, 4) for side in "LR"]
    assert [one["y"][0] for one in chart["series"]] == pytest.approx(losses)
    assert [one["colour"] for one in chart["series"]] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [one["kind"] for one in chart["series"]] == ["line", "dashed"] * 4
    assert "path.dashed" in page.text and ".key.dashed" in page.text


def test_base_best_and_newest_are_inside_with_40_more_and_each_sound_decodes(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", steps=500, all_steps=500, every=20)
    page = page_of(run)
    sounds, links = inside(page), linked(page)
    assert len(page.data["sounds"]) == 2 * 26 and len(sounds) == 3 * 2 + 40
    for sound in sounds:
        found = soundfile.info(io.BytesIO(sound))
        assert found.format == "MP3" and found.samplerate == 32_000 and found.duration == pytest.approx(0.2, abs=0.05)
    assert sorted({(run / link).parent.name for link in links}) == [f"step-{step:08d}" for step in (20, 60, 80)]
    assert all((run / link).is_file() for link in links)
    columns = re.findall(r'<th scope="col"(.*?)><bdi>(.*?)</bdi>(.*?)</th>', page.text)
    assert columns[0][:2] == (' class="fixed"', "base model") and columns[1][1] == "step 20"
    assert ">best<" in dict((title, rest) for _, title, rest in columns)["step 40"]
    assert ">newest<" in columns[-1][2] and columns[-1][1] == "step 500"


def test_sounds_that_are_too_long_for_a_page_are_inside_with_their_first_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_sounds, "MOST_BYTES", 90_000)
    monkeypatch.setattr(run_sounds, "SHORTEST_SECONDS", 0.5)
    run = made_run(tmp_path / "run", sounds=False)
    for step in (0, 20, 40, 60):
        add_sounds(run, step, seconds=3.0, rate_hz=16_000)
    page = page_of(run)
    made = inside(page)
    assert len(made) == 6 and sum(4 * len(one) / 3 for one in made) < 90_000  # base, best, newest
    lengths = {round(soundfile.info(io.BytesIO(one)).duration, 1) for one in made}
    assert len(lengths) == 1 and 0.5 <= lengths.pop() < 2 and "the first 1 of 3 s" in page.text
    assert {(run / link).parent.name for link in linked(page)} == {"step-00000020"}


def test_stereo_sounds_play_in_stereo_and_what_follows_a_melody_is_told(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", sounds=False)
    for step, melody in enumerate((True, False, None)):
        folder = add_sounds(run, step, [f"prompt {step}"], **({} if melody is None else {"melody": melody}))
        for file in folder.glob("*.flac"):
            both = np.stack([noise(0.2, RATE_HZ, seed=1), 0.1 * noise(0.2, RATE_HZ, seed=2)], axis=1)
            soundfile.write(file, both, RATE_HZ)
    page = page_of(run)
    for mp3 in inside(page):
        played, _ = soundfile.read(io.BytesIO(mp3))
        loud, soft = np.sqrt(np.square(played).mean(axis=0))
        assert played.shape[1] == 2 and 5 < loud / soft < 20
    assert len(inside(page)) == 3
    assert page.text.count("a given prompt, with the clip&#39;s melody") == 1
    assert page.text.count("a given prompt, without a melody") == 1 and page.text.count("a given prompt, seed") == 1


def test_a_broken_missing_or_refused_sound_is_told_in_its_place(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", sounds=False)
    add_sounds(run, 0, prompts=["one", "two", "three"])
    broken = add_sounds(run, 20, prompts=["one", "two", "three"])
    (broken / "01_sound.flac").write_bytes(b"fLaC but no more")
    (broken / "02_sound.flac").unlink()
    values = json.loads((broken / "samples.json").read_text())
    values["samples"][2] |= {"file": "../../../../secret.flac", "error": None}
    (broken / "samples.json").write_text(json.dumps(values))
    (add_sounds(run, 40) / "samples.json").unlink()  # unfinished
    (add_sounds(run, 60) / "samples.json").write_text('{"samples": [7, {"file": 3}, {}], "st')
    page = page_of(run)
    assert len(page.data["sounds"]) == 3 and page.text.count("its file is missing or no sound") == 2
    assert "it has no file" in page.text and "secret" not in page.text
    titles = re.findall(r'<th scope="col".*?><bdi>(.*?)</bdi>', page.text)
    assert titles == ["base model", "step 20"]


def test_hostile_prompts_names_and_settings_are_shown_as_text(tmp_path: Path) -> None:
    texts = [*HOSTILE, "two\nlines", "", "\ud800"]
    run = made_run(tmp_path / "</title><script>alert(1)<", sounds=False)
    names = [text.replace("/", "|").replace("\0", "0").replace("\ud800", "x")[:80] + ".flac" for text in texts]
    for step in (0, 20):
        add_sounds(run, step, texts, files=names, seconds=0.05, clip="<b>\"'", error=None)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"dataset_path": HOSTILE[2], "output_dir": HOSTILE[0]}))
    page = page_of(run, tmp_path / "elsewhere")
    assert set(page.tags) <= OUR_TAGS and page.tags.count("script") == 2 and page.tags.count("style") == 1
    assert page.scripts[1:] == [PROGRAM] and not page.handlers and not page.links
    assert "<" not in page.scripts[0] and "\u2028" not in page.scripts[0]
    assert len(page.data["sounds"]) == 2 * len(texts)
    outside = page_of_run(RunReader(run), tmp_path / "elsewhere", DEFAULTS)
    assert not re.search(r"https?:", outside) and "default-src 'none'" in outside


def test_links_lead_from_the_page_to_odd_names_wherever_the_page_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_sounds, "MOST_OTHERS", 0)
    run = made_run(tmp_path / "my #1 run?", sounds=False)
    for step in (0, 20, 40, 60):
        add_sounds(run, step, ["one"], files=["01_50% #1?.flac"])
    (run / "dataset.html").write_text("")
    page = page_of(run, tmp_path / "pages/deep")
    (link,) = linked(page)
    assert (tmp_path / "pages/deep" / link).resolve() == run / "samples/step-00000020/01_50% #1?.flac"
    assert re.fullmatch(r"[\w.~%/-]+", page.data["sounds"][1]["link"], re.ASCII)
    assert page.links == ["../../my%20%231%20run%3F/dataset.html"]


def test_a_run_is_running_silent_stopped_finished_or_failed_by_what_its_folder_holds(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", sounds=False)

    def state(**options: Any) -> str:
        return RunReader(run).read(**options).state

    assert state() == SILENT and state(alive=True) == RUNNING
    assert state(exit_code=EXIT_DONE) == FINISHED and state(exit_code=EXIT_RESUME) == STOPPED
    for code, expected in ((0, FINISHED), (75, STOPPED), (1, FAILED), (6, FAILED)):
        (run / "exit_code").write_text(f"{code}\n")
        assert state() == expected
        assert f"{expected}</span>" in page_of(run).text
    (run / "exit_code").unlink()
    (run / "finished.json").write_text('{"step": 60, "exported_step": 40, "reason": "early stop"}')
    assert state() == FINISHED and "It ended early" in page_of(run).text and "step 40, the best" in page_of(run).text
    ended = {"step": 60, "exported_step": 60, "reason": "early stop", "steps": 100, "early_stop": 3}
    (run / "finished.json").write_text(json.dumps(ended))
    assert "It ended early after step 60 of 100: 3 validations in a row were no better" in page_of(run).text
    assert "with a larger --early_stop, or without it, goes on." in page_of(run).text
    (run / "finished.json").write_text('{"step": 50}')  # of before it went on
    with (run / "metrics.jsonl").open("a") as file:
        file.write(line(61, time=now()))
    assert state() == RUNNING


def test_folders_of_older_versions_and_garbled_files_have_a_page(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run")
    (run / "run.json").unlink()
    facts = RunReader(run).read()
    assert facts.steps == 100 and facts.resumes == []  # 10 epochs of 10 steps, by the pace of the epochs
    for name in ("config.json", "plan.json", "run.json", "dataset.json", "best.json", "finished.json", "exit_code"):
        (run / name).write_bytes(b'{"step": \xff\0')
    assert "60" in page_of(run).figures["step"]
    (tmp_path / "empty").mkdir()
    page = page_of(tmp_path / "empty")
    assert page.figures == {"step": "0"} and page.data["charts"] == []


def test_a_share_of_the_speed_is_drawn_for_a_gpu_alone(tmp_path: Path) -> None:
    run, titles = made_run(tmp_path / "run", sounds=False), list[set[str]]()
    for on_gpu in (True, False):
        (run / "plan.json").write_text(json.dumps({"on_gpu": on_gpu}))
        titles.append({chart["title"] for chart in page_of(run).data["charts"]})
    assert titles[0] - titles[1] == {"Model FLOPs utilisation (MFU)"} and len(titles[1]) == 5


def test_starts_that_went_on_are_marked(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run")
    starts = [{"start_step": step} for step in (0, 20, 45)]
    (run / "run.json").write_text(json.dumps({"steps": 100, "starts": starts}))
    assert page_of(run).data["charts"][1]["marks"] == [[20, "resumed"], [45, "resumed"]]


def test_the_command_that_goes_on_asks_for_the_same_run(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run")
    typed = [
        "--dataset", "my music; rm -rf $HOME", "--lr", "3e-4", "--use_cfg", "--validation", "0.1", "--output_dir",
        "it's", "--sample_every", "50", "--sample_prompts", 'a "b" | `c`', "--epochs", "7",
    ]  # fmt: skip
    config, _ = parse(typed)
    (run / "config.json").write_text(json.dumps(config.to_dict()))
    command = commands_of(RunReader(run).read(), DEFAULTS)[0][1]
    words = shlex.split(command)
    assert words[:2] == ["python", "launch.py"] and parse(words[2:])[0] == config


def test_the_command_that_listens_asks_for_the_first_sound_of_the_newest_step(tmp_path: Path) -> None:
    run = made_run(tmp_path / "my run", steps=20)
    add_sounds(run, 60, ["", "it's; slow rock"], seconds=0.3, seed=7)
    listed = run / "samples/step-00000060/samples.json"
    listed.write_text(json.dumps(json.loads(listed.read_bytes()) | {"guidance": 1.0, "temperature": 0.9, "top_k": 1}))
    config = json.loads((run / "config.json").read_bytes())
    (run / "config.json").write_text(json.dumps(config | {"output_dir": str(run)}))
    (run / "checkpoints/step-00000020").mkdir(parents=True)
    (run / "checkpoints/step-00000020/checkpoint.json").write_text("{}")

    def told(exported: int) -> dict[str, list[str]]:
        (run / "finished.json").write_text(json.dumps({"step": 20, "exported_step": exported}))
        commands = commands_of(RunReader(run).read(exit_code=EXIT_DONE), DEFAULTS)
        return {command.split()[1]: shlex.split(command)[2:] for _, command in commands if "python " in command}

    asked = generate.read_flags(told(20)["scripts/generate.py"])
    assert (asked.model, asked.prompt, asked.seed, asked.seconds) == (str(run), ["it's; slow rock"], 7, 0.3)
    assert (asked.guidance, asked.temperature, asked.top_k) == (1, 0.9, 1)
    of_checkpoint = generate.read_flags(told(10)["scripts/generate.py"])  # the last of such commands
    assert of_checkpoint.model == str(run / "checkpoints/step-00000020") and of_checkpoint.seed == 7
    request = report_script.read_request(told(20)["scripts/report.py"])
    assert request.runs == [str(run)] and request.blind


@pytest.mark.parametrize("melody", [False, True])
def test_the_lines_of_python_name_the_class_of_the_models_kind(tmp_path: Path, melody: bool) -> None:
    run = made_run(tmp_path / "run")
    (run / "run.json").write_text(json.dumps(json.loads((run / "run.json").read_text()) | {"melody": melody}))
    (run / "finished.json").write_text(json.dumps({"step": 20}))
    told = dict(commands_of(RunReader(run).read(exit_code=EXIT_DONE), DEFAULTS))
    kind = "MusicgenMelodyForConditionalGeneration" if melody else "MusicgenForConditionalGeneration"
    lines = told["Load the exported model in Python."]
    assert f"import {kind}\n" in lines and f"= {kind}.from_pretrained(" in lines
    assert any("--melody FILE" in why for why in told) is melody


@pytest.mark.parametrize(
    ("start", "said"),
    [
        ({"parameters": 2_700_000, "codec_fitted_clips": 10}, "fitted to the 10 clips it was made from"),
        ({"parameters": 2_700_000, "codec_fitted_clips": None}, "tiny model: 2.7 million"),
        ({"parameters": 420_000_000, "codec_fitted_clips": None}, None),
    ],
)
def test_what_nobody_should_expect_is_said(tmp_path: Path, start: dict[str, object], said: str | None) -> None:
    run = made_run(tmp_path / "run")
    (run / "run.json").write_text(json.dumps(start))
    text = page_of(run).text
    assert ("What you cannot expect" in text) == (said is not None) and (said or "") in text


def test_several_runs_are_shown_side_by_side_with_what_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = made_run(tmp_path / "a/run"), made_run(tmp_path / "b/run", steps=40)
    config = json.loads((second / "config.json").read_text())
    (second / "config.json").write_text(json.dumps(config | {"lr": 5e-5, "output_dir": "other"}))
    goal = tmp_path / "pages/sweep.html"
    assert report_script.main([str(first), str(second), "--output", str(goal)]) == EXIT_DONE
    page = Page(goal.read_text(encoding="utf-8"))
    assert set(page.tags) <= OUR_TAGS and page.scripts[1:] == [PROGRAM]
    assert "--lr" in page.text and "5e-05" in page.text and "--output_dir" not in page.text
    assert set(curve(page, "Validation loss", "b/run")) == {20, 40}
    assert set(curve(page, "Training loss, smoothed", "a/run")) == set(range(1, 61))
    assert (float(page.figures["0/best"]), float(page.figures["1/best"])) == (3.0, 3.0)
    titles = re.findall(r'<th scope="col"[^>]*><bdi>(.*?)</bdi> ?<span class="remark', page.text)
    assert titles == ["base model", "a/run", "a/run", "b/run"]  # the best and the newest; one is both
    assert len(inside(page)) == 4 * len(CAPTIONS)
    assert str(goal) in capsys.readouterr().out


def test_the_script_writes_into_the_run_and_refuses_what_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made_run(tmp_path / "run")
    assert report_script.main([str(run)]) == EXIT_DONE and (run / "report.html").is_file()
    assert not list(run.glob("*.partial")) and not list(run.glob(".*.partial"))
    assert report_script.main([str(tmp_path / "absent")]) == EXIT_USAGE
    (tmp_path / "music").mkdir()
    assert report_script.main([str(tmp_path / "music")]) == EXIT_USAGE
    assert "holds no run" in capsys.readouterr().err
    assert report_script.main([str(run), "--output", str(run / "metrics.jsonl/page.html")]) == EXIT_STORAGE
    assert report_script.main([]) == EXIT_USAGE


@pytest.mark.full
def test_a_page_of_200_sounds_and_100_000_steps_has_less_than_10_megabytes(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", sounds=False)
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(1, 100_001):
            file.write(line(step))
            if step % 10 == 0:
                file.write(validation(step, 3 + 1 / step))
    for number in range(50):
        add_sounds(run, 2000 * number, [f"prompt {n}" for n in range(4)], seconds=10.0)
    assert len(page_of(run).text.encode()) < 10e6
    for number in range(3):
        add_sounds(run, 2000 * number + 1, [f"prompt {n}" for n in range(4)], seconds=120.0)
    page = page_of(run)
    assert len(page.text.encode()) < 10e6 and all(
        len(series["x"]) <= 2_000 for chart in page.data["charts"] for series in chart["series"]
    )


def test_the_clip_itself_stands_beside_the_sounds_of_its_caption(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run")
    clip = next(run.glob("samples/step-*/*.flac")).read_bytes()
    (run / "samples/clips").mkdir()
    (run / "samples/clips/song.flac").write_bytes(clip)
    for listed in run.glob("samples/step-*/samples.json"):
        values = json.loads(listed.read_text())
        values["samples"][0] |= {"clip": "song.wav", "origin": "caption", "clip_file": "song.flac"}
        values["samples"][1]["clip_file"] = "../step-00000000/01_sound.flac"  # leads elsewhere: it is none of ours
        listed.write_text(json.dumps(values))
    before = len(inside(page_of(made_run(tmp_path / "without"))))
    page = page_of(run)
    assert page.text.index("base model") < page.text.index("the clip itself") < page.text.index("step 20")
    assert len(inside(page)) == before + 1
