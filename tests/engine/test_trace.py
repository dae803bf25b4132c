"""The trace of steps and requests, and the steps that an engine keeps."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tilestream import kernel_trace
from tilestream.engine.metrics import STEP_TOKENS_BOUNDS
from tilestream.engine.request import RequestOptions
from tilestream.engine.trace import Trace
from tilestream.kernel_trace import KernelProfiler
from tilestream.sampling_params import SamplingParams

from .fakes import make_engine, run_all

Event = dict[str, object]
LONG = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)


def traced(path: Path, *, overlaps: bool = False, **config: object) -> list[Event]:
    """The events of an engine with a long prompt, a short one, and one that is aborted in the queue."""
    engine = make_engine(overlaps=overlaps, **config)
    engine.watch.trace = Trace(path)
    engine.add_request("long", [ord("s")] * 150, LONG, RequestOptions(priority=3, tenant="abc"))
    engine.add_request("short", [ord("t")] * 3, LONG)
    engine.add_request("gone", [1], LONG)
    engine.abort("gone")
    run_all(engine)
    engine.watch.trace.close()
    return json.loads(path.read_text())


def check_spans(events: list[Event]) -> None:
    """Parts lie inside their steps, and steps after each other."""
    spans = [event for event in events if event["ph"] == "X"]
    assert all(span["dur"] >= 0 and span["ts"] >= 0 for span in spans)
    steps = [span for span in spans if span["name"] == "step"]
    for before, after in zip(steps, steps[1:], strict=False):
        assert before["ts"] + before["dur"] <= after["ts"] + 0.01
    for part in spans:
        inside = [s for s in steps if s["ts"] - 0.01 <= part["ts"] and part["ts"] + part["dur"] <= s["ts"] + s["dur"] + 0.01]
        assert len(inside) == 1, part
    assert {span["name"] for span in spans} == {"step", "schedule", "launch", "collect"}


@pytest.mark.parametrize("overlaps", [False, True])
def test_steps(tmp_path: Path, overlaps: bool) -> None:
    events = traced(tmp_path / "t.json", overlaps=overlaps)
    check_spans(events)
    steps = [event["args"] for event in events if event["name"] == "step"]
    assert [step["step"] for step in steps] == list(range(len(steps)))
    assert sum(step["prefill_tokens"] for step in steps) == 153
    assert sum(step["decode_tokens"] for step in steps) == 2 * 4  # the first tokens come from the prefills
    assert steps[0] == {"prefill_tokens": 64, "decode_tokens": 0, "budget_tokens": 64, "step": 0}
    counters = [event for event in events if event["ph"] == "C" and event["name"] == "tokens"]
    assert [c["args"]["prefill_tokens"] for c in counters] == [step["prefill_tokens"] for step in steps]


def test_requests(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    events = traced(path)
    ends = {}
    for event in events:
        if event["ph"] in "be":
            ends.setdefault((event["id"], event["name"]), []).append(event["ts"])
    assert set(ends) == {("gone", "request"), ("gone", "queued")} | {
        (name, phase) for name in ("long", "short") for phase in ("request", "queued", "prefill", "decode")
    }
    for name in ("long", "short"):
        (begin, end), (queued, prefill), (_, decode), (_, last) = (
            ends[name, phase] for phase in ("request", "queued", "prefill", "decode")
        )
        assert begin == queued <= prefill == ends[name, "prefill"][0] <= decode <= last == end
    facts = {event["id"]: event["args"] for event in events if event["ph"] == "b" and event["name"] == "request"}
    assert facts["long"] == {
        "prompt_tokens": 150, "cached_tokens": 0, "output_tokens": 5, "priority": 3, "tenant": "abc",
        "finish_reason": "length",
    }  # fmt: skip
    assert facts["gone"]["finish_reason"] == "abort" and facts["gone"]["output_tokens"] == 0
    assert "sss" not in path.read_text()  # the prompt


KILLED = """
import sys
from tests.engine.fakes import make_engine
from tilestream.engine.trace import Trace
from tilestream.sampling_params import SamplingParams
engine = make_engine()
engine.watch.trace = Trace(sys.argv[1])
print("ready", flush=True)
for i in range(1_000_000):
    engine.add_request(str(i), [1, 2, 3], SamplingParams(max_tokens=4))
    while engine.has_work():
        engine.step()
"""


def test_a_killed_process_leaves_whole_events(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    root = Path(__file__).parents[2]
    process = subprocess.Popen([sys.executable, "-c", KILLED, path], cwd=root, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    while path.stat().st_size < 100_000:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    text = path.read_text()
    assert text.endswith(",\n")
    events = json.loads(text.removesuffix(",\n") + "]")  # what readers of the format do
    check_spans(events)


def test_a_full_disk_ends_the_trace_and_not_the_engine(caplog: pytest.LogCaptureFixture) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    with pytest.raises(OSError, match="No space"):
        Trace("/dev/full")
    engine = make_engine()
    engine.watch.trace = Trace("/dev/null")
    engine.watch.trace._file = open("/dev/full", "wb", buffering=0)
    engine.add_request("a", [1, 2], LONG)
    assert len(run_all(engine)["a"]) == 5
    assert "No space" in caplog.text


def test_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no/such"):
        Trace(tmp_path / "no/such/t.json")


def test_the_last_steps_are_kept() -> None:
    engine = make_engine()
    for i in range(300):
        engine.add_request(str(i), [1, 2, 3], LONG)
        run_all(engine)
    steps = engine.watch.steps
    kept = steps.since(0)
    assert [step.index for step in kept] == list(range(1500 - 1024, 1500))
    assert [step.index for step in steps.since(1498)] == [1498, 1499] and steps.since(1500) == []
    assert all(step.begin_s <= step.end_s and step.seconds("schedule") < step.end_s - step.begin_s for step in kept)


def test_totals_of_steps() -> None:
    engine = make_engine()
    engine.add_request("a", [1] * 150, LONG)
    run_all(engine)
    now = engine.metrics
    assert (now.prefill_tokens, now.decode_tokens, now.step_tokens) == (150, 4, 154)
    assert (now.num_steps, now.budget_tokens, now.last_step_budget_tokens) == (7, 7 * 64, 64)
    by_bound = dict(zip((*STEP_TOKENS_BOUNDS, None), now.steps_by_tokens, strict=True))
    assert {bound: count for bound, count in by_bound.items() if count} == {1: 4, 32: 1, 64: 2}
    assert 0 < now.schedule_time_s + now.runner_time_s < now.step_time_s


def test_recomputed_tokens_are_prefill() -> None:
    """After a preemption an answer's tokens are computed again as a chunk: that is no decode."""
    engine = make_engine(kv_cache_tokens=16 * 6, max_model_len=90, enable_prefix_caching=False)
    for name in "ab":
        engine.add_request(name, [1] * 20, SamplingParams(temperature=0, max_tokens=50, ignore_eos=True))
    run_all(engine)
    now = engine.metrics
    assert now.num_preemptions > 0 and now.decode_tokens < 2 * 49 and now.prefill_tokens > 40


def test_kernels(tmp_path: Path) -> None:
    """Two steps of torch ops, as its profiler sees them, lie inside these steps."""
    engine = make_engine()
    launch = engine.runner.launch

    def launch_with_an_op(plan: object) -> object:
        torch.ones(300, 300) @ torch.ones(300, 300)
        return launch(plan)

    engine.runner.launch = launch_with_an_op
    engine.watch.trace = Trace(tmp_path / "t.json")
    engine.watch.trace.kernels = KernelProfiler(2)
    engine.add_request("a", [1] * 100, SamplingParams(max_tokens=6, ignore_eos=True))
    run_all(engine)
    engine.watch.trace.close()
    events = json.loads((tmp_path / "t.json").read_text())
    steps = [event for event in events if event["name"] == "step"]
    found = [event for event in events if event["name"] == "aten::mm"]
    assert len(found) == 2 and len(steps) > 3
    for op, step in zip(found, steps[1:3], strict=True):
        assert step["ts"] - 100 <= op["ts"] and op["ts"] + op["dur"] <= step["ts"] + step["dur"] + 100  # two clocks


def test_a_profiler_that_fails_hurts_nobody(tmp_path: Path, monkeypatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(kernel_trace, "profile", lambda **_: 1 / 0)
    engine = make_engine()
    engine.watch.trace = Trace(tmp_path / "t.json")
    engine.watch.trace.kernels = KernelProfiler(2)
    engine.add_request("a", [1, 2], LONG)
    assert len(run_all(engine)["a"]) == 5
    assert caplog.text.count("ZeroDivisionError") == 1
