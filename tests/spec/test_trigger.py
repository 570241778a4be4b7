"""The phrase that stands in every caption."""

from __future__ import annotations

import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.spec.trigger import Place, Trigger, in_a_shell, why_no_trigger


@pytest.mark.parametrize(
    ("place", "caption", "expected"),
    [
        ("before", "slow rock", "in my-style, slow rock"),
        ("after", "slow rock", "slow rock, in my-style"),
        ("after", "Slow rock.", "Slow rock. in my-style"),
        ("after", "slow rock, ", "slow rock, in my-style"),
        ("before", None, "in my-style"),
        ("after", "  ", "in my-style"),
        ("before", "Rock In  My-Style, slow", "Rock In  My-Style, slow"),
        ("before", "rock in my-styles", "in my-style, rock in my-styles"),
        ("after", "begin my-style", "begin my-style, in my-style"),
    ],
)
def test_the_phrase_is_put_where_it_is_not_yet(place: Place, caption: str | None, expected: str) -> None:
    assert Trigger(text="in my-style", place=place).put_into(caption) == expected


def test_a_phrase_is_found_however_its_accents_are_stored() -> None:
    assert Trigger(text="caf\u00e9", place="before").put_into("slow cafe\u0301 rock") == "slow cafe\u0301 rock"


@pytest.mark.parametrize(
    ("caption", "rest"),
    [
        ("in my-style, slow rock", "slow rock"),
        ("slow rock, IN my-style", "slow rock"),
        ("slow rock, in my-style, with guitar", "slow rock, with guitar"),
        ("slow rock in my-style with in my-style guitar", "slow rock with guitar"),
        ("in my-style", ""),
        ("slow  rock ,x", "slow  rock ,x"),
    ],
)
def test_the_phrase_is_taken_out_with_its_comma(caption: str, rest: str) -> None:
    assert Trigger(text="in my-style", place="before").taken_out_of(caption) == rest


PHRASES = st.text(min_size=1, max_size=12).map(lambda text: " ".join(text.split())).filter(
    lambda text: why_no_trigger(text) is None
)


@settings(max_examples=150, derandomize=True, deadline=None)
@given(text=PHRASES, caption=st.text(max_size=40), place=st.sampled_from(["before", "after"]))
def test_putting_the_phrase_in_again_changes_nothing(text: str, caption: str, place: Place) -> None:
    trigger = Trigger(text=text, place=place)
    put = trigger.put_into(caption)
    assert trigger.put_into(put) == put
    assert trigger.put_into(trigger.taken_out_of(put)).strip()


@pytest.mark.parametrize("prompt", ["in my-style, ...", "A$AP, ...", 'the "band", ...', "`id`, it's! \\n ..."])
def test_a_shell_gives_back_the_prompt_that_is_shown(prompt: str) -> None:
    script = f"printf %s {in_a_shell(prompt)}"
    shown = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert shown.stdout == prompt
