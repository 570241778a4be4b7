"""What recall.json and score.json hold stands in report.html, and nothing that they might hold breaks it."""

from __future__ import annotations

import copy
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import generate
import pytest
import recall as recall_script
import score as score_script
from listening.report_page import remake_report

from tests.report.judged_runs import EQUAL, LENGTHS, add_judgement, recall, score, shares
from tests.report.made_runs import made_run
from tests.report.pages import Page
from tests.report.test_report import HOSTILE
from tests.report.test_run_page import DEFAULTS, OUR_TAGS, PROGRAM
from trainer.errors import EXIT_DONE, EXIT_RESUME
from trainer.report.held_out_score import in_brief as score_in_brief
from trainer.report.held_out_score import score_of
from trainer.report.memorisation import chart_of, in_brief, memorisation_of, verdict_of
from trainer.report.run_facts import RunReader
from trainer.report.run_page import page_of_run, page_of_runs
from trainer.report.run_words import commands_of
from trainer.report.template import percent

HEART, SCORE = "Does it play its clips by heart?", "Measured against held-out music"
ODD: list[Any] = [
    None, True, "x", [], {}, -1, 0.5, 2, 1e308, float("inf"), float("nan"), 10**400, [None, None, None], ["1", 2, 3],
    {"equal": 0.5}, "\ud800", [{}],
]  # fmt: skip


def page_of(run: Path) -> Page:
    return Page(page_of_run(RunReader(run), run, DEFAULTS))


def test_the_sections_hold_the_numbers_of_the_files(tmp_path: Path) -> None:
    page = page_of(add_judgement(made_run(tmp_path / "run", sounds=False)))
    assert HEART in page.text and SCORE in page.text
    for (group, model), all_equal in EQUAL.items():
        for length, equal in zip(LENGTHS, all_equal, strict=True):
            for codebooks, share in (("first_codebook", equal), ("all_codebooks", equal / 2)):
                assert float(page.figures[f"recall/{group}/{model}/{length}/{codebooks}"]) == share
    assert float(page.figures["played/after"]) == (3 * 800 + 700) / (4 * 800)
    assert "3 of 4 clips cannot be told from the original" in page.text
    assert page.text.count("no verdict: the interval holds zero") == 1  # the one whose file says null
    assert "The tuned model is closer to held-out music than the base model" in page.text
    assert "farther from the prompts" in page.text
    assert "-3.10 to -1.40" in page.text and "few sounds." not in page.text.lower()
    assert page.text.index("at 1.5 s, as the clip at 12.0 s") > 0
    assert "fadtk: &lt;b&gt;it&lt;/b&gt; is not installed" in page.text


@pytest.mark.parametrize(
    ("share", "text"),
    [(0, "0 %"), (1e-4, "under 0.1 %"), (0.004, "0.4 %"), (0.71, "71 %"), (0.9999, "over 99 %"), (1, "100 %")],
)
def test_a_share_is_never_shown_as_nothing_or_all_where_it_is_not(share: float, text: str) -> None:
    assert percent(share).replace("\N{NO-BREAK SPACE}", " ") == text


def test_a_run_that_was_not_judged_has_no_such_section(tmp_path: Path) -> None:
    page = page_of(made_run(tmp_path / "run", sounds=False))
    assert HEART not in page.text and SCORE not in page.text


@pytest.mark.parametrize("exported, shown", [(3, True), (6, False)])
def test_figures_of_a_step_that_is_no_longer_exported_are_not_shown(tmp_path: Path, exported: int, shown: bool) -> None:
    run = add_judgement(
        made_run(tmp_path / "run", steps=3, sounds=False), recall=recall() | {"exported_step": 3},
        score=score() | {"exported_step": 3},
    )  # fmt: skip
    (run / "finished.json").write_text(json.dumps({"step": 6, "exported_step": exported}))
    page = page_of(run)
    assert (HEART in page.text) == shown and (SCORE in page.text) == shown


def test_the_list_of_older_versions_still_tells_what_was_played_back(tmp_path: Path) -> None:
    page = page_of(add_judgement(made_run(tmp_path / "run", sounds=False), recall=recall()["played_back"], score={}))
    assert HEART in page.text and "played/after" in page.figures
    assert not any(name.startswith("recall/") for name in page.figures) and SCORE not in page.text


@pytest.mark.parametrize(
    ("after", "control", "kind"),
    [(1.0, 0.02, "heart"), (0.85, 0.02, "heart"), (0.7, 0.02, "free"), (0.015, 0.015, "free"), (1.0, 0.9, "alike")],
)
def test_the_verdict_follows_the_clips_that_come_back_and_the_control(after: float, control: float, kind: str) -> None:
    values = recall()
    for row in values["memorisation"]["rows"]:
        if row["model"] == "after":
            row["first_codebook"] = shares(after if row["group"] == "training" else control)
    found = memorisation_of(values)
    assert found is not None and verdict_of(found)[0] == kind
    said = " ".join(verdict_of(found))
    assert ("10 of 10 training clips" in said) == (kind != "free")
    assert ("warning" in said) == (kind == "heart") and "never learned from" in said


def test_some_clips_known_by_heart_are_told_as_some() -> None:
    values = recall()
    for row in values["memorisation"]["rows"]:
        row["first_codebook"]["partial"] = 0.2 * (row["group"] == "training" and row["model"] == "after")
    found = memorisation_of(values)
    assert found is not None
    kind, headline, said = verdict_of(found)
    assert (kind, headline) == ("partly", "Partly by heart.") and "2 of 10 training clips" in said
    assert in_brief(found).startswith("2 of 10; ")


def test_the_chart_draws_each_share_at_its_height() -> None:
    found = memorisation_of(recall())
    assert found is not None
    drawn = chart_of(found)
    assert drawn is not None
    heights = {value: at for value, at in drawn["ticks"]}
    [line] = [one for one in drawn["lines"] if one["name"] == "training clips, after"]
    for (_, at), equal in zip(line["points"], EQUAL["training", "after"], strict=True):
        share = (heights[0] - at) / (heights[0] - heights[100])
        assert share == pytest.approx(equal, abs=0.001)
    assert [x for x, _ in line["points"]] == sorted({x for x, _ in line["points"]})
    assert [name.replace("\N{NO-BREAK SPACE}", " ") for name, _ in drawn["lengths"]] == [
        "caption alone", "+ 1 s", "+ 5 s", "+ 10 s",
    ]  # fmt: skip
    assert drawn["lines"][-1]["name"] == "chance, after"


@pytest.mark.parametrize(("clips", "generated", "few"), [(60, 120, False), (49, 120, True), (60, 30, True)])
def test_few_sounds_are_warned_of(tmp_path: Path, clips: int, generated: int, few: bool) -> None:
    values = score(clips) | {"generated": generated}
    page = page_of(add_judgement(made_run(tmp_path / "run", sounds=False), score=values))
    assert ("Few sounds." in page.text) == few


def test_where_nothing_can_be_said_the_page_says_so(tmp_path: Path) -> None:
    values = score()
    del values["embeddings"]["clap"]
    values["embeddings"]["encodec"]["distances"]["kad"] |= {"difference": [0.1, -0.2, 0.4], "verdict": None}
    found = score_of(values)
    assert found is not None and found.in_words.startswith("No verdict: the interval of the difference holds zero")
    assert "no verdict: the interval holds zero" in score_in_brief(found)
    only_told = score_of({"not_run": ["clap: no hub"]})
    assert only_told is not None and not only_told.measures and only_told.in_words == ""
    page = page_of(add_judgement(made_run(tmp_path / "run", sounds=False), score={"not_run": ["clap: no hub"]}))
    assert "clap: no hub" in page.text


def changed(values: Any) -> Iterator[Any]:
    """`values` with each of its parts in turn gone, or an odd one in its place."""
    if not isinstance(values, (dict, list)):
        return
    for key in list(values) if isinstance(values, dict) else list(range(min(2, len(values)))):
        for odd in ODD:
            other = copy.copy(values)
            other[key] = odd  # type: ignore[index,call-overload]
            yield other
        if isinstance(values, dict):
            yield {name: value for name, value in values.items() if name != key}
        for inner in changed(values[key]):  # type: ignore[index,call-overload]
            other = copy.copy(values)
            other[key] = inner  # type: ignore[index,call-overload]
            yield other


def test_no_value_in_any_place_of_the_files_is_too_odd(tmp_path: Path) -> None:
    """All of them are read; of those that can be shown, every 400th is written into a page."""
    run = made_run(tmp_path / "run", steps=3, sounds=False)
    cases = [{"recall": one} for one in changed(recall())] + [{"score": one} for one in changed(score())]
    assert len(cases) > 1000
    for number, case in enumerate(cases):
        found, scored = memorisation_of(case.get("recall", {})), score_of(case.get("score", {}))
        for told in (in_brief(found), score_in_brief(scored)):
            assert "nan" not in told and "inf" not in told
        if found is not None:
            verdict_of(found), chart_of(found)
        if number % 400 == 0:
            page = page_of(add_judgement(run, **case))
            assert set(page.tags) <= OUR_TAGS and not re.search(r">-?(nan|inf)\b", page.text)


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff\xfe", b"7", b"null", b'{"memorisation": {"rows'])
def test_a_damaged_file_is_no_file(tmp_path: Path, content: bytes) -> None:
    run = made_run(tmp_path / "run", steps=3, sounds=False)
    for name in ("recall", "score"):
        (run / f"{name}.json").write_bytes(content)
    page = page_of(run)
    assert HEART not in page.text and SCORE not in page.text


def test_hostile_texts_in_the_files_are_shown_as_text(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", steps=3, sounds=False)
    judged, measured = recall(), score()
    judged["remarks"] = HOSTILE
    near = judged["memorisation"]["nearest"]
    judged["memorisation"]["nearest"] = [near[0] | {"prompt": text, "clip": text} for text in HOSTILE]
    judged["played_back"] = [judged["played_back"][0] | {"clip": text} for text in HOSTILE]
    measured["not_run"] = HOSTILE
    page = page_of(add_judgement(run, recall=judged, score=measured))
    assert set(page.tags) <= OUR_TAGS and page.scripts[1:] == [PROGRAM]
    assert not page.handlers and not page.links and page.text.count("javascript:alert(1)//</bdi>") == 5


def test_several_runs_show_what_is_known_of_each(tmp_path: Path) -> None:
    judged = add_judgement(made_run(tmp_path / "a", steps=3, sounds=False))
    bare = made_run(tmp_path / "b", steps=3, sounds=False)
    text = page_of_runs([RunReader(judged), RunReader(bare)], tmp_path)
    assert "training clips played by heart" in text and "10 of 10; 100\N{NO-BREAK SPACE}% of the codes" in text
    assert "KAD, CLAP: 1.90 (base model: 4.20); closer to held-out music" in text
    assert "played by heart" not in page_of_runs([RunReader(bare), RunReader(bare)], tmp_path)


def test_the_page_is_made_again_with_what_was_added_and_warns_where_it_cannot_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made_run(tmp_path / "run", steps=3, sounds=False)
    remake_report(run)
    assert HEART not in (run / "report.html").read_text(encoding="utf-8")
    remake_report(add_judgement(run))
    assert HEART in (run / "report.html").read_text(encoding="utf-8")
    assert capsys.readouterr().out.count(f"the page: {run / 'report.html'}") == 2
    (run / "report.html").unlink()
    (run / "report.html").mkdir()
    (run / "report.html" / "kept").write_text("")
    remake_report(run)
    said = capsys.readouterr()
    assert said.err.startswith("warning: the page") and not said.out
    assert json.loads((run / "recall.json").read_text()) == recall()


def test_a_finished_run_names_the_commands_that_judge_it_until_they_have_run(tmp_path: Path) -> None:
    run = made_run(tmp_path / "my run", steps=20)
    config = json.loads((run / "config.json").read_bytes())
    (run / "config.json").write_text(json.dumps(config | {"output_dir": str(run)}))
    (run / "finished.json").write_text(json.dumps({"step": 20}))

    def told(exit_code: int) -> list[list[str]]:
        commands = commands_of(RunReader(run).read(exit_code=exit_code), DEFAULTS)
        return [shlex.split(command)[1:] for _, command in commands if command.startswith("python ")]

    [compared] = [words[1:] for words in told(EXIT_DONE) if "--compare" in words]
    assert generate.read_flags(compared).compare and generate.read_flags(compared).model == str(run)
    judging = {words[0]: words[1:] for words in told(EXIT_DONE)}
    assert recall_script.read_flags(judging["scripts/recall.py"]).run == str(run)
    assert score_script.read_flags(judging["scripts/score.py"]).run == str(run)
    stopped = " ".join(word for words in told(EXIT_RESUME) for word in words)
    assert "recall.py" not in stopped and "score.py" not in stopped and "--compare" not in stopped
    add_judgement(run)
    assert {"scripts/recall.py", "scripts/score.py"}.isdisjoint({words[0] for words in told(EXIT_DONE)})
    (run / "score.json").unlink()
    without = [text for text in (run / "metrics.jsonl").read_text().splitlines(True) if "validation" not in text]
    (run / "metrics.jsonl").write_text("".join(without))  # nothing was held out: score.py would refuse it
    assert "scripts/score.py" not in {words[0] for words in told(EXIT_DONE)}
