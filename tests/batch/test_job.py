"""A job answers every line once, as the server does, whatever the lines are and however often it is
killed."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from tilestream.batch.job import BatchStoppedError, Progress
from tilestream.batch.journal import Journal
from tilestream.batch.lines import read_lines
from tilestream.batch.order import in_file_order, in_shared_order
from tilestream.batch.planning import PlanningEngine, plan_work
from tilestream.engine.async_engine import AsyncEngine
from tilestream.engine.request import RequestOptions
from tilestream.sampling_params import SamplingParams
from tilestream.server.app import create_app

from .conftest import (
    MODEL, ByteTokenizer, answers, chat, completion, entries, make_engine, make_job, run_job, shared_prompts, told,
    write_lines,
)  # fmt: skip

ROOT = Path(__file__).parents[2]


async def served(lines: list[dict]) -> dict[str, object]:
    """What a server answers to the same bodies."""
    engine = make_engine()
    async_engine = AsyncEngine(engine)
    app = create_app(async_engine, ByteTokenizer(), model_name=MODEL, max_model_len=engine.config.max_model_len)
    found = {}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
        for line in lines:
            found[line["custom_id"]] = told((await client.post(line["url"], json=line["body"])).json())
    async_engine.shutdown()
    return found


MIXED = [
    *shared_prompts(10),
    completion("two prompts", ["first", "second"], n=2, temperature=1, seed=3),
    completion("ids", [70, 71, 72], logprobs=1),
    chat("chat", "hello", temperature=0.5, seed=9),
    chat("logprobs", "hello", logprobs=True, top_logprobs=1),
    completion("no prompt", None),
    completion("too long", "x" * 5000),
    completion("bad value", "x", temperature=-1),
    chat("other model", "x", model="gpt-17"),
    chat("last is not the user's", "x") | {"body": {"messages": [{"role": "assistant", "content": "y"}]}},
]


async def test_the_servers_answers(tmp_path: Path) -> None:
    source, target = write_lines(tmp_path / "in", MIXED), tmp_path / "out"
    engine = make_engine()
    counts = await asyncio.to_thread(run_job, source, target, engine)  # it has an event loop of its own
    assert answers(target) == await served(MIXED)
    assert (counts.num_good, counts.num_failed) == (14, 5)
    assert engine.scheduler.pool.num_owned_pages == 0
    statuses = {entry["custom_id"]: entry["response"]["status_code"] for entry in entries(target)}
    assert statuses["too long"] == statuses["no prompt"] == 400 and statuses["other model"] == 404
    for entry in entries(target):
        assert list(entry) == ["id", "custom_id", "response", "error"] and entry["error"] is None
        assert list(entry["response"]) == ["status_code", "request_id", "body"] and entry["response"]["request_id"]


def test_faulty_lines_stop_nothing(tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    good = json.dumps(completion("good", "x"))
    source.write_text(f"{{nope\n{good}\n{{nope\n" + json.dumps(chat("no method", "x") | {"method": "PUT"}))
    counts = run_job(source, target)
    assert (counts.num_good, counts.num_failed) == (1, 3)
    found = {entry["custom_id"] or entry["error"]["message"][:6]: entry for entry in entries(target)}
    assert set(found) == {"line 1", "line 3", "no method", "good"}
    assert found["line 1"]["response"] is None and found["line 1"]["error"]["code"] == "invalid_line"
    assert found["good"]["response"]["status_code"] == 200
    before = target.read_bytes()
    run_job(source, target)  # all is answered
    assert target.read_bytes() == before


def test_an_empty_file_has_no_answers(tmp_path: Path) -> None:
    (tmp_path / "in").write_text("")
    run_job(tmp_path / "in", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b""


def test_each_prefix_is_computed_once(tmp_path: Path) -> None:
    """In the order of the file a crowded cache has forgotten a prefix when it comes again."""
    prompts = shared_prompts(30, 10)
    source = write_lines(tmp_path / "in", prompts)
    limits = {"kv_cache_tokens": 16 * 20, "token_budget": 4096, "max_model_len": 120}
    engine = make_engine(**limits)
    run_job(source, tmp_path / "out", engine)
    computed = sum(plan.num_tokens for plan in engine.runner.plans)
    own = sum(len(line["body"]["prompt"]) % 16 + 16 + line["body"]["max_tokens"] for line in prompts)
    assert computed <= 10 * 41 + own
    naive = make_engine(**limits)
    run_job(source, tmp_path / "naive", naive, order=lambda works, page_size: in_file_order(works))
    assert answers(tmp_path / "naive") == answers(tmp_path / "out")
    assert computed < sum(plan.num_tokens for plan in naive.runner.plans)


async def test_lines_are_planned_with_the_salt_that_the_server_gives_them(tmp_path: Path) -> None:
    async def app(scope: dict, receive: object, send: object) -> None:
        """A server that gives every request a salt."""
        async for _ in planning.stream("x", prompt, SamplingParams(), RequestOptions(cache_salt="s")):
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"{}"})

    journal = Journal(tmp_path / "out")
    job = make_job(make_engine(), journal)
    planning, prompt = PlanningEngine(job._engine), [7] * 33
    lines = read_lines(write_lines(tmp_path / "in", [completion(name, "x") for name in "ab"]))
    works, refused = await plan_work(app, lines, lambda: None)
    job._engine.shutdown()
    journal.close()
    assert [work.salt for work in works] == ["s", "s"] and not refused
    (group,) = in_shared_order(works, 16)
    assert group.prefix_tokens == 32


def test_progress_is_told_line_by_line(tmp_path: Path) -> None:
    told: list[str] = []
    progress = Progress(lambda: told.append("planned"), lambda: told.append("answered"))
    source = write_lines(tmp_path / "in", [*shared_prompts(5), completion("bad", None), {"custom_id": "fault"}])
    run_job(source, tmp_path / "out", progress=progress)
    assert told.count("planned") == 6 and told.count("answered") == 7


@pytest.mark.parametrize("pages", [8, 20, 64])
def test_crowded_memory_changes_no_answer(tmp_path: Path, pages: int) -> None:
    source = write_lines(tmp_path / "in", shared_prompts(40, 5))
    run_job(source, tmp_path / "roomy", make_engine(kv_cache_tokens=16 * 1000))
    engine = make_engine(kv_cache_tokens=16 * pages, max_model_len=120)
    run_job(source, tmp_path / "out", engine)
    assert answers(tmp_path / "out") == answers(tmp_path / "roomy")
    engine.scheduler.check_invariants()


def test_a_failing_step_fails_its_lines_only(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in", [completion(f"r{i}", f"{i}" * 40, max_tokens=4) for i in range(8)])
    engine = make_engine(max_num_seqs=2)
    engine.runner.fail_with = RuntimeError("injected")
    counts = run_job(source, tmp_path / "out", engine)
    assert counts.num_good + counts.num_failed == 8 and 1 <= counts.num_failed <= 2
    assert len(answers(tmp_path / "out")) == 8


def test_a_dead_engine_stops_the_job_and_the_rest_is_answered_later(tmp_path: Path) -> None:
    source, target = write_lines(tmp_path / "in", shared_prompts(30)), tmp_path / "out"
    run_job(source, tmp_path / "whole")
    engine = make_engine(kv_cache_tokens=16 * 30)
    num_steps = 0

    def die(plan: object) -> None:
        nonlocal num_steps
        num_steps += 1
        if num_steps == 20:
            raise SystemExit  # no Exception: the engine's thread ends

    engine.runner.on_run = die
    with pytest.raises(BatchStoppedError, match="engine"):
        run_job(source, target, engine)
    num_first = len(answers(target))
    assert 0 < num_first < 30
    run_job(source, target)
    assert answers(target) == answers(tmp_path / "whole")


def test_kill_9_at_any_time_loses_nothing_and_does_nothing_twice(tmp_path: Path) -> None:
    """The same file, killed again and again in the middle of the work."""
    lines = [*shared_prompts(60), *(completion(f"s{i}", "free", temperature=1, n=2) for i in range(5)), {"custom_id": "fault"}]
    source, target = write_lines(tmp_path / "in", lines), tmp_path / "out"
    run_job(source, tmp_path / "whole")
    rng = random.Random(0)
    for _ in range(5):
        size = target.stat().st_size if target.exists() else 0
        job = subprocess.Popen([sys.executable, "-m", "tests.batch.killed_job", source, target], cwd=ROOT)
        end_s = time.monotonic() + 60
        while not target.exists() or target.stat().st_size <= size:
            assert time.monotonic() < end_s and job.poll() is None
            time.sleep(0.001)
        time.sleep(rng.random() * 0.03)
        job.send_signal(signal.SIGKILL)
        assert job.wait() == -signal.SIGKILL
    assert 5 <= target.read_bytes().count(b"\n") < len(lines)
    run_job(source, target)
    assert answers(target) == answers(tmp_path / "whole")
    assert len(entries(target)) == len(lines)
