"""What links reach is measured by all ranks together, and is the same number on each."""

from __future__ import annotations

import math

import pytest
import torch

from tests.ranks.harness import run_ranks


def measured(size: int) -> tuple[float, str]:
    """What this rank measures over gloo, and what it is told on a CPU, where nothing is measured."""
    import contextlib
    import io

    from tests.plan.test_plan import cpus
    from trainer.engine import Ranks, meet, say_link_rate
    from trainer.engine.link_rate import link_rate

    meet(torch.device("cpu"), 1.0)
    with Ranks(timeout_seconds=60) as ranks:
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            say_link_rate(cpus(ranks.world_size), torch.device("cpu"), ranks)
        rate = link_rate(torch.device("cpu"), ranks, size)
        ranks.wait("the end")
    return rate, said.getvalue()


def test_every_rank_measures_the_same_finite_rate_and_a_cpu_is_told_nothing() -> None:
    rates, said = zip(*run_ranks(2, measured, 2**20), strict=True)
    assert rates[0] == rates[1] and 0 < rates[0] < math.inf
    assert said == ("", "")


def test_a_large_product_is_told_beside_the_datasheet(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from trainer.engine.matmul_rate import rate_in_words

    names = iter(["NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3", "another"])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name=next(names)))
    told = [rate_in_words(745e12, torch.device("cuda", 0), precision) for precision in ("bf16", "no", "bf16")]
    assert told == [
        "one large product: 745 TFLOP/s measured, of 989.4 by the datasheet",
        "one large product: 745 TFLOP/s measured, of 67 by the datasheet",
        "one large product: 745 TFLOP/s measured",
    ]
