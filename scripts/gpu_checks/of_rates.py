"""The checks of rates: what the plan expects of links, products and steps, beside what a card reaches."""

from __future__ import annotations

from gpu_checks.check import Check

RATES = "tests/gpu/test_rates.py"
CHECKS_OF_RATES: tuple[Check, ...] = (
    Check(
        name="rates: links",
        claim="ranks that share the card measure the same rate, say it once, and free the memory",
        test=f"{RATES}::test_ranks_measure_the_same_rate_of_their_links_say_it_once_and_free_the_memory",
        usual_seconds=45,
        gib=5,
    ),
    Check(
        name="rates: one large product",
        claim="the card reaches the share of its datasheet that the plan expects, within 20 %",
        test=f"{RATES}::test_a_large_product_reaches_the_share_of_the_datasheet_that_the_plan_expects",
        usual_seconds=20,
        alone=True,
    ),
    Check(
        name="time: small",
        claim="a full step takes what its rehearsal and the plan say, within 20 %",
        test="tests/gpu/test_told_time.py::test_the_rehearsal_and_the_plan_foretell_the_time_of_real_steps",
        usual_seconds=60,
        gib=40,
        alone=True,
    ),
)
