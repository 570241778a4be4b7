"""generate_codes against transformers' whole MusicGen, and against a slow loop over the language model."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import Tensor, nn
from transformers import EncodecModel, MusicgenForConditionalGeneration

from trainer.errors import ModelError
from trainer.evaluation.generation import Sampling, WholeModel, generate_codes, load_for_generation, text_states
from trainer.model.delay_pattern import inputs_and_labels
from trainer.model.source import open_model

CPU = torch.device("cpu")
FRAMES, CODEBOOKS = 24, 4
PROMPT = "slow rock ballad"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> WholeModel:
    """The debug model, with an output that depends on all it reads: as it is, codes are nearly the seed's."""
    model = load_for_generation(open_model("debug"), CPU)
    for layer in model.language_model.decoder.model.decoder.layers:
        for attention in (layer.self_attn, layer.encoder_attn):
            attention.out_proj.weight.mul_(30)
    for head in model.language_model.decoder.lm_heads:
        head.weight.mul_(10)
    return model


@pytest.fixture(scope="module")
def theirs(model: WholeModel) -> MusicgenForConditionalGeneration:
    """transformers' own model of the same parts."""
    config = copy.deepcopy(open_model("debug").config)
    with torch.device("meta"):
        whole = MusicgenForConditionalGeneration(config)
    whole.decoder, whole.enc_to_dec_proj = model.language_model.decoder, model.language_model.enc_to_dec_proj
    whole.text_encoder, whole.audio_encoder = model.text_encoder, model.codec
    return whole.eval()


def states_of(model: WholeModel, prompt: str = PROMPT) -> Tensor | None:
    return text_states(model.text_encoder, model.tokenizer, prompt)


def codes_of(model: WholeModel, prompt: str = PROMPT, **arguments: object) -> Tensor:
    made = generate_codes(model.language_model, states_of(model, prompt), frames=FRAMES, **arguments)
    assert made is not None
    return made


def their_codes(
    theirs: MusicgenForConditionalGeneration,
    model: WholeModel,
    monkeypatch: pytest.MonkeyPatch,
    sampling: Sampling,
    prompt: str = PROMPT,
    *,
    autocast: bool = False,
    given: int = 0,
    **inputs: object,
) -> Tensor:
    """What the whole model hands to its codec after `generate`; `given` of its frames come from `inputs`."""
    handed: list[Tensor] = []

    class Decoded(Exception):
        pass

    def note(codec: EncodecModel, codes: Tensor, **_: object) -> None:
        handed.append(codes)
        raise Decoded

    monkeypatch.setattr(EncodecModel, "decode", note)
    inputs |= dict(model.tokenizer([prompt], return_tensors="pt"))
    if not prompt:
        inputs = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
        inputs |= dict(theirs.get_unconditional_inputs(1))
    else:
        inputs["guidance_scale"] = sampling.guidance
    if not sampling.greedy:
        inputs |= {"temperature": sampling.temperature, "top_k": sampling.top_k}
    special = theirs.config.decoder.pad_token_id
    inputs |= dict.fromkeys(("bos_token_id", "pad_token_id", "decoder_start_token_id"), special)
    with torch.random.fork_rng(devices=[]), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        torch.manual_seed(sampling.seed)
        with pytest.raises(Decoded):
            theirs.generate(**inputs, do_sample=not sampling.greedy, max_new_tokens=FRAMES + CODEBOOKS - 1 - given)
    monkeypatch.undo()
    return handed[0][0, 0]


@pytest.mark.parametrize("given", [0, 1, 7])
@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize(("prompt", "guidance"), [(PROMPT, 1.0), (PROMPT, 3.0), ("", 3.0)])
def test_codes_are_those_of_transformers_whole_model(
    prompt: str,
    guidance: float,
    greedy: bool,
    given: int,
    model: WholeModel,
    theirs: MusicgenForConditionalGeneration,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sampling = Sampling(guidance=guidance, greedy=greedy, temperature=0.9, top_k=50, seed=7)
    prefix = torch.randint(0, 2048, (CODEBOOKS, given), generator=torch.Generator().manual_seed(3))
    inputs = {"decoder_input_ids": prefix} if given else {}
    expected = their_codes(theirs, model, monkeypatch, sampling, prompt, given=given, **inputs)
    made = codes_of(model, prompt, sampling=sampling, prefix_KT=prefix if given else None)
    assert made.dtype == torch.int64 and made.shape == (CODEBOOKS, FRAMES) and made.max() < 2048
    assert torch.equal(made, expected) and torch.equal(made[:, :given], prefix)
    another = codes_of(model, "fast metal", sampling=sampling, prefix_KT=prefix)
    assert not torch.equal(another, made), "the text has no effect on this model, so that this test shows nothing"


def test_a_sound_is_continued_as_transformers_continues_it(
    model: WholeModel, theirs: MusicgenForConditionalGeneration, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames, sampling = 9, Sampling(seed=1)
    sound = 0.1 * torch.randn(1, 1, frames * 640, generator=torch.Generator().manual_seed(0))
    codes = model.codec.encode(sound).audio_codes[0, 0]
    expected = their_codes(theirs, model, monkeypatch, sampling, given=frames, input_values=sound)
    assert torch.equal(codes_of(model, sampling=sampling, prefix_KT=codes), expected)
    assert torch.equal(expected[:, :frames], codes)


@pytest.mark.parametrize("given", [0, 7])
def test_a_bf16_model_under_autocast_gives_the_codes_that_transformers_gives_of_it(
    given: int, theirs: MusicgenForConditionalGeneration, model: WholeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, sampling = copy.deepcopy(theirs), Sampling(seed=2)
    for part in (whole.decoder, whole.enc_to_dec_proj):
        for module in part.modules():
            if isinstance(module, nn.Linear):
                module.to(torch.bfloat16)
    language_model = copy.deepcopy(model.language_model)
    language_model.decoder, language_model.enc_to_dec_proj = whole.decoder, whole.enc_to_dec_proj
    states, prefix = states_of(model), torch.arange(CODEBOOKS * given).reshape(CODEBOOKS, given)
    # T5 runs inside of their generate, where autocast would reach it.
    monkeypatch.setattr(whole.text_encoder, "forward", _outside_of_autocast(whole.text_encoder.forward))
    inputs = {"decoder_input_ids": prefix} if given else {}
    computed_in = set()
    whole.decoder.lm_heads[0].register_forward_hook(lambda head, inputs, output: computed_in.add(output.dtype))
    with pytest.MonkeyPatch.context() as patch:
        expected = their_codes(whole, model, patch, sampling, autocast=True, given=given, **inputs)
    with torch.autocast("cpu", torch.bfloat16):
        made = generate_codes(language_model, states, frames=FRAMES, sampling=sampling, prefix_KT=prefix)
    assert made is not None and torch.equal(made, expected)
    assert computed_in == {torch.bfloat16}


def _outside_of_autocast(forward):
    def run(*arguments, **named):
        with torch.autocast("cpu", enabled=False):
            return forward(*arguments, **named)

    return run


@pytest.mark.parametrize("given", [0, 5])
@pytest.mark.parametrize("prompt", [PROMPT, ""])
@torch.no_grad()
def test_a_slow_loop_over_the_language_model_gives_the_same_greedy_codes(
    prompt: str, given: int, model: WholeModel
) -> None:
    prefix = torch.arange(CODEBOOKS * given).reshape(CODEBOOKS, given)
    made = codes_of(model, prompt, sampling=Sampling(guidance=1.0, greedy=True), prefix_KT=prefix)
    states, special = states_of(model, prompt), 2048
    text, mask = (
        (torch.zeros(1, 1, model.language_model.enc_to_dec_proj.in_features), torch.zeros(1, 1))
        if states is None
        else (states[None], torch.ones(1, 1))
    )
    # The whole sequence is read again for every step, so nothing is cached; step t predicts frame t - k of codebook k.
    codes = torch.full((1, CODEBOOKS, FRAMES + CODEBOOKS - 1), special)
    codes[0, :, :given] = prefix
    for step in range(given, FRAMES + CODEBOOKS - 1):
        inputs, _ = inputs_and_labels(codes, special)
        logits_K = model.language_model(inputs[..., : step + 1], text, mask.expand(1, text.shape[1]))[0, :, -1]
        for k in range(CODEBOOKS):
            if given <= step - k < FRAMES:
                codes[0, k, step - k] = logits_K[k].argmax()
    assert torch.equal(made, codes[0, :, :FRAMES])


def test_codes_depend_on_nothing_that_was_generated_before_and_disturb_no_random_state(model: WholeModel) -> None:
    alone = codes_of(model, sampling=Sampling(seed=5))
    torch.manual_seed(11)
    random.seed(11)
    states = torch.get_rng_state(), random.getstate()
    codes_of(model, "fast metal", sampling=Sampling(seed=6))
    assert torch.equal(codes_of(model, sampling=Sampling(seed=5)), alone)
    assert not torch.equal(codes_of(model, sampling=Sampling(seed=6)), alone)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]


def test_the_random_state_is_restored_where_it_is_stopped_too(model: WholeModel) -> None:
    answers = iter([False, False, True])
    states = torch.get_rng_state(), random.getstate()
    stopped = generate_codes(
        model.language_model, None, frames=FRAMES, sampling=Sampling(), should_stop=lambda: next(answers)
    )
    assert stopped is None
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]


@pytest.mark.parametrize("before", [0, 1, 5])
def test_no_token_is_made_once_it_should_stop(before: int, model: WholeModel) -> None:
    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    handle = model.language_model.decoder.register_forward_hook(count)
    try:
        made = generate_codes(
            model.language_model,
            states_of(model),
            frames=FRAMES,
            sampling=Sampling(),
            should_stop=lambda: passes >= before,
        )
    finally:
        handle.remove()
    assert made is None and passes == before


def test_what_never_stops_is_the_same_as_without_asking(model: WholeModel) -> None:
    asked = codes_of(model, sampling=Sampling(), should_stop=lambda: False)
    assert torch.equal(asked, codes_of(model, sampling=Sampling()))


@pytest.mark.parametrize(
    ("frames", "prefix"),
    [(3, None), (10, (CODEBOOKS, 10)), (10, (CODEBOOKS, 11)), (10, (CODEBOOKS - 1, 2)), (10, (1, CODEBOOKS, 2))],
)
def test_too_few_frames_and_a_prefix_that_does_not_fit_are_refused(
    frames: int, prefix: tuple[int, ...] | None, model: WholeModel
) -> None:
    codes = None if prefix is None else torch.zeros(prefix, dtype=torch.int64)
    with pytest.raises(ValueError, match="frames"):
        generate_codes(model.language_model, None, frames=frames, sampling=Sampling(), prefix_KT=codes)


def test_text_states_are_those_of_t5_alone_and_no_text_has_none(model: WholeModel) -> None:
    tokens = model.tokenizer([PROMPT], return_tensors="pt")
    with torch.no_grad():
        expected = model.text_encoder(**tokens).last_hidden_state[0]
    with torch.autocast("cpu", torch.bfloat16):
        states = states_of(model)
    assert states is not None and torch.equal(states, expected)
    assert states_of(model, "") is None and states_of(model, " \t") is None


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_an_error_with_a_name(model: WholeModel, broken: float, greedy: bool) -> None:
    damaged = copy.deepcopy(model.language_model)
    damaged.decoder.lm_heads[2].weight[5] = broken
    with pytest.raises(ModelError, match="logits are NaN or infinite"):
        generate_codes(damaged, None, frames=FRAMES, sampling=Sampling(greedy=greedy))
