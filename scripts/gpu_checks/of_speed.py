"""The checks of speed: steps, encoding and saving, as scripts/benchmark.py measures them."""

from __future__ import annotations

from gpu_checks.check import Check

SPEED = "tests/gpu/test_speed.py"
ENCODING = "tests/gpu/test_encoding_speed.py"
GENERATING = "tests/gpu/test_generating.py"
CHECKS_OF_SPEED: tuple[Check, ...] = (
    *(
        Check(
            name=f"the step: {size}",
            claim="frames per second, MFU and peak as the plan would run it",
            test=f"{SPEED}::test_the_step_as_the_plan_would_run_it[{size}]",
            usual_seconds=75,
            gib=75,
            alone=True,
        )
        for size in ("large", "medium", "stereo-medium", "melody", "small")
    ),
    *(
        Check(
            name=f"the step: {size} beside a bare loop",
            claim="throughput of our step, eager and as planned, against transformers' decoder with fused AdamW alone",
            test=f"{SPEED}::test_the_step_beside_a_bare_loop[{size}-{clips}]",
            usual_seconds=110,
            gib=75,
            alone=True,
        )
        for size, clips in (("medium", 8), ("large", 4), ("small", 16))
    ),
    Check(
        name="encoding",
        claim="seconds of sound per second into the cache, against EnCodec alone",
        test=f"{SPEED}::test_encoding_beside_encodec_alone",
        usual_seconds=60,
        gib=20,
        alone=True,
    ),
    Check(
        name="encoding: shared passes",
        claim="tracks that share EnCodec's passes have the codes of each alone, in any order",
        test=f"{ENCODING}::test_tracks_that_share_passes_have_the_codes_of_each_alone_on_a_gpu",
        usual_seconds=45,
        gib=12,
    ),
    Check(
        name="encoding: shared passes in stereo",
        claim="both channels of tracks that share EnCodec's passes have the codes of each alone",
        test=f"{ENCODING}::test_both_channels_of_tracks_that_share_passes_have_the_codes_of_each_alone_on_a_gpu",
        usual_seconds=60,
        gib=12,
    ),
    Check(
        name="melodies",
        claim="notes are those of a CPU; seconds for an hour of audio, of melodies and of codes in stereo beside mono",
        test=f"{ENCODING}::test_melodies_are_those_of_a_cpu_and_found_in_seconds",
        usual_seconds=45,
        gib=8,
        alone=True,
    ),
    Check(
        name="encoding: an hour",
        claim="seconds for an hour of audio and view, from wav and mp3, against EnCodec alone; its peak is the plan's",
        test=f"{ENCODING}::test_an_hour_of_audio_is_encoded_in_seconds",
        usual_seconds=75,
        gib=8,
        alone=True,
    ),
    Check(
        name="generating: equal codes",
        claim="small's greedy codes are equal: one by one, batched, static, compiled, transformers' own, audiocraft's",
        test=f"{GENERATING}::test_all_ways_give_the_same_greedy_codes",
        usual_seconds=120,
        gib=12,
    ),
    Check(
        name="generating: small",
        claim="codes per second batched, static, compiled, beside transformers' own generate and audiocraft's",
        test=f"{GENERATING}::test_the_pace_of_each_way",
        usual_seconds=240,
        gib=20,
        alone=True,
    ),
    Check(
        name="saving",
        claim="how long a checkpoint of medium holds up the steps",
        test=f"{SPEED}::test_a_checkpoint_beside_the_steps",
        usual_seconds=70,
        gib=75,
        alone=True,
    ),
)
