"""Several sounds at once against each alone, against transformers' own batches, and against multinomial's own draws."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StoppingCriteriaList

from tests.evaluation.test_stereo_and_melody_codes import NOTES, Seen, opened, prefix_of, text_of, whole
from trainer.data.melody_places import melody_places
from trainer.errors import MemoryShortError, ModelError
from trainer.evaluation import static_decoder
from trainer.evaluation.decoding import Decoding
from trainer.evaluation.draws import drawn
from trainer.evaluation.generation import (
    Pace,
    Request,
    Sampling,
    generate_all,
    generate_codes,
    load_for_generation,
)
from trainer.evaluation.in_batches import bytes_of_sound, in_batches
from trainer.model.source import open_model

FRAMES = 12
GREEDY, DRAWN = Sampling(greedy=True), Sampling(top_k=50, temperature=0.9)
# Texts of 5, 9 and 5 tokens, and none: (text, melody).
ASKED = (
    ("slow rock ballad", "chord"),
    ("fast metal with a long guitar solo", "none"),
    (None, "none"),
    ("hard rock ballad", "other"),
    (None, "chord"),
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def requests_of(name: str, given: int = 0, asked: Sequence[tuple[str | None, str]] = ASKED) -> list[Request]:
    """One request for each of `asked`, each with its own seed and prefix."""
    source, _ = opened(name)
    found = []
    for seed, (text, melody) in enumerate(asked):
        prefix_KT = prefix_of(source, given)
        found.append(
            Request(
                text_SD=text_of(name, text),
                generator=torch.Generator().manual_seed(seed),
                prefix_KT=None if prefix_KT is None else (prefix_KT + seed) % 2048,
                melody_C=melody_places(NOTES[melody]) if source.melody else None,
            )
        )
    return found


def made_of(name: str, requests: Sequence[Request], **settings: Any) -> list[Tensor]:
    settings = {"frames": FRAMES, "sampling": DRAWN} | settings
    made = generate_all(opened(name)[1], requests, **settings)
    assert made is not None
    return made


def equal(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(torch.equal(*pair) for pair in zip(some, others, strict=True))


@functools.cache
def alone(name: str, sampling: Sampling, given: int) -> list[Tensor]:
    """The codes of each request by itself."""
    return [made_of(name, [one], sampling=sampling)[0] for one in requests_of(name, given)]


@pytest.mark.numbers
@pytest.mark.parametrize(
    ("name", "sampling", "given"),
    [
        ("debug", DRAWN, 0),
        ("debug", GREEDY, 5),
        ("debug", replace(DRAWN, guidance=1.0), 5),
        ("debug-melody", DRAWN, 5),
        pytest.param("debug-stereo", DRAWN, 5, marks=pytest.mark.full),
        pytest.param("debug-melody", GREEDY, 0, marks=pytest.mark.full),
        pytest.param("debug-stereo-melody", replace(DRAWN, guidance=1.0), 0, marks=pytest.mark.full),
    ],
)
def test_each_sound_of_a_batch_is_the_one_that_its_request_gives_alone(
    name: str, sampling: Sampling, given: int
) -> None:
    requests = requests_of(name, given)
    together, singly = made_of(name, requests, sampling=sampling), alone(name, sampling, given)
    assert equal(together, singly)
    assert len({codes_KT[:, given:].numpy().tobytes() for codes_KT in singly}) == len(ASKED)
    if not sampling.greedy:  # the generators have gone on as far as those of single requests
        again = requests_of(name, given)
        for request in again:
            made_of(name, [request], sampling=sampling)
        states = [[one.generator.get_state() for one in some] for some in (requests, again)]
        assert equal(*states)


def test_one_request_gives_what_its_seed_gives() -> None:
    [request, *_] = requests_of("debug")
    expected = generate_codes(opened("debug")[1], request.text_SD, frames=FRAMES, sampling=replace(DRAWN, seed=0))
    assert expected is not None and equal(made_of("debug", [request]), [expected])


@pytest.mark.numbers
def test_greedy_codes_of_a_batch_are_those_of_transformers_own_batch() -> None:
    """transformers masks the padding of shorter texts, as is done here."""
    source, _ = opened("debug")
    texts, seen = ["slow rock ballad", "fast metal with a long guitar solo", "a"], Seen()
    inputs = source.load_tokenizer()(texts, return_tensors="pt", padding=True)
    special = dict.fromkeys(("bos_token_id", "pad_token_id", "decoder_start_token_id"), 2048)
    whole("debug").generate(
        **inputs, **special, do_sample=False, guidance_scale=3.0, max_new_tokens=FRAMES + 3,
        stopping_criteria=StoppingCriteriaList([seen]),
    )  # fmt: skip
    theirs_BKS = seen.tokens.view(len(texts), 4, -1)
    expected = [torch.stack([of_one[k, 1 + k : 1 + k + FRAMES] for k in range(4)]) for of_one in theirs_BKS]
    requests = requests_of("debug", asked=[(text, "none") for text in texts])
    assert equal(made_of("debug", requests, sampling=GREEDY), expected)


@pytest.mark.numbers
@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("debug", 5),
        ("debug-melody", 5),
        pytest.param("debug", 0, marks=pytest.mark.full),
        pytest.param("debug-melody", 0, marks=pytest.mark.full),
        pytest.param("debug-stereo", 5, marks=pytest.mark.full),
    ],
)
def test_a_static_cache_gives_the_same_codes(name: str, given: int) -> None:
    requests = requests_of(name, given)
    assert equal(made_of(name, requests, decoding=Decoding(static_cache=True)), alone(name, DRAWN, given))


@pytest.mark.full
@pytest.mark.numbers
@pytest.mark.parametrize(("name", "given"), [("debug", 5), ("debug-stereo", 0), ("debug-melody", 5)])
@torch._dynamo.config.patch(recompile_limit=1)  # torch's own is 8: less than three models with several batches have
def test_a_compiled_step_gives_the_same_codes_and_is_compiled_once(name: str, given: int) -> None:
    from torch._dynamo.utils import counters

    decoding = Decoding(static_cache=True, compiled=True)
    static_decoder._compiled_logits.cache_clear()
    torch._dynamo.reset()
    counters.clear()
    assert equal(made_of(name, requests_of(name, given), decoding=decoding), alone(name, DRAWN, given))
    graphs = counters["stats"]["unique_graphs"]
    # A melody model's batches are of two requests, of one and of two. One graph each: nothing runs outside of it.
    assert graphs in ((1,) if "melody" not in name else (2, 3)) and not counters["graph_break"]
    # Another prefix needs no other, nor do longer sounds within the same 256 places, of which 235 are a melody's.
    longer = FRAMES if "melody" in name else 2 * FRAMES
    made_of(name, requests_of(name, given + 1), decoding=decoding, frames=longer)
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("decoding", [Decoding(), Decoding(static_cache=True)])
def test_no_step_brings_numbers_from_the_host_or_waits_for_the_device(decoding: Decoding) -> None:
    """Either would hold up a GPU at each token. Only the draws' q is made on the host, by an operation of its own."""
    operations: list[set[str]] = [set()]

    class Listening(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            operations[-1].add(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    requests = requests_of("debug")
    with Listening():
        made_of("debug", requests, decoding=decoding, should_stop=lambda: operations.append(set()) or False)
    before, first, *steps, last = operations  # in the first one transformers makes its cache
    waiting = {"lift_fresh", "_local_scalar_dense", "nonzero", "_to_copy"}
    assert waiting & before and waiting & last and "exponential_" in first
    assert len(steps) == FRAMES + 1 and not any(waiting & step for step in steps)
    assert all("exponential_" in step for step in steps)


@pytest.mark.parametrize(("name", "guidance"), [("debug", 3.0), ("debug-stereo", 1.0), ("debug-melody", 3.0)])
def test_the_memory_of_a_sound_is_that_of_its_keys_and_values(name: str, guidance: float) -> None:
    [request, *_] = requests_of(name)
    caches: list[Any] = []
    _, model = opened(name)
    handle = model.decoder.register_forward_hook(
        lambda module, args, kwargs, output: caches.append(kwargs["past_key_values"]), with_kwargs=True
    )
    try:
        made_of(name, [request], sampling=replace(DRAWN, guidance=guidance))
    finally:
        handle.remove()
    own = caches[-1] if "melody" in name else caches[-1].self_attention_cache
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in own.layers)
    assert request.text_SD is not None
    texts = 0 if "melody" not in name else len(request.text_SD) * held // own.get_seq_length()
    assert bytes_of_sound(model, FRAMES, guidance) == held - texts


def test_a_compiled_step_without_a_static_cache_is_refused() -> None:
    with pytest.raises(ValueError, match="needs static_cache"):
        Decoding(compiled=True)


def test_a_draw_is_that_of_multinomial_bit_for_bit() -> None:
    probabilities_BKV = torch.randn(3, 8, 2048, generator=torch.Generator().manual_seed(0)).mul(3).softmax(-1)
    probabilities_BKV[1, :, 1000:] = 0
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    others = [torch.Generator().manual_seed(seed) for seed in range(3)]
    for _ in range(5):
        expected = [
            torch.multinomial(rows, 1, generator=other)[:, 0]
            for rows, other in zip(probabilities_BKV, others, strict=True)
        ]
        assert torch.equal(drawn(probabilities_BKV, generators), torch.stack(expected))


@pytest.mark.parametrize("most", [5, 3])
def test_batches_that_do_not_fit_the_memory_are_halved_and_nothing_changes(most: int) -> None:
    """The decoder lacks memory for more than three rows, at the third step: the draws before it are lost."""
    _, model = opened("debug")
    expected, rows, smaller = alone("debug", DRAWN, 0), [], []

    def lack(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        rows.append(len(output))
        if rows[-3:].count(len(output)) == 3 and len(output) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB\nmore words")

    requests = requests_of("debug")
    handle = model.decoder.lm_heads[0].register_forward_hook(lack)
    try:
        made = in_batches(requests, lambda some: made_of("debug", some), most=most, on_smaller=smaller.append)
    finally:
        handle.remove()
    assert made is not None and equal(made, expected)
    assert smaller == ([2, 1] if most == 5 else [1]) and max(rows) > 3
    again = requests_of("debug")
    made_of("debug", again)
    assert equal(*([one.generator.get_state() for one in some] for some in (requests, again)))


def test_memory_that_does_not_suffice_for_one_is_an_error_and_a_stop_leaves_nothing() -> None:
    def lack(some: Sequence[Request]) -> list[Tensor]:
        raise torch.OutOfMemoryError("Tried to allocate 2 GiB")

    with pytest.raises(MemoryShortError, match=r"one sound \(Tried to allocate 2 GiB\): generate fewer seconds"):
        in_batches(requests_of("debug"), lack, most=4)
    assert in_batches(requests_of("debug"), lambda some: None, most=4) is None
    assert in_batches([], lack, most=4) == []


def test_logits_of_one_request_that_are_not_finite_are_an_error() -> None:
    requests = requests_of("debug")
    broken = replace(requests[1], text_SD=torch.full((3, 512), float("nan")))
    with pytest.raises(ModelError, match="logits are NaN or infinite"):
        made_of("debug", [requests[0], broken])


def test_no_step_is_made_once_it_should_stop_in_any_of_the_batches() -> None:
    _, model = opened("debug-melody")
    passes: list[int] = []
    handle = model.decoder.register_forward_hook(lambda *_: passes.append(1))
    try:  # the first batch has FRAMES + 3 steps
        stopped = generate_all(
            model, requests_of("debug-melody"), frames=FRAMES, sampling=DRAWN, should_stop=lambda: len(passes) >= 20
        )
    finally:
        handle.remove()
    assert stopped is None and len(passes) == 20


def test_prefixes_of_different_lengths_are_refused() -> None:
    requests = [requests_of("debug", 2)[0], requests_of("debug", 3)[1]]
    with pytest.raises(ValueError, match=r"different lengths: \[2, 3\] frames"):
        made_of("debug", requests)


def test_the_pace_counts_the_codes_that_were_drawn() -> None:
    pace = Pace()
    assert pace.codes_per_second == 0
    for given in (0, 5):
        made_of("debug", requests_of("debug", given), pace=pace)
    assert pace.codes == len(ASKED) * 4 * (FRAMES + FRAMES - 5)
    assert pace.codes_per_second == pace.codes / pace.seconds > 0


def test_bf16_is_that_of_the_linear_layers_and_auto_takes_it_on_gpus_alone() -> None:
    source, device = open_model("debug"), torch.device("cpu")
    plain, automatic, half = (load_for_generation(source, device, one).language_model for one in ("no", "auto", "bf16"))
    assert {one.dtype for one in (*plain.parameters(), *automatic.parameters())} == {torch.float32}
    expected = copy.deepcopy(plain)
    for module in expected.modules():
        if isinstance(module, nn.Linear):
            module.to(torch.bfloat16)
    for (name, one), other in zip(half.named_parameters(), expected.parameters(), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other), name
    assert half.decoder.lm_heads[0].weight.dtype == torch.bfloat16
    computed_in = set()
    half.decoder.lm_heads[0].register_forward_hook(lambda head, inputs, output: computed_in.add(output.dtype))
    made = generate_all(half, requests_of("debug"), frames=FRAMES, sampling=DRAWN)  # without autocast around it
    with torch.autocast("cpu", torch.bfloat16):
        around = generate_all(expected, requests_of("debug"), frames=FRAMES, sampling=DRAWN)
    assert made is not None and around is not None and equal(made, around) and computed_in == {torch.bfloat16}
