"""What the links between ranks and one large product reach on a GPU; links without one over gloo."""

from __future__ import annotations

import math

import pytest
import torch

from tests.gpu.one_card import backend, run_ranks, say_figure

pytestmark = pytest.mark.timeout(300)


def links() -> tuple[float, str, int]:
    """What this rank measures, what it says of it, and the bytes that it holds of its device afterwards."""
    import contextlib
    import io
    import os

    from trainer.engine import Ranks, find_cluster, meet, own_device, say_link_rate
    from trainer.engine.link_rate import link_rate
    from trainer.plan.launcher import read_launch

    launch = read_launch(os.environ)
    device = own_device(launch)
    meet(device, 1.0)
    with Ranks(timeout_seconds=60) as ranks, contextlib.redirect_stdout(io.StringIO()) as said:
        rate = link_rate(device, ranks, 2**22)
        say_link_rate(find_cluster(launch), device, ranks)
        ranks.wait("the end")
    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    return rate, said.getvalue(), held


def test_ranks_measure_the_same_rate_of_their_links_say_it_once_and_free_the_memory() -> None:
    rates, said, held = zip(*run_ranks(2, links), strict=True)
    say_figure(f"{backend()}: {rates[0] / 1e9:.3g} GB/s between 2 ranks; {said[0].strip()}")
    assert rates[0] == rates[1] and 0 < rates[0] < math.inf
    assert said[1] == "" and held == (0, 0)
    assert said[0].startswith("links: ") if torch.cuda.is_available() else said[0] == ""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_large_product_reaches_the_share_of_the_datasheet_that_the_plan_expects() -> None:
    from trainer.engine.matmul_rate import matmul_rate, rate_in_words
    from trainer.plan.rates import gpu_of

    device = torch.device("cuda", 0)
    gpu = gpu_of(torch.cuda.get_device_properties(device).name)
    if gpu is None:
        pytest.skip("a card that the table of rates has not")
    rate = matmul_rate(device, "bf16")
    say_figure(f"{rate_in_words(rate, device, 'bf16')}; the plan expects {gpu.flops_per_second('bf16') / 1e12:.4g}")
    assert rate == pytest.approx(gpu.flops_per_second("bf16"), rel=0.2)
