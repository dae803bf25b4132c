"""What it takes to tell another rank a step of 32 decodes: on rank 0, on the other, and through their connection"""

from __future__ import annotations

import os
import pickle
import secrets
import threading

from bench.harness import Report, interleave
from tests.engine.fakes import ByteTokenizer, make_config
from tilestream import SamplingParams
from tilestream.distributed.control import Link, Listener, StepReader, StepWriter, connect
from tilestream.engine.request import RequestOptions
from tilestream.engine.request_builder import RequestBuilder
from tilestream.engine.sampling_shards import draw_plan
from tilestream.engine.step_plan import StepPlan

_ROUNDS = 2000


def test_tell_a_step(report: Report) -> None:
    plan = _decodes(32)
    writer, reader = StepWriter(), StepReader()
    reader.read(pickle.loads(writer.write(plan, draw_plan(plan))))  # the first one comes with all pages
    message = writer.write(plan, draw_plan(plan))
    here, there = _connected()

    def through() -> None:
        here.orders.send_bytes(message)
        there.orders.recv_bytes()

    candidates = {
        "plan to bytes, rank 0": lambda: writer.write(plan, draw_plan(plan)),
        "bytes to plan, others": lambda: reader.read(pickle.loads(message)),
        "through the connection": through,
    }
    times = interleave(candidates, rounds=_ROUNDS, warmup=20, settle=False)
    for name, values in times.items():
        report.add("tell a step", f"{name}: 32 decodes, {len(message)} bytes", {"ours": values}, limit="100 us")


def _decodes(num: int) -> StepPlan:
    builder = RequestBuilder(ByteTokenizer(), make_config(), ByteTokenizer.vocab_size)
    plan = StepPlan()
    for i in range(num):
        request = builder.make_request(str(i), [65] * 256, SamplingParams(temperature=0), RequestOptions())
        request.num_computed_tokens, request.pages = 255, list(range(16 * i, 16 * i + 16))
        plan.add(request, 1)
    return plan


def _connected() -> tuple[Link, Link]:
    key, theirs = secrets.token_bytes(32), []
    listener = Listener("127.0.0.1", key)
    thread = threading.Thread(target=lambda: theirs.append(connect(("127.0.0.1", listener.port), key, 1, os.getpid())))
    thread.start()
    ours = None
    while ours is None:
        ours = listener.accept(10)
    thread.join()
    listener.close()
    return ours, theirs[0]
