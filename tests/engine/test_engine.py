"""One request's life, and what goes wrong in it: each fault ends that request or step, and nothing else."""

from __future__ import annotations

import time

import pytest
from tilestream.engine.engine import Engine
from tilestream.engine.errors import EngineDeadError, PromptTooLongError, QueueFullError
from tilestream.engine.request import RequestOptions
from tilestream.sampling_params import SamplingParams

from .fakes import EOS, GREEDY, expected_output, make_engine, run_all, text_of, tokens_of

HELLO = list(b"hello")


def run_one(script: bytes | list[int], *, prompt: list[int] = HELLO, config: dict | None = None, **params: object):
    """All deltas of one request that draws `script`."""
    engine = make_engine({"r": list(script)}, **(config or {}))
    engine.add_request("r", prompt, SamplingParams(**{"max_tokens": None, **params}))
    return run_all(engine)["r"]


def test_tokens_stream_one_a_step() -> None:
    engine = make_engine()
    engine.add_request("r", HELLO, GREEDY)
    deltas = run_all(engine)["r"]
    assert [len(delta.token_ids) for delta in deltas] == [1] * 8
    assert tokens_of(deltas) == expected_output(HELLO, GREEDY, 0, 8)
    assert text_of(deltas).encode() == bytes(tokens_of(deltas))
    assert [delta.num_output_tokens for delta in deltas] == list(range(1, 9))
    assert [delta.finish_reason for delta in deltas] == [None] * 7 + ["length"]
    last = deltas[-1]
    assert (last.num_prompt_tokens, last.num_cached_tokens, last.error, last.stop_reason) == (5, 0, None, None)
    assert last.arrival_s <= last.first_scheduled_s <= last.first_token_s <= last.finish_s
    assert not engine.has_work() and engine.step() == []


@pytest.mark.parametrize(
    ("script", "params", "text", "num_tokens", "stop_reason"),
    [
        ([*b"ab", EOS], {}, "ab", 3, None),
        (b"abc", {"stop_token_ids": (ord("c"),)}, "ab", 3, ord("c")),
        (b"abc", {"stop_token_ids": (ord("c"),), "include_stop_str_in_output": True}, "abc", 3, ord("c")),
        (b"ab<>", {"stop": "<>"}, "ab", 4, "<>"),
        (b"ab<>", {"stop": ["x", "<>"], "include_stop_str_in_output": True}, "ab<>", 4, "<>"),
        ([*b"a<", EOS], {"stop": "<>"}, "a<", 3, None),  # what was held back comes at the end
        ([0xE2, 0x82, EOS], {}, "\ufffd", 3, None),
        (b"abc", {"stop": "c", "max_tokens": 3}, "ab", 3, "c"),  # stop wins over length
    ],
)
def test_stop(script, params: dict, text: str, num_tokens: int, stop_reason) -> None:
    deltas = run_one(script, **params)
    last = deltas[-1]
    assert (text_of(deltas), last.num_output_tokens) == (text, num_tokens)
    assert (last.finish_reason, last.stop_reason, last.error) == ("stop", stop_reason, None)


def test_ignore_eos() -> None:
    deltas = run_one([*b"a", EOS, *b"b"], ignore_eos=True, max_tokens=3)
    assert (text_of(deltas), deltas[-1].finish_reason) == ("ab", "length")


def test_max_model_len_ends_with_length() -> None:
    deltas = run_one(b"x" * 64, config={"max_model_len": 20})
    assert (deltas[-1].finish_reason, deltas[-1].num_output_tokens, deltas[-1].error) == ("length", 15, None)


def test_growing_past_the_whole_cache_ends_with_length_and_says_so() -> None:
    """The last token needs no slot of its own, so 32 slots give 33 tokens."""
    deltas = run_one(b"x" * 64, config={"kv_cache_tokens": 32})
    last = deltas[-1]
    assert (last.finish_reason, last.num_prompt_tokens + last.num_output_tokens) == ("length", 33)
    assert "ended at 33 tokens because the whole KV cache holds 32" in last.error


def test_logprobs() -> None:
    for num_top, top in ((0, ()), (1, ((ord("a"), -0.5),)), (2, ((ord("a"), -0.5), (0, -1.5)))):
        (delta,) = run_one(b"a", logprobs=num_top, max_tokens=1)
        assert [(t.token_id, t.logprob, t.top) for t in delta.logprobs] == [(ord("a"), -0.5, top)]
    assert run_one(b"a", max_tokens=1)[0].logprobs is None


@pytest.mark.parametrize(
    ("prompt", "params", "error", "words"),
    [
        ([], GREEDY, ValueError, "the prompt is empty"),
        ([1, 2, 257], GREEDY, ValueError, r"prompt_token_ids\[2\] is 257; token ids are 0..256"),
        ([-1], GREEDY, ValueError, r"prompt_token_ids\[0\] is -1"),
        ([1.5], GREEDY, TypeError, "prompt_token_ids must be integers: .*float"),
        ("text", GREEDY, TypeError, "prompt_token_ids must be integers: .*str"),
        ([1], {"max_tokens": 3}, TypeError, "params must be SamplingParams, got dict"),
        ([1] * 64, GREEDY, PromptTooLongError, "64 tokens, but at most 63 are allowed .max_model_len is 64"),
        ([1] * 49, GREEDY, PromptTooLongError, "49 tokens, but at most 48 .*the whole KV cache"),
    ],
)
def test_bad_requests_are_refused(prompt, params, error: type[Exception], words: str) -> None:
    engine = make_engine(max_model_len=64, kv_cache_tokens=50)
    with pytest.raises(error, match=words):
        engine.add_request("r", prompt, params)
    assert not engine.has_work()
    engine.add_request("r", [1] * 48, GREEDY)  # the longest that fits; the id is free


def test_prompt_too_long_carries_both_numbers() -> None:
    with pytest.raises(PromptTooLongError) as caught:
        make_engine(max_model_len=64).add_request("r", [1] * 100, GREEDY)
    assert (caught.value.num_prompt_tokens, caught.value.limit_tokens) == (100, 63)


def test_request_ids_are_unique_among_the_unfinished() -> None:
    engine = make_engine()
    engine.add_request("r", HELLO, GREEDY)
    with pytest.raises(ValueError, match="request_id 'r' is in use"):
        engine.add_request("r", HELLO, GREEDY)
    run_all(engine)
    engine.add_request("r", HELLO, GREEDY)


def test_a_full_queue_refuses() -> None:
    engine = make_engine(max_queued_requests=2, max_num_seqs=1)
    engine.add_request("a", HELLO, GREEDY)
    engine.add_request("b", HELLO, GREEDY)
    with pytest.raises(QueueFullError, match="2 requests wait, at most 2 may"):
        engine.add_request("c", HELLO, GREEDY)
    engine.step()
    engine.add_request("c", HELLO, GREEDY)
    assert set(run_all(engine)) == {"a", "b", "c"}


def test_a_queue_full_of_tokens_refuses_and_says_when_to_come_back() -> None:
    engine = make_engine(max_queued_tokens=100, max_num_seqs=1)
    engine.add_request("a", [1] * 60, SamplingParams(temperature=0, max_tokens=30))
    engine.add_request("b", [1] * 40, GREEDY)
    with pytest.raises(QueueFullError, match="100 prompt tokens wait, at most 100 may") as caught:
        engine.add_request("c", HELLO, GREEDY)
    assert caught.value.retry_after_s == 1  # nothing is known yet
    engine._queue_limits.count_step(10, 1.0)
    with pytest.raises(QueueFullError) as caught:
        engine.add_request("c", HELLO, GREEDY)
    assert caught.value.retry_after_s == 10  # 100 tokens at 10 a second
    engine.step()  # a runs
    engine.add_request("c", HELLO, GREEDY)
    engine.abort("c")
    run_all(engine)
    engine.add_request("d", [1] * 200, GREEDY)  # larger than the queue, but nobody waits
    with pytest.raises(QueueFullError, match="200 prompt tokens wait"):
        engine.add_request("e", [1], GREEDY)
    assert set(run_all(engine)) == {"d"}


def test_deadlines_end_who_waits_and_who_runs() -> None:
    engine = make_engine(max_num_seqs=1)
    now_s = time.monotonic()
    for name, deadline_s in (("runs", now_s + 0.2), ("waits", now_s + 0.2), ("in time", now_s + 1000), ("free", None)):
        engine.add_request(name, HELLO, SamplingParams(max_tokens=400), RequestOptions(deadline_s=deadline_s))
    engine.step()
    time.sleep(max(0.0, now_s + 0.21 - time.monotonic()))
    late = {delta.request_id: delta for delta in engine.step() if delta.finish_reason is not None}
    assert set(late) == {"runs", "waits"} and {delta.finish_reason for delta in late.values()} == {"abort"}
    assert late["runs"].error == "the deadline of the request passed while it ran, after 1 tokens"
    assert late["waits"].error == "the deadline of the request passed while it waited"
    engine.scheduler.check_invariants()
    ends = {name: deltas[-1].finish_reason for name, deltas in run_all(engine).items()}
    assert ends == {"in time": "length", "free": "length"}


def test_a_deadline_outlives_its_request_and_hits_no_namesake() -> None:
    engine = make_engine()
    soon_s = time.monotonic() + 0.05
    engine.add_request("r", HELLO, GREEDY, RequestOptions(deadline_s=soon_s))
    assert run_all(engine)["r"][-1].finish_reason == "length"
    engine.add_request("r", HELLO, SamplingParams(max_tokens=400))
    time.sleep(max(0.0, soon_s + 0.01 - time.monotonic()))
    assert run_all(engine)["r"][-1].finish_reason == "length"


def test_deadlines_that_are_far_away_do_not_pile_up() -> None:
    engine = make_engine()
    later = RequestOptions(deadline_s=time.monotonic() + 1e9)
    for index in range(300):
        engine.add_request(str(index), HELLO, SamplingParams(max_tokens=1), later)
        run_all(engine)
    assert len(engine._deadlines) < 100


def two_running(script: dict[str, list[int]] | None = None) -> Engine:
    engine = make_engine(script)
    engine.add_request("a", HELLO, GREEDY)
    engine.add_request("b", [*HELLO, 1], GREEDY)
    engine.step()
    return engine


def test_abort_running_waiting_and_unknown() -> None:
    engine = two_running()
    engine.add_request("c", HELLO, GREEDY)
    for name, num_output_tokens in (("a", 1), ("c", 0)):
        last = engine.abort(name)
        assert (last.finish_reason, last.num_output_tokens, last.token_ids) == ("abort", num_output_tokens, [])
        engine.scheduler.check_invariants()
        assert engine.abort(name) is None
    assert set(run_all(engine)) == {"b"}


def test_abort_gives_the_text_held_back() -> None:
    engine = make_engine({"r": [0xC3, 0xA9]})
    engine.add_request("r", HELLO, SamplingParams(max_tokens=9))
    assert [delta.text for delta in engine.step()] == [""]
    assert engine.abort("r").text == "\ufffd"


def test_a_failing_step_ends_its_requests_only() -> None:
    engine = make_engine(max_num_seqs=2)
    for name in "abc":
        engine.add_request(name, HELLO, GREEDY)
    engine.step()
    engine.runner.fail_with = MemoryError("no memory for the workspace")
    deltas = {delta.request_id: delta for delta in engine.step()}
    assert set(deltas) == {"a", "b"}
    for delta in deltas.values():
        assert (delta.finish_reason, delta.num_output_tokens) == ("error", 1)
        assert delta.error == "the step failed: MemoryError: no memory for the workspace"
    engine.scheduler.check_invariants()
    assert engine.scheduler.pool.num_owned_pages == 0
    assert tokens_of(run_all(engine)["c"]) == expected_output(HELLO, GREEDY, 0, 8)


def test_a_runner_that_is_broken_for_good_ends_the_engine() -> None:
    engine = two_running()
    engine.runner.fail_with, engine.runner.is_broken = RuntimeError("illegal address"), True
    with pytest.raises(EngineDeadError, match="broken for good"):
        engine.step()


def test_what_a_failed_step_should_have_computed_is_shared_with_nobody() -> None:
    engine = make_engine()
    prompt = [i % 26 + 97 for i in range(40)]
    engine.add_request("a", prompt, GREEDY)
    engine.runner.fail_with = MemoryError()
    assert engine.step()[0].finish_reason == "error"
    engine.add_request("b", prompt, GREEDY)
    done = run_all(engine)["b"]
    assert done[-1].num_cached_tokens == 0
    assert tokens_of(done) == expected_output(prompt, GREEDY, 0, 8)


def test_a_step_behind_one_that_failed_fails_too() -> None:
    """Its requests may have read what that one should have left."""
    engine = make_engine(overlaps=True, token_budget=64)
    prompt = [i % 26 + 97 for i in range(40)]
    engine.add_request("a", prompt, GREEDY)
    engine.step()
    engine.add_request("b", prompt, GREEDY)
    engine.runner.fail_collect_with = RuntimeError("broken")
    deltas = engine.step()
    assert {(d.request_id, d.finish_reason, d.error) for d in deltas} == {
        (name, "error", "the step failed: RuntimeError: broken") for name in "ab"
    }
    engine.add_request("c", prompt, GREEDY)
    assert tokens_of(run_all(engine)["c"]) == expected_output(prompt, GREEDY, 0, 8)


def test_a_runner_that_gives_the_wrong_number_of_tokens_fails_its_step() -> None:
    engine = two_running()
    collect = engine.runner.collect

    def short(launched):
        sampled = collect(launched)
        sampled.token_ids.pop()
        return sampled

    engine.runner.collect = short
    assert {d.error for d in engine.step()} == {
        "the step failed: RuntimeError: the runner gave 1 tokens for 2 sampling rows"
    }


def test_nan_logits_end_that_request_only() -> None:
    engine = two_running({"a": [ord("x"), -1]})
    bad, good = engine.step()
    assert (bad.finish_reason, bad.token_ids, bad.num_output_tokens) == ("error", [], 1)
    assert bad.error.startswith("logits of request 'a' contain NaN") and "position 6" in bad.error
    assert good.finish_reason is None
    assert run_all(engine)["b"][-1].finish_reason == "length"


def test_pages_of_a_request_with_nan_are_not_shared() -> None:
    prompt = list(range(40))
    engine = make_engine({"bad": [-1]})
    for name, num_cached in (("good", 0), ("next", 32), ("bad", 32), ("after", 0), ("last", 32)):
        engine.add_request(name, prompt, GREEDY)
        assert run_all(engine)[name][-1].num_cached_tokens == num_cached


def test_a_token_that_cannot_be_read_ends_that_request_only() -> None:
    engine = two_running({"a": [ord("x"), 300]})
    bad, good = engine.step()
    assert (bad.finish_reason, bad.token_ids) == ("error", [300]) and "token 300 could not be read" in bad.error
    assert good.finish_reason is None and run_all(engine)["b"][-1].finish_reason == "length"


def test_seeds() -> None:
    sampled = SamplingParams(temperature=0.7, max_tokens=12)

    def outputs(**params: object) -> dict[str, list[int]]:
        engine = make_engine(seed=5)
        for name in "ab":
            engine.add_request(name, HELLO, SamplingParams(temperature=0.7, max_tokens=12, **params))
        return {name: tokens_of(deltas) for name, deltas in run_all(engine).items()}

    own = outputs(seed=3)
    assert own["a"] == own["b"] == expected_output(HELLO, sampled, 3, 12)
    drawn = outputs()
    assert drawn["a"] != drawn["b"] and drawn == outputs()  # a seed each, from the engine's seed


def test_metrics() -> None:
    engine = two_running()
    engine.add_request("c", HELLO, GREEDY)
    now = engine.metrics
    assert (now.num_requests_running, now.num_requests_waiting) == (2, 1)
    assert now.kv_cache_usage == pytest.approx(2 / 64)
    assert (now.prompt_tokens, now.generation_tokens, now.num_steps, now.last_step_tokens) == (11, 2, 1, 11)
    engine.abort("b")
    run_all(engine)
    now = engine.metrics
    assert now.finished_requests == {"stop": 0, "length": 2, "abort": 1, "error": 0}
    assert (now.num_requests_running, now.num_requests_waiting, now.kv_cache_usage) == (0, 0, 0)
    assert (now.prompt_tokens, now.generation_tokens) == (16, 17)
    assert now.step_tokens == 16 + 17 - 3  # the last token of each request is never computed
    assert 0 < now.runner_time_s < now.step_time_s


def calls_of(engine: Engine) -> list[str]:
    """Which of the runner's two calls are made, in order, from now on."""
    calls: list[str] = []
    for name in ("launch", "collect"):
        method = getattr(engine.runner, name)
        setattr(engine.runner, name, lambda arg, name=name, method=method: (calls.append(name), method(arg))[1])
    return calls


def test_with_a_runner_that_overlaps_a_step_is_launched_before_the_last_is_waited_for() -> None:
    engine = make_engine(overlaps=True)
    engine.add_request("a", HELLO, SamplingParams(temperature=0, max_tokens=3))
    calls = calls_of(engine)
    steps = [engine.step() for _ in range(4)]
    assert calls == ["launch", "launch", "collect", "launch", "collect", "collect"]
    assert [len(deltas) for deltas in steps] == [0, 1, 1, 1] and not engine.has_work()
    assert [token for deltas in steps for token in tokens_of(deltas)] == expected_output(HELLO, GREEDY, 0, 3)


def test_penalties_wait_for_the_tokens_that_they_look_at() -> None:
    engine = make_engine(overlaps=True)
    engine.add_request("a", HELLO, SamplingParams(temperature=0, max_tokens=3, presence_penalty=1.0))
    calls = calls_of(engine)
    run_all(engine)
    assert calls == ["launch", "collect"] * 3


def test_a_request_that_ends_or_leaves_while_the_next_step_runs() -> None:
    engine = make_engine({"a": [*b"xyz"]}, overlaps=True)
    for name in "ab":
        engine.add_request(name, HELLO, SamplingParams(temperature=0, max_tokens=9, stop="y" if name == "a" else ()))
    for _ in range(2):
        engine.step()
    (stopped, _) = engine.step()  # a's "y" was drawn by a step after which the next has been launched already
    assert (stopped.request_id, stopped.text, stopped.finish_reason) == ("a", "", "stop")
    assert engine.abort("b").num_output_tokens == 2
    assert engine.step() == [] and not engine.has_work()
    engine.scheduler.check_invariants()
    assert engine.scheduler.pool.num_owned_pages == 0
