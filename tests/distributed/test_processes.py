"""Ranks as processes, without a model: they do what rank 0 plans, come in any order, and end together."""

from __future__ import annotations

import errno
import os
import pickle
import random
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest
import torch
from tilestream import SamplingParams
from tilestream.distributed import launch
from tilestream.distributed.control import Link, StepReader, StepWriter
from tilestream.distributed.ranks import Ranks, Worker
from tilestream.engine.engine import Engine
from tilestream.engine.errors import RankDiedError
from tilestream.engine.profiler import measure_cost_model
from tilestream.engine.request import RequestOptions
from tilestream.engine.step_plan import SampledTokens, StepPlan

from tests.distributed.fake_ranks import make_engine, make_ranks
from tests.engine.fakes import ByteTokenizer, FakeRunner, expected_output, make_config, run_all, tokens_of

ROOT = Path(__file__).parents[2]
SMALL = {"kv_cache_tokens": 16 * 16, "max_model_len": 250}


def check_traffic(engine: Engine, seed: int, num_requests: int = 24) -> None:
    """Shared prefixes, chunks, preemptions and aborts: who is not aborted gets its tokens."""
    chance = random.Random(seed)
    prompts = {}
    deltas: dict[str, list] = {}
    for i in range(num_requests):
        prompt = [65] * chance.choice((0, 40, 90)) + chance.choices(range(97, 123), k=chance.randint(1, 60))
        params = SamplingParams(temperature=chance.choice((0, 1)), max_tokens=chance.randint(1, 70), seed=i)
        engine.add_request(str(i), prompt, params)
        prompts[str(i)] = prompt, params
        for delta in engine.step():
            deltas.setdefault(delta.request_id, []).append(delta)
        if i % 7 == 6:
            engine.abort(str(i - 2))
            prompts.pop(str(i - 2))
    for name, more in run_all(engine).items():
        deltas.setdefault(name, []).extend(more)
    for name, (prompt, params) in prompts.items():
        drawn = tokens_of(deltas[name])
        assert drawn == expected_output(prompt, params, int(name), len(drawn)) and len(drawn) == params.max_tokens
    assert engine.metrics.num_preemptions > 0 and engine.metrics.prefix_cache_hits > 0


class EchoRunner(FakeRunner):
    """Sends each plan through a writer and a reader, and looks for a difference."""

    def __init__(self, *arguments: object, **options: bool) -> None:
        super().__init__(*arguments, **options)
        self.writer, self.reader, self.page_lists = StepWriter(), StepReader(), {}
        self.num_pages_sent = 0

    def launch(self, plan: StepPlan) -> SampledTokens:
        step = pickle.loads(self.writer.write(plan, "draws"))
        copy = self.reader.read(step)
        self.num_pages_sent += len(step.pages)
        assert step.draws == "draws" and copy.prefix_groups == plan.prefix_groups
        assert (copy.num_tokens, copy.num_samples, copy.num_prefill_tokens) == (
            plan.num_tokens, plan.num_samples, plan.num_prefill_tokens,
        )  # fmt: skip
        for item, other in zip(plan.scheduled, copy.scheduled, strict=True):
            span = slice(item.start, item.start + item.num_new_tokens)
            assert (other.start, other.num_new_tokens, other.samples) == (item.start, item.num_new_tokens, item.samples)
            assert other.request.token_ids[span] == item.request.token_ids[span]
            assert other.request.num_tokens == item.request.num_tokens
            assert other.request.pages == item.request.pages
            # The block table takes the same list for the same pages, and perhaps more.
            before = self.page_lists.get(id(other.request.pages))
            assert before is None or item.request.pages[: len(before)] == before
        self.page_lists = {id(other.request.pages): list(other.request.pages) for other in copy.scheduled}
        return super().launch(plan)


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_a_step_survives_its_message(seed: int, overlaps: bool) -> None:
    config = make_config(**SMALL)
    runner = EchoRunner(config, overlaps=overlaps)
    runner.engine = Engine(runner, ByteTokenizer(), config)
    check_traffic(runner.engine, seed)


def test_a_decode_sends_no_page_twice() -> None:
    config = make_config()
    runner = EchoRunner(config)
    runner.engine = Engine(runner, ByteTokenizer(), config)
    runner.engine.add_request("a", [65] * 100, SamplingParams(temperature=0, max_tokens=100))
    run_all(runner.engine)
    assert runner.num_pages_sent == -(-199 // 16)


def test_a_rank_does_not_guess_tokens() -> None:
    request = StepReader().read(pickle.loads(StepWriter().write(_plan_of_one(), None))).scheduled[0].request
    assert request.token_ids[2:4] == [12, 13] and len(request.token_ids) == 6
    with pytest.raises(IndexError, match=r"tokens \[1, 4\) .*\[2, 4\)"):
        request.token_ids[1:4]


def _plan_of_one() -> StepPlan:
    engine = Engine(FakeRunner(make_config()), ByteTokenizer(), make_config())
    request = engine.make_request("a", [10, 11, 12, 13, 14, 15], SamplingParams(), RequestOptions())
    request.num_computed_tokens, request.pages = 2, [3]
    plan = StepPlan()
    plan.add(request, 2)
    return plan


@pytest.fixture(scope="module")
def left() -> Callable[[], list[psutil.Process]]:
    """Processes that these tests have started, and that are still there."""
    others = psutil.Process().children()
    return lambda: [process for process in psutil.Process().children() if process not in others]


@pytest.fixture(scope="class")
def ranks(left: Callable[[], list]) -> Iterator[Ranks]:
    ranks = make_ranks(3, {})
    ranks.answers()
    yield ranks
    assert ranks.failure is None
    ranks.close()
    assert left() == []


class TestHealthy:
    """Three ranks for all of these."""

    @pytest.mark.parametrize("overlaps", [False, True])
    def test_all_do_what_rank_0_plans(self, ranks: Ranks, overlaps: bool) -> None:
        check_traffic(make_engine(ranks, make_config(**SMALL), overlaps=overlaps), seed=5)

    def test_all_are_profiled(self, ranks: Ranks) -> None:
        engine = make_engine(ranks, make_config(kv_cache_tokens=4096, max_model_len=4096))
        first = engine.runner._runner
        first._check = lambda plan: None  # these requests are no engine's
        first._write = lambda pages, position, state, later: first.kv.update({(pages[position // 16], position % 16): state})
        assert measure_cost_model(engine.runner, ByteTokenizer(), engine.config).fixed_s >= 0


@pytest.fixture
def start(left: Callable[[], list]) -> Iterator[Callable[[int, dict], Ranks]]:
    """Starts ranks, some of them with faults; none of their processes may be left."""
    started: list[Ranks] = []

    def start_some(world_size: int, faults: dict[int, tuple[str, int]]) -> Ranks:
        started.append(make_ranks(world_size, faults))
        started[-1].answers()  # they have loaded
        return started[-1]

    yield start_some
    for ranks in started:
        ranks.close()
    assert left() == []


def run_one(engine: Engine) -> None:
    engine.add_request("a", [65] * 10, SamplingParams(temperature=0, max_tokens=100))
    run_all(engine)


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        ({2: ("kill", 4)}, r"rank 2 of 3 \(process \d+\) was killed by SIGKILL"),
        ({1: ("raise", 4)}, r"rank 1 of 3 \(process \d+\) has failed: MemoryError: no more room"),
    ],
    ids=["killed", "raises"],
)
def test_one_rank_ends_all(start: Callable[..., Ranks], left: Callable[[], list], faults: dict, words: str) -> None:
    ranks = start(3, faults)
    told: list[RankDiedError] = []
    ranks.on_failure(told.append)
    engine = make_engine(ranks, make_config())
    begin_s = time.monotonic()
    with pytest.raises(RankDiedError, match=words + "; all ranks end"):
        run_one(engine)
    assert left() == [] and time.monotonic() - begin_s < 5
    with pytest.raises(RankDiedError, match=words):
        engine.step()
    assert told[0] is ranks.failure


def test_rank_0s_own_error_ends_all(start: Callable[..., Ranks], left: Callable[[], list]) -> None:
    engine = make_engine(start(2, {}), make_config())
    engine.runner._runner.fail_with = MemoryError("no room here")
    with pytest.raises(RankDiedError, match="rank 0 of 2 has failed: MemoryError: no room here; all ranks end"):
        run_one(engine)
    assert left() == []


def test_a_rank_that_cannot_load(start: Callable[..., Ranks], left: Callable[[], list]) -> None:
    with pytest.raises(RankDiedError, match=r"rank 1 of 2 .* has failed: OSError: rank 1 has no such file"):
        start(2, {1: ("load", 0)})
    assert left() == []


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import time; time.sleep(60)", "ranks 1, 2 of 3 did not come within 0.5 s"),
        ("raise SystemExit(3)", "rank 1 of 3 has ended with exit code 3 before it joined"),
    ],
)
def test_a_rank_that_does_not_come(
    monkeypatch: pytest.MonkeyPatch, left: Callable[[], list], code: str, words: str
) -> None:
    monkeypatch.setattr(launch, "_start", lambda *_: subprocess.Popen([sys.executable, "-c", code]))
    with pytest.raises(RankDiedError, match=words):
        launch.gather(3, print, timeout_s=0.5 if "sleep" in code else 30)
    assert left() == []


class DiesUnpickled:
    """Ends the rank that reads it: before its torch.distributed is there."""

    def __reduce__(self) -> tuple:
        return os._exit, (3,)


def test_a_new_model_after_a_death(start: Callable[..., Ranks], left: Callable[[], list]) -> None:
    """Whether or not somebody has closed the old one, and whatever rank 0 was in."""
    dead = start(2, {1: ("kill", 1)})
    with pytest.raises(RankDiedError, match="killed by SIGKILL"):
        run_one(make_engine(dead, make_config()))
    with pytest.raises(RankDiedError, match="rank 1 of 2 .* has ended with exit code 3; all ranks end"):
        launch.gather(2, DiesUnpickled())
    engine = make_engine(start(2, {}), make_config())
    dead.close()  # the new one's torch.distributed stays
    run_one(engine)


def test_a_live_model_has_torch_distributed_to_itself(start: Callable[..., Ranks]) -> None:
    start(2, {})
    with pytest.raises(ValueError, match=r"torch.distributed is in use .* close\(\) the LLM"):
        start(2, {})


def test_what_cannot_be_sent_leaves_no_rank(left: Callable[[], list]) -> None:
    with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
        launch.gather(2, lambda place: None)
    assert left() == [] and not torch.distributed.is_initialized()


def test_the_environment_is_as_before(monkeypatch: pytest.MonkeyPatch, start: Callable[..., Ranks]) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth7")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    before = dict(os.environ)
    ranks = start(2, {})
    assert os.environ["NCCL_SOCKET_IFNAME"] == "eth7" and os.environ["GLOO_SOCKET_IFNAME"].startswith("lo")
    ranks.close()
    assert os.environ == before


def test_a_closed_model_says_so(start: Callable[..., Ranks]) -> None:
    ranks = start(2, {})
    told: list[RankDiedError] = []
    ranks.on_failure(told.append)
    engine = make_engine(ranks, make_config())
    ranks.close()
    for run in (run_one, Engine.step):
        with pytest.raises(RankDiedError) as raised:
            run(engine)
        assert str(raised.value) == "the ranks have ended, for this model was closed"
    assert told == []


RUN = """
import os, signal, sys, time
from tests.distributed.fake_ranks import make_engine, make_ranks
from tests.engine.fakes import make_config
from tests.distributed.test_processes import run_one
from tilestream.distributed.worker import work_if_not_first
work_if_not_first({size})
ranks = make_ranks({size}, {{}})
ranks.answers()
engine = make_engine(ranks, make_config())
run_one(engine)
{then}
ranks.close()
print("rank 0 is done")
"""


def script(size: int, then: str = "", **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RUN.format(size=size, then=then)]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, stdout=-1, stderr=-1, text=True)


def test_a_machine_that_is_gone_without_a_word_is_noticed() -> None:
    class Gone(Connection):
        def recv(self) -> None:
            raise TimeoutError(errno.ETIMEDOUT, "Connection timed out")  # as when TCP's probes find nobody

    assert failure_after(Gone, b"x").startswith("rank 1 of 2 (process 4711 on far) has broken off without a word")


def test_an_answer_that_cannot_be_read() -> None:
    text = failure_after(Connection, struct.pack("!i", 4) + b"junk")
    assert text.startswith("rank 1 of 2 (process 4711 on far) has failed: its answer cannot be read: UnpicklingError: ")


def failure_after(kind: type[Connection], sent: bytes) -> str:
    """What Ranks say of one that has sent this."""
    (orders, _orders), (life, other_end) = socket.socketpair(), socket.socketpair()
    other_end.send(sent)
    ranks = Ranks([Worker(Link(1, 2, 4711, "far", Connection(orders.detach()), kind(life.detach())), None)])
    wait_until(lambda: ranks.failure is not None, "nobody has noticed")
    ranks.close()
    return str(ranks.failure)


def test_rank_0s_death_ends_all() -> None:
    first = script(2, "print(*(w.link.pid for w in ranks._workers), flush=True); os.kill(os.getpid(), signal.SIGKILL)")
    output, errors = first.communicate(timeout=60)
    assert first.returncode == -signal.SIGKILL
    pids = [int(pid) for pid in output.split()]
    wait_until(lambda: not any(map(psutil.pid_exists, pids)), "a worker outlives rank 0")
    assert len(pids) == 1 and errors == "tilestream: rank 1 of 2 ends: rank 0 is gone\n"


def wait_until(condition: Callable[[], bool], what: str, limit_s: float = 5.0) -> None:
    end_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end_s, what
        time.sleep(0.02)
