"""Damaged headers of every format: a fault that says so, or facts, and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.sound_formats import FORMATS, chirp, encoded
from trainer.data import audio
from trainer.data.audio_fault import FAULT_KINDS, AudioFault

WHOLE = {name: encoded(format, chirp(0.1, format.rate_hz)) for name, format in FORMATS.items()}
# Edits (place, byte), most of them in the header, others anywhere, as a share of the file; and how much of it is left.
HEADER = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6)
ANYWHERE = st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=8)), max_size=3)
LEFT = st.one_of(st.just(1.0), st.floats(0, 1))


def judge(name: str, header: list[tuple[int, int]], anywhere: list[tuple[float, bytes]], left: float) -> None:
    """Inspect and stream a damaged file. A traceback fails the test, a hang its time limit."""
    data = bytearray(WHOLE[name])
    for place, byte in header:
        data[min(place, len(data) - 1)] = byte
    for share, piece in anywhere:
        at = round(share * (len(data) - len(piece)))
        data[at : at + len(piece)] = piece
    damaged = bytes(data[: max(1, round(left * len(data)))])
    try:
        facts = audio.inspect(damaged)
        assert 0 < facts.seconds < 1e5 and facts.channels >= 1
    except AudioFault as fault:
        assert fault.fate in FAULT_KINDS and fault.detail and fault.detail.isprintable()
        return
    assert sum(map(len, audio.stream(damaged, facts.sample_rate_hz))) == round(facts.seconds * facts.sample_rate_hz)


@pytest.mark.parametrize("name", ["w64", "caf", "m4a"])
def test_sizes_of_64_bits_that_lead_beyond_any_file_give_facts_or_a_fault(name: str) -> None:
    for at in range(0, 160, 4):
        for size in (2**63 - 1, 2**63, 2**64 - 1):
            for order in ("little", "big"):
                judge(name, list(zip(range(at, at + 8), size.to_bytes(8, order), strict=True)), [], 1.0)


@settings(max_examples=600, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(name=st.sampled_from(sorted(FORMATS)), header=HEADER, anywhere=ANYWHERE, left=LEFT)
def test_a_damaged_header_gives_facts_or_a_fault(
    name: str, header: list[tuple[int, int]], anywhere: list[tuple[float, bytes]], left: float
) -> None:
    judge(name, header, anywhere, left)


@pytest.mark.full
@settings(max_examples=25_000, derandomize=False, deadline=None, suppress_health_check=list(HealthCheck))
@given(name=st.sampled_from(sorted(FORMATS)), header=HEADER, anywhere=ANYWHERE, left=LEFT)
def test_many_damaged_headers_give_facts_or_a_fault(
    name: str, header: list[tuple[int, int]], anywhere: list[tuple[float, bytes]], left: float
) -> None:
    judge(name, header, anywhere, left)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(start=st.sampled_from([WHOLE[name][:16] for name in sorted(WHOLE)]), rest=st.binary(max_size=600))
def test_noise_behind_any_magic_number_gives_a_fault(start: bytes, rest: bytes) -> None:
    try:
        audio.inspect(start + rest)
    except AudioFault as fault:
        assert fault.detail.isprintable()
