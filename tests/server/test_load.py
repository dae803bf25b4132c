"""The request load of `tilestream bench`: what is sent when, and what is said of it."""

from __future__ import annotations

import pytest
from tilestream.cli.load import RequestTimes, run_load, summarise

from tests.engine.fakes import make_engine


def test_figures_of_a_load() -> None:
    times = [RequestTimes(0.0, 1.0, 4.0, 4), RequestTimes(1.0, 1.5, 2.0, 2), RequestTimes(2.0, 5.0, 6.0, 3)]
    result = summarise(times, 30)
    assert (result.num_requests, result.prompt_tokens, result.output_tokens, result.seconds) == (3, 30, 9, 6.0)
    assert (result.output_tok_s, result.total_tok_s) == (1.5, 6.5)
    assert (result.ttft_median_s, result.ttft_p99_s) == (1.0, 3.0)
    assert result.tpot_median_s == 0.5  # of 1, 0.5 and 0.5


@pytest.mark.parametrize("requests_per_s", [None, 50.0])
def test_a_load_is_answered(requests_per_s: float | None) -> None:
    engine = make_engine()
    times = run_load(engine, [[1, 2, 3], [4, 5], [6]], 5, requests_per_s=requests_per_s)
    assert [t.sent_s for t in times] == ([0.0] * 3 if requests_per_s is None else [0.0, 0.02, 0.04])
    assert all(t.sent_s <= t.first_token_s <= t.end_s and t.num_output_tokens == 5 for t in times)
    assert not engine.has_work()


def test_an_answer_that_fails_ends_the_load() -> None:
    engine = make_engine()
    engine.runner.launch = lambda plan: 1 / 0
    with pytest.raises(RuntimeError, match="0: the step failed: ZeroDivisionError"):
        run_load(engine, [[1, 2, 3]], 5)
