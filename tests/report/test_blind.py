"""The listening page: its sounds are equally loud, their order is drawn, and nothing at a glance tells them apart."""

from __future__ import annotations

import base64
import io
import itertools
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyloudnorm
import pytest
import soundfile

from tests.report.runs_with_samples import PROMPTS, RATE_HZ, sample, sound, write_run, write_step
from trainer.errors import DataError
from trainer.report.blind import (
    HIGHEST_PEAK,
    LOUDEST_LUFS,
    MOST_BYTES,
    QUIETEST_LUFS,
    BlindPage,
    blind_page,
    equally_loud,
    hidden,
    orders_of,
)
from trainer.report.blind_sides import matched, sides_of

HOSTILE = "</script><script>document.title=666</script><img src=x onerror='document.title=666'>&amp;\u2028"


def page_of_run(run: Path, *, seed: int = 0, **options: Any) -> BlindPage:
    sides = sides_of([run])
    return blind_page(sides, matched(sides)[0], seed=seed, **options)


class Parsed(HTMLParser):
    """The elements of a page, and the text of its scripts."""

    def __init__(self, page: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(page)
        self.data = json.loads(self.scripts[0])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] == "script":
            self.scripts[-1] += data


def key_of(data: dict[str, Any]) -> dict[str, Any]:
    """What blind.js makes of the hidden key."""
    mask = itertools.cycle(data["page"].encode())
    return json.loads(bytes(sign ^ next(mask) for sign in base64.b64decode(data["key"])))


def heard(mp3: str) -> np.ndarray:
    samples, rate_hz = soundfile.read(io.BytesIO(base64.b64decode(mp3)))
    assert rate_hz == RATE_HZ
    return samples


def loudness(samples: np.ndarray) -> float:
    return pyloudnorm.Meter(RATE_HZ).integrated_loudness(samples)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("blind") / "run_of_anna", (0, 120))


@pytest.fixture(scope="module")
def page(run: Path) -> BlindPage:
    return page_of_run(run)


@pytest.mark.parametrize("sides", [2, 3, 6])
def test_each_side_is_at_each_place_equally_often_and_the_seed_alone_decides(sides: int) -> None:
    for prompts, seed in itertools.product((1, 5, 8, 12, 13), range(20)):
        orders = orders_of(sides, prompts, seed)
        assert orders == orders_of(sides, prompts, seed) and len(orders) == prompts
        assert all(sorted(order) == list(range(sides)) for order in orders)
        for place in range(sides):
            counts = Counter(order[place] for order in orders)
            assert {counts[side] for side in range(sides)} <= {prompts // sides, -(-prompts // sides)}


def test_other_seeds_give_other_orders_and_no_prompt_tells_the_next() -> None:
    drawn = Counter(tuple(orders_of(2, 4, seed)) for seed in range(600))
    # Two of four prompts start with each side: 6 ways, each as likely. Chi squared with 5 degrees of freedom, 1e-6.
    assert len(drawn) == 6 and sum((count - 100) ** 2 / 100 for count in drawn.values()) < 36.2
    assert len({tuple(orders_of(3, 6, seed)) for seed in range(50)}) > 30


def test_the_sounds_of_a_prompt_are_equally_loud_and_not_clipped(page: BlindPage) -> None:
    for prompt in Parsed(page.text).data["prompts"]:
        sounds = [heard(mp3) for mp3 in prompt["sounds"]]
        measured = [loudness(one) for one in sounds]
        assert max(measured) - min(measured) < 0.5 and prompt["even"]
        assert QUIETEST_LUFS - 0.5 < measured[0] < LOUDEST_LUFS + 0.5
        assert max(np.abs(one).max() for one in sounds) < 1


def test_where_peaks_limit_one_sound_the_others_follow_it_down() -> None:
    clicks = sound(1).copy() * np.float32(0.3)
    clicks[5_000::9_000] = 0.9
    leveled, even = equally_loud([clicks, sound(2)])
    measured = [loudness(one) for one in leveled]
    assert even and abs(measured[0] - measured[1]) < 0.1 and measured[0] < LOUDEST_LUFS - 1
    assert np.abs(leveled[0]).max() == pytest.approx(HIGHEST_PEAK, rel=1e-4)


def test_both_channels_of_a_stereo_sound_have_one_gain_and_it_is_as_loud_as_the_others(tmp_path: Path) -> None:
    left, right = sound(0), 0.25 * sound(1)
    write_step(tmp_path / "run", 0, [np.stack([left, right], axis=1)], [sample("rock", melody=True)])
    write_step(tmp_path / "run", 5, [sound(2, gain=0.2)], [sample("rock", melody=False)])  # mono, and so on both sides
    page = page_of_run(tmp_path / "run")
    assert "not all sides follow a melody: 1 prompt" in matched(sides_of([tmp_path / "run"]))[1]
    [prompt] = Parsed(page.text).data["prompts"]
    sounds = [heard(mp3) for mp3 in prompt["sounds"]]
    assert {one.shape[1] for one in sounds} == {2} and len({len(mp3) for mp3 in prompt["sounds"]}) == 1
    assert abs(loudness(sounds[0]) - loudness(sounds[1])) < 0.5
    ratios = sorted(float(np.sqrt(np.square(one[:, 1]).sum() / np.square(one[:, 0]).sum())) for one in sounds)
    whole = float(np.sqrt(np.square(right).sum() / np.square(left).sum()))
    assert ratios == pytest.approx(sorted([whole, 1.0]), rel=0.05)


def test_a_sound_without_loudness_is_left_as_it_is_and_said_to_be_uneven() -> None:
    click = np.zeros(RATE_HZ, np.float32)
    click[100] = 0.5
    for odd in (np.zeros(RATE_HZ, np.float32), sound(1, seconds=0.3), click):
        leveled, even = equally_loud([odd, sound(2)])
        assert not even and np.abs(leveled[0]).max() <= HIGHEST_PEAK * 1.0001
        assert QUIETEST_LUFS - 0.1 < loudness(leveled[1]) < LOUDEST_LUFS + 0.1


def test_every_sound_is_there_whole_and_behind_the_place_that_the_key_says(run: Path, page: BlindPage) -> None:
    data = Parsed(page.text).data
    key = key_of(data)
    assert [side["step"] for side in key["sides"]] == [0, 120]
    assert [one["text"] for one in data["prompts"]] == list(PROMPTS)
    for prompt, places in zip(data["prompts"], key["prompts"], strict=True):
        assert sorted(behind["side"] for behind in places) == [0, 1]
        for mp3, behind in zip(prompt["sounds"], places, strict=True):
            step = key["sides"][behind["side"]]["step"]
            original, _ = soundfile.read(run / f"samples/step-{step:08d}" / behind["file"])
            coded = heard(mp3)
            assert len(coded) == len(original)
            assert np.corrcoef(coded, original)[0, 1] > 0.9  # of other pieces it is below 0.1


def test_nothing_in_the_source_tells_which_sound_is_of_which_step(run: Path) -> None:
    pages = [page_of_run(run, seed=seed).text for seed in range(4)]
    for text in pages:
        without_sounds = re.sub(r"[A-Za-z0-9+/=]{200,}", "", text)
        assert not re.search(r"run_of_anna|step-0|before training|flac|step 120|\"side\":\d", without_sounds)
        lengths = [[len(mp3) for mp3 in prompt["sounds"]] for prompt in Parsed(text).data["prompts"]]
        assert all(len(set(of_prompt)) == 1 for of_prompt in lengths)
    firsts = {tuple(places[0]["side"] for places in key_of(Parsed(text).data)["prompts"]) for text in pages}
    assert len(firsts) > 1
    assert len({Parsed(text).data["page"] for text in pages}) == 4  # so that judgements of one are not read by another


def test_sounds_of_different_length_are_cut_to_the_shortest(tmp_path: Path) -> None:
    for step, seconds in ((0, 1.0), (60, 1.5)):
        write_step(tmp_path, step, [sound(step, seconds=seconds)], [sample("x")])
    [prompt] = Parsed(page_of_run(tmp_path).text).data["prompts"]
    assert [len(heard(mp3)) for mp3 in prompt["sounds"]] == [RATE_HZ, RATE_HZ]


def test_hostile_prompts_and_names_stay_text(tmp_path: Path) -> None:
    run = write_run(tmp_path / "<img src=x onerror=alert(1)>", (0, 60), [HOSTILE, "x"])
    parsed = Parsed(page_of_run(run).text)
    assert parsed.data["prompts"][0]["text"] == HOSTILE and len(parsed.scripts) == 2
    assert not {tag for tag, _ in parsed.elements} & {"img", "iframe", "link", "object"}
    assert not [name for _, values in parsed.elements for name in values if name.startswith("on") or name == "src"]
    assert key_of(parsed.data)["sides"][0]["name"].startswith("<img src=x onerror=alert(1)>, step 0")


def test_the_page_may_load_nothing_and_run_nothing_but_its_program(page: BlindPage) -> None:
    parsed = Parsed(page.text)
    [policy] = [values["content"] for tag, values in parsed.elements if values.get("http-equiv")]
    assert policy and policy.startswith("default-src 'none'") and "http" not in policy and "media-src data:;" in policy
    assert "http" not in re.sub(r"[A-Za-z0-9+/=]{200,}", "", page.text).replace("http-equiv", "")


def test_a_page_stays_below_its_budget_by_fewer_prompts_whose_order_is_balanced(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", (0, 60), [f"prompt {n}" for n in range(9)], seconds=0.6)
    one = len(page_of_run(run, most_bytes=MOST_BYTES).text)
    page = page_of_run(run, most_bytes=one - 20_000)
    data = Parsed(page.text).data
    assert 4 <= page.prompts < 9 and len(page.text.encode()) <= one - 20_000
    assert f"only the first {page.prompts} of 9 prompts are inside" in page.notes[-1]
    assert key_of(data)["notes"] == list(page.notes)
    firsts = sum(places[0]["side"] for places in key_of(data)["prompts"])
    assert firsts in (page.prompts // 2, -(-page.prompts // 2))
    with pytest.raises(DataError, match="the sounds of one prompt alone exceed"):
        page_of_run(run, most_bytes=61_000)


def test_a_sound_that_cannot_be_read_costs_its_prompt_and_not_the_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", (0, 60), ["a", "b"])
    (run / "samples/step-00000060/01_sound.flac").write_bytes(b"no sound")
    page = page_of_run(run)
    assert [one["text"] for one in Parsed(page.text).data["prompts"]] == ["b"]
    assert "a sound cannot be read" in page.notes[0] and "01_sound.flac" in page.notes[0]
    (run / "samples/step-00000060/02_sound.flac").unlink()
    with pytest.raises(DataError, match=r"no sound of any prompt can be read.*01_sound\.flac"):
        page_of_run(run)


def test_sides_that_sound_exactly_the_same_are_told(tmp_path: Path) -> None:
    for step in (0, 60):
        write_step(tmp_path, step, [sound(1), sound(2 + step)], [sample("x"), sample("y")])
    assert page_of_run(tmp_path).notes == ("exactly the same sound on all sides: 1 of 2 prompts",)


def test_the_hidden_key_is_no_text_that_a_glance_reads() -> None:
    key = {"sides": [{"name": "run, step 0"}]}
    text = hidden(key, "0123456789abcdef")
    assert key_of({"page": "0123456789abcdef", "key": text}) == key
    assert b"step" not in base64.b64decode(text)
