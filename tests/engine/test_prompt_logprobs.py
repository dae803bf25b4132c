"""Logprobs of prompts, and what else happens to logits around the draw."""

from __future__ import annotations

import pytest
import torch
from tilestream.engine import sampling_shards
from tilestream.engine.engine import Engine
from tilestream.engine.logits import token_logprobs
from tilestream.engine.request import TokenLogprobs
from tilestream.ops import sample
from tilestream.sampling_params import SamplingParams

from .fakes import run_all, text_of, tokens_of
from .random_model import EOS, SPECIAL, VOCAB_SIZE, RandomModel, make_engine
from .test_constraints import PROMPT, run

SCORE = SamplingParams(max_tokens=0, prompt_logprobs=2)


def expected(prompt: list[int], num_top: int) -> list[TokenLogprobs]:
    entries = []
    for position, token_id in enumerate(prompt[1:]):
        logprobs = RandomModel.logits(prompt[position], position).log_softmax(-1)
        top = logprobs.topk(num_top)
        pairs = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        entries.append(TokenLogprobs(token_id, float(logprobs[token_id]), pairs))
    return entries


def scored(engine: Engine, prompt: list[int], params: SamplingParams = SCORE) -> list[TokenLogprobs]:
    return run(engine, [params], [prompt])[0][0].prompt_logprobs


@pytest.mark.parametrize("length", [1, 2, 32, 33, 64, 65, 200])
@pytest.mark.parametrize("overlaps", [False, True])
def test_scoring(length: int, overlaps: bool) -> None:
    engine = make_engine()
    engine.runner.overlaps = overlaps
    prompt = [(7 * i) % 250 for i in range(length)]
    (delta,) = run(engine, [SCORE], [prompt])[0]
    assert delta.prompt_logprobs == expected(prompt, 2)
    assert (delta.token_ids, delta.text, delta.finish_reason, delta.num_output_tokens) == ([], "", "length", 0)


def test_beside_generation() -> None:
    """Only the first delta has them, and neither the tokens nor anyone else's change."""
    plain = SamplingParams(max_tokens=9, seed=4, logprobs=1)
    both = SamplingParams(max_tokens=9, seed=4, logprobs=1, prompt_logprobs=0)
    prompts = [PROMPT, [*PROMPT, 9], [*PROMPT, *range(90)]]
    alone = [run(make_engine(), [plain], [prompt])[0] for prompt in prompts]
    mixed = run(make_engine(), [both, plain, both], prompts)
    assert [tokens_of(deltas) for deltas in mixed] == [tokens_of(deltas) for deltas in alone]
    assert [[d.logprobs for d in deltas] for deltas in mixed] == [[d.logprobs for d in deltas] for deltas in alone]
    assert mixed[0][0].prompt_logprobs == expected(prompts[0], 0) and mixed[2][0].prompt_logprobs == expected(prompts[2], 0)
    assert all(delta.prompt_logprobs is None for deltas in mixed for delta in deltas[1:] + mixed[1])


def test_a_cached_prefix_is_scored_all_the_same() -> None:
    engine = make_engine()
    prompt = PROMPT * 3
    assert scored(engine, prompt) == scored(engine, prompt) == expected(prompt, 2)
    assert run(engine, [SamplingParams(max_tokens=1)], [prompt])[0][0].num_cached_tokens > 0


def test_preempted_prompts_are_scored_once() -> None:
    engine = make_engine(kv_cache_tokens=16 * 12, max_model_len=180, token_budget=16)
    params = [SamplingParams(max_tokens=60, seed=i, prompt_logprobs=1, ignore_eos=True) for i in range(4)]
    prompts = [[50 + i] * (30 + 20 * i) for i in range(4)]
    answers = run(engine, params, prompts)
    assert engine.scheduler.num_preemptions > 0
    for deltas, prompt in zip(answers, prompts, strict=True):
        assert deltas[0].prompt_logprobs == expected(prompt, 1)


def test_a_prompt_that_is_preempted_halfway_is_scored_once() -> None:
    """Ten decodes leave little of the budget to a long prompt, and in the end no page."""
    engine = make_engine(kv_cache_tokens=16 * 32, max_model_len=300, token_budget=14, enable_prefix_caching=False)
    for i in range(10):
        engine.add_request(str(i), [30 + i] * 5, SamplingParams(max_tokens=100, ignore_eos=True, seed=i))
    prompt = list(range(150))
    engine.add_request("scored", prompt, SCORE)
    request, most_computed, computed_again = engine._requests["scored"], 0, False
    deltas = []
    while engine.has_work():
        deltas += [delta for delta in engine.step() if delta.request_id == "scored"]
        most_computed = max(most_computed, request.num_computed_tokens)
        computed_again |= 0 < request.num_computed_tokens < most_computed and request.lacks_prompt_logprobs
    assert computed_again
    assert deltas[-1].prompt_logprobs == expected(prompt, 2)


def test_few_rows_of_logits_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling_shards, "SCORED_ROWS", 8)
    engine, sizes = make_engine(), []
    logits_of = engine.runner.model.logits_of
    engine.runner.model.logits_of = lambda rows: sizes.append(rows.size(0)) or logits_of(rows)
    prompt = list(range(60))
    assert scored(engine, prompt) == expected(prompt, 2)
    assert max(sizes) == 8 and sum(sizes) >= 59


def test_logprobs_are_those_of_the_sample_op() -> None:
    logits = torch.randn(5, 1000, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(5)
    drawn = sample(
        logits,
        ones,
        torch.zeros(5, dtype=torch.int32),
        ones,
        torch.zeros(5),
        torch.arange(5),
        torch.arange(5),
        num_top_logprobs=4,
    )
    logprobs, top_ids, top_logprobs = token_logprobs(logits, drawn.tokens, 4)
    torch.testing.assert_close(logprobs, drawn.logprobs)
    torch.testing.assert_close(top_logprobs, drawn.top_logprobs)
    assert torch.equal(top_ids, drawn.top_ids)


def test_logit_bias() -> None:
    wanted, banned = 65, 66
    (only,) = run(make_engine(), [SamplingParams(max_tokens=8, logit_bias={wanted: 100})])
    assert tokens_of(only) == [wanted] * 8
    ban_most = {token: -100 for token in range(VOCAB_SIZE) if token not in (wanted, banned)}
    (two,) = run(make_engine(), [SamplingParams(max_tokens=60, seed=1, logit_bias=ban_most)])
    assert set(tokens_of(two)) == {wanted, banned}
    (one,) = run(make_engine(), [SamplingParams(max_tokens=60, seed=1, logit_bias=ban_most | {banned: -100})])
    assert set(tokens_of(one)) == {wanted}
    with pytest.raises(ValueError, match=f"logit_bias names token {VOCAB_SIZE}; token ids are 0..{VOCAB_SIZE - 1}"):
        make_engine().add_request("x", PROMPT, SamplingParams(logit_bias={VOCAB_SIZE: 1}))


def test_min_tokens() -> None:
    likely = {EOS[0]: 50, EOS[1]: 60, 7: 40}
    (ended,) = run(make_engine(), [SamplingParams(max_tokens=20, logit_bias=likely, min_tokens=1)])
    assert len(tokens_of(ended)) == 2 and ended[-1].finish_reason == "stop"
    (later,) = run(make_engine(), [SamplingParams(max_tokens=20, logit_bias=likely, min_tokens=6)])
    assert tokens_of(later) == [7] * 6 + [EOS[1]]
    stops = SamplingParams(max_tokens=20, logit_bias=likely, min_tokens=6, stop_token_ids=[7, 10**6], ignore_eos=True)
    (stopped,) = run(make_engine(), [stops])
    assert tokens_of(stopped)[:6] == [EOS[1]] * 6 and stopped[-1].stop_reason is None


def test_min_tokens_holds_stop_strings_back() -> None:
    a = {ord("a"): 100}
    (deltas,) = run(make_engine(), [SamplingParams(max_tokens=20, logit_bias=a, min_tokens=6, stop="aa")])
    assert text_of(deltas) == "aaaaaa" and len(tokens_of(deltas)) == 8 and deltas[-1].stop_reason == "aa"


def test_special_tokens_show_on_request() -> None:
    fields = {"max_tokens": 2, "logit_bias": {SPECIAL: 100}}
    hidden, shown = run(make_engine(), [SamplingParams(**fields), SamplingParams(**fields, skip_special_tokens=False)])
    assert text_of(hidden) == "" and text_of(shown) == "<special><special>"


def test_a_prompt_is_scored_to_its_end_before_an_abort_or_not_at_all() -> None:
    engine = make_engine(token_budget=16)
    engine.add_request("x", PROMPT, SCORE)
    engine.step()
    assert engine.abort("x").token_ids == []
    assert not run_all(engine)
