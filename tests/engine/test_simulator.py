"""The simulator against queues with known answers, the engine's own scheduler, and its command line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from tilestream.engine.config import EngineConfig
from tilestream.engine.cost_model import CostModel
from tilestream.engine.simulation_report import quantiles, summarise, table
from tilestream.engine.simulator import ROUTES, simulate
from tilestream.engine.workload import TraceRequest, read_trace

from tests.server.test_cli import check_one_line_error, run  # noqa: F401

# A token is a millisecond, drawn ones two; nothing else costs.
FLAT = CostModel(fixed_s=0.0, token_s=1e-3, sample_s=1e-3, kv_token_s=0.0, pair_s=0.0, source="test")
LIMITS = {"ttft_limit_s": 1.0, "tpot_limit_s": 0.01}


def make_config(**changes: object) -> EngineConfig:
    defaults = {"kv_cache_tokens": 4096, "max_model_len": 1024, "token_budget": 64, "enable_prefix_caching": False}
    return EngineConfig(**{**defaults, **changes})


def test_one_request() -> None:
    """100 prompt tokens in steps of 64 and 36, then three decodes; the last token's is never computed."""
    result = simulate([TraceRequest(0.0, 100, 4)], make_config(), FLAT)
    (request,) = result.finished
    assert request.first_token_s == pytest.approx(0.101) and request.last_token_s == pytest.approx(0.107)
    assert result.gaps_s == [(pytest.approx(0.002), 1)] * 3
    assert (result.num_steps, result.seconds, result.num_preemptions) == (5, pytest.approx(0.107), 0)
    report = summarise(result, **LIMITS)
    assert report.ttft_s == (pytest.approx(0.101),) * 3 and report.tpot_s == (pytest.approx(0.002),) * 3
    assert report.within_share == 1.0 and report.goodput_req_s == pytest.approx(1 / 0.107)
    assert report.output_tok_s == pytest.approx(4 / 0.107)


def test_a_prompt_that_comes_while_another_is_answered() -> None:
    """The decode gets its token in each step, and each step is as long as its chunk."""
    trace = [TraceRequest(0.0, 1, 5), TraceRequest(0.003, 100, 1)]
    result = simulate(trace, make_config(), FLAT)
    decode, prompt = sorted(result.finished, key=lambda request: request.arrival_s)
    # 0-2 ms, 2-4 ms: alone. Then 1 + 63 tokens, one drawn; then 1 + 37, two drawn; then alone.
    assert decode.first_token_s == pytest.approx(0.002) and decode.last_token_s == pytest.approx(0.004 + 0.065 + 0.040 + 0.002)
    assert prompt.first_token_s == pytest.approx(0.004 + 0.065 + 0.040)
    assert [gap for gap, _ in result.gaps_s] == pytest.approx([0.002, 0.065, 0.040, 0.002])


def random_trace(num_requests: int, seconds: float, **shared: object) -> list[TraceRequest]:
    """Fixed, of every length."""
    return [
        TraceRequest(i * seconds / num_requests, 1 + i * 37 % 300, 1 + i * 23 % 50, tenant="ab"[i % 2], **shared)
        for i in range(num_requests)
    ]


@pytest.mark.parametrize("policy", ["fcfs", "priority", "lpm"])
@pytest.mark.parametrize("kv_cache_tokens", [512, 16384])
def test_everyone_is_answered(policy: str, kv_cache_tokens: int) -> None:
    trace = random_trace(200, 5.0)
    config = make_config(policy=policy, kv_cache_tokens=kv_cache_tokens, max_num_seqs=16)
    result = simulate(trace, config, FLAT)
    assert len(result.finished) == 200 and result.refused == 0
    assert (result.num_preemptions > 0) == (kv_cache_tokens == 512)
    num_output_tokens = sum(item.output_tokens for item in trace)
    assert sum(count for _, count in result.gaps_s) == num_output_tokens - 200  # every token but the first ones
    # A request's gaps fill the time from its first token to its last, preempted or not.
    answering_s = sum(request.last_token_s - request.first_token_s for request in result.finished)
    assert sum(gap * count for gap, count in result.gaps_s) == pytest.approx(answering_s)
    assert all(request.arrival_s < request.first_token_s <= request.last_token_s for request in result.finished)
    decode_tokens = sum(slot[3] for slot in result.timeline.values())
    assert decode_tokens >= num_output_tokens - 200


def test_a_target_is_kept_in_virtual_time() -> None:
    costs = CostModel(fixed_s=1e-3, token_s=1e-4, sample_s=1e-4, kv_token_s=1e-7, pair_s=1e-7)
    trace = random_trace(100, 4.0)
    for tbt_ms, kept in ((10.0, True), (None, False)):
        result = simulate(trace, make_config(token_budget=512, tbt_ms=tbt_ms), costs)
        assert (summarise(result, **LIMITS).tbt_s[2] <= 0.010) == kept


@pytest.mark.parametrize("queue", [{"max_queued_requests": 3}, {"max_queued_tokens": 30}])
def test_limits_refuse(queue: dict[str, int]) -> None:
    trace = [TraceRequest(0.0, 10, 5), TraceRequest(0.0, 1024, 1), *[TraceRequest(0.001, 10, 5)] * 5]
    result = simulate(trace, make_config(max_num_seqs=1, **queue), FLAT)
    assert (len(result.finished), result.refused) == (4, 1 + 2)
    assert summarise(result, **LIMITS).within_share == pytest.approx(4 / 7)


@pytest.mark.parametrize("route", ROUTES)
def test_replicas(route: str) -> None:
    trace = [TraceRequest(i * 0.01, 100, 10, prefix_id=str(i % 3), prefix_tokens=64) for i in range(60)]
    config = make_config(enable_prefix_caching=True)
    result = simulate(trace, config, FLAT, num_replicas=6, route=route)
    used = {request.replica for request in result.finished}
    assert len(result.finished) == 60
    if route == "round-robin":
        assert all(request.replica == int(request.request_id) % 6 for request in result.finished)
    one = simulate(trace, config, FLAT)
    assert summarise(result, **LIMITS).ttft_s[2] < summarise(one, **LIMITS).ttft_s[2]
    assert used == set(range(6)) or route == "prefix-affinity"


def test_affinity_finds_more_in_the_caches() -> None:
    """Ten prefixes of 512 tokens, caches that hold about three of them."""
    trace = [TraceRequest(i * 0.3, 600, 2, prefix_id=str(i * 7 % 10), prefix_tokens=512) for i in range(200)]
    config = make_config(enable_prefix_caching=True, kv_cache_tokens=2048)
    shares = {}
    for route in ROUTES:
        report = summarise(simulate(trace, config, FLAT, num_replicas=4, route=route), **LIMITS)
        shares[route] = report.cache_hit_share
    assert shares["prefix-affinity"] > 0.6 > 1.2 * max(shares["round-robin"], shares["least-loaded"]), shares
    with pytest.raises(ValueError, match="route must be one of round-robin, .*, got 'random'"):
        simulate(trace, config, FLAT, route="random")


def test_lpm_finds_more_in_the_cache_than_fcfs_does() -> None:
    """Requests of ten prefixes queue up in front of a cache that holds about three."""
    trace = [TraceRequest(i * 0.05, 600, 2, prefix_id=str(i * 7 % 10), prefix_tokens=512) for i in range(200)]
    reports = {}
    for policy in ("fcfs", "lpm"):
        config = make_config(enable_prefix_caching=True, kv_cache_tokens=2048, policy=policy)
        reports[policy] = summarise(simulate(trace, config, FLAT), **LIMITS)
    assert reports["lpm"].cache_hit_share > 0.5 > 2 * reports["fcfs"].cache_hit_share, reports
    assert reports["lpm"].requests_s > 1.5 * reports["fcfs"].requests_s


def test_quantiles() -> None:
    assert quantiles((float(i), 1) for i in range(1, 101)) == (50.0, 90.0, 99.0)
    assert quantiles([(5.0, 98), (7.0, 2)]) == (5.0, 5.0, 7.0)
    assert all(map(math.isnan, quantiles([])))


TRACE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:49.0000000,10,1
"""


def test_a_trace_is_read_and_sorted(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    trace = read_trace(path, rate_scale=2)
    assert [request.arrival_s for request in trace] == pytest.approx([0.0, 1.159705, 2.1572895])
    assert [(request.prompt_tokens, request.output_tokens) for request in trace] == [(374, 44), (10, 1), (396, 109)]
    assert len(read_trace(path, max_requests=2)) == 2
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens,Tenant,Priority,PrefixId,PrefixTokens\n1.5,9,3,t,-1,p,4\n")
    assert read_trace(path) == [TraceRequest(0.0, 9, 3, "t", -1, "p", 4)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b\n1,2\n", "has no column TIMESTAMP"),
        (TRACE.splitlines()[0] + "\n", "has no requests"),
        (TRACE + "tomorrow,1,1\n", "line 5: .*tomorrow"),
        (TRACE + "1,0,1\n", "line 5: .*at least 1, got 0 and 1"),
        (TRACE + "1,5\n", "line 5"),
        (TRACE.replace("Tokens\n", "Tokens,PrefixTokens\n") + "1,5,1,6\n", "PrefixTokens must be 0..ContextTokens = 5, got 6"),
    ],
)
def test_a_bad_trace_says_where(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        read_trace(path)


def test_command(run, tmp_path: Path) -> None:  # noqa: F811
    trace, costs, picture = tmp_path / "trace.csv", tmp_path / "costs.json", tmp_path / "picture.png"
    trace.write_text(TRACE)
    options = ("--save-cost-model", str(costs), "--plot", str(picture), "--tbt-ms", "20", "--policy", "lpm")
    done = run("simulate", str(trace), "--cost-model", "estimate-h200-llama3-8b", *options)
    assert done.returncode == 0 and "estimate by formula, nothing measured" in done.stderr
    for words in ("time to first token", "time between tokens", "goodput", "preemptions", "steps/s"):
        assert words in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "estimate" in json.loads(costs.read_text())["source"]
    again = run("simulate", str(trace), "--cost-model", str(costs), "--replicas", "2", "--route", "prefix-affinity")
    assert again.returncode == 0 and "2 replicas" in again.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--cost-model", "h300"), ("h300", "estimate-h200-llama3-8b")),
        (("--plot", "picture.svg"), ("picture.svg", ".png")),
        (("--policy", "lifo"), ("lifo", "fcfs")),
    ],
)
def test_bad_commands(run, tmp_path: Path, options: tuple[str, ...], words: tuple[str, ...]) -> None:  # noqa: F811
    trace = tmp_path / "trace.csv"
    trace.write_text(TRACE)
    check_one_line_error(run("simulate", str(trace), *options), 2, *words)


def test_the_table_names_every_figure() -> None:
    result = simulate([TraceRequest(0.0, 100, 4), TraceRequest(0.0, 4000, 4)], make_config(), FLAT)
    text = table(summarise(result, **LIMITS), **LIMITS)
    assert "2  1 refused" in text and "TTFT <= 1 s and TPOT <= 10 ms: 50.0%" in text
