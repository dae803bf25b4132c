"""A step in two halves gives what it gives whole; and on two streams nothing begins before what it needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tilestream.distributed import two_streams
from tilestream.distributed.two_streams import TwoStreams
from tilestream.distributed.weave import COMMUNICATION_BLOCKS, Gemm, SplitRule, Tiling
from tilestream.engine.engine import Engine
from tilestream.engine.runner import ModelRunner
from tilestream.models import load_model
from tilestream.placement import CPU, Placement

from bench import tune_weave
from tests.distributed.model_steps import LIMITS, Group, Load, cut_times
from tilestream.testing.ranks import Ranks
from tests.distributed.test_model import GREEDY, PROMPTS, draws, fmpq, group, ranks, same_answers  # noqa: F401

# Every step of two tokens or more, in its middle, whatever is there.
EVERYWHERE = SplitRule(Tiling(num_sms=1, rows=1, columns=64), (Gemm(64, 64),), min_tokens=2)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])  # gemma3: norms after attention and MLP, and windows
def test_split_steps_on_ranks(name: str, group: Group, ranks: Ranks, hf_model) -> None:  # noqa: F811
    same_answers(ranks, Load(hf_model(name)[1], {"dtype": "float32"}, split_rule=EVERYWHERE), [GREEDY] * 4, group)


@pytest.mark.parametrize("overlaps", [False, True])
def test_draws_of_split_steps(overlaps: bool, group: Group, ranks: Ranks, hf_model) -> None:  # noqa: F811
    load = Load(hf_model("qwen3")[1], {"dtype": "float32"}, overlaps=overlaps, split_rule=EVERYWHERE)
    same_answers(ranks, load, draws(5), group)


@pytest.mark.parametrize("act_bits", ["4", "8"])
def test_split_steps_of_4_bit_weights(act_bits: str, group: Group, ranks: Ranks, fmpq: Path) -> None:  # noqa: F811
    same_answers(ranks, Load(fmpq, {"act_bits": act_bits}, split_rule=EVERYWHERE), [GREEDY] * 4, group)


class Alone:
    """A communicator of one rank, that remembers its calls."""

    rank, world_size, transport, replays, shards_residual = 0, 1, "none", False, False

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.calls: list[tuple[int, int]] = []  # channel, tokens

    def empty(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def allreduce_rmsnorm(self, x, residual, weight, *, eps, int8=None, channel=0) -> None:
        self.calls.append((channel, x.size(0)))
        if weight is None:
            return
        if residual is None:
            torch.ops.tilestream.rms_norm(x, weight, x, eps=eps)
        elif int8 is None:
            torch.ops.tilestream.fused_add_rms_norm(x, residual, weight, eps=eps)
        else:
            torch.ops.tilestream.fused_add_rms_norm_quant(x, residual, weight, int8.q, int8.scale, int8.sum, eps=eps)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return x[None].clone()

    def check(self) -> None:
        pass


def first_step(path: Path, device: str, rule: SplitRule | None) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """Logits of the last token of each prompt, and the calls, of a step of five prompts. The last has the first one's pages,
    which are written in this step, too, but for 3 tokens."""
    placement, dtype = Placement.of(device), "float32" if device == "cpu" else "bfloat16"
    alone = Alone(placement.device)
    loaded = load_model(path, dtype=dtype, placement=placement, connect=lambda config: alone)
    limits = replace(LIMITS, token_budget=100)
    runner = ModelRunner(loaded.model, limits, kv_dtype=dtype)
    runner.split_rule = rule
    engine = Engine(runner, loaded.tokenizer, limits)
    for i, prompt in enumerate([*PROMPTS, PROMPTS[0] + [7]]):
        engine.add_request(str(i), prompt, GREEDY)
    plan = engine.scheduler.schedule()
    assert plan.num_tokens == 92 and plan.num_samples == 5
    return runner._forward(plan).float().cpu(), alone.calls


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_one_rank_in_halves(name: str, device: str, hf_model) -> None:
    """The cut goes through the third prompt, whose second part attends to the first; the last one attends to the first prompt."""
    path = hf_model(name)[1]
    whole, calls_of_whole = first_step(path, device, None)
    halves, calls = first_step(path, device, replace(EVERYWHERE, offsets={92: 22}))
    assert (halves - whole).norm() <= (1e-5 if device == "cpu" else 0.03) * whole.norm()
    assert calls_of_whole == [(0, 92)] * len(calls_of_whole)
    assert calls == [(0, 68), (1, 24)] * len(calls_of_whole)


@dataclass
class Work:
    """What a stage has seen of the others' ends when it ran."""

    name: str
    stream: str
    after: set[str]


class FakeStreams:
    """CUDA streams and events that only keep their order: a stage is after all that its stream has had or has waited for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        world = self
        self.seen: dict[str, set[str]] = {"current": {"begin"}, "second": set()}
        self.works: list[Work] = []
        self.now = "current"

        class Stream:
            device = None

            def __init__(self, name: str) -> None:
                self.name = name

            def wait_event(self, event: Event) -> None:
                world.seen[self.name] |= event.seen

        class Event:
            def record(self, stream: Stream) -> None:
                self.seen = set(world.seen[stream.name])

        @contextmanager
        def stream(stream: Stream) -> Iterator[None]:
            world.now, before = stream.name, world.now
            yield
            world.now = before

        self.taken_sms: list[int] = []
        monkeypatch.setattr(two_streams, "_C", SimpleNamespace(set_taken_sms=self.taken_sms.append))
        monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: Stream("second"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("current"))
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "stream", stream)

    def work(self, name: str) -> None:
        self.works.append(Work(name, self.now, set(self.seen[self.now])))
        self.seen[self.now].add(name)

    def half(self, half: int, num_stages: int) -> Iterator[None]:
        for stage in range(num_stages):
            self.work(f"norm{stage}({half})")
            yield
            self.work(f"compute{stage}({half})")
            yield
        self.work(f"norm{num_stages}({half})")


def test_order_on_two_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = FakeStreams(monkeypatch)
    TwoStreams(torch.device("cuda", 0)).run([streams.half(1, 6), streams.half(2, 6)])
    assert streams.taken_sms == [COMMUNICATION_BLOCKS, 0]
    works = {work.name: work for work in streams.works}
    assert len(works) == 2 * (2 * 6 + 1)
    for stage in range(7):
        for half in (1, 2):
            norm = works[f"norm{stage}({half})"]
            assert norm.stream == "second" and "begin" in norm.after
            assert stage == 0 or f"compute{stage - 1}({half})" in norm.after
            if stage < 6:
                compute = works[f"compute{stage}({half})"]
                assert compute.stream == "current" and norm.name in compute.after
        if stage < 6:  # the second half sees the first one's keys
            assert f"compute{stage}(1)" in works[f"compute{stage}(2)"].after
            # And this is the point: neither waits for the other.
            beside = (f"norm{stage}(2)", f"compute{stage}(1)"), (f"norm{stage + 1}(1)", f"compute{stage}(2)")
            for communication, computation in beside:
                assert communication not in works[computation].after
                assert computation not in works[communication].after
    assert set(works) <= streams.seen["current"]  # whoever comes next in the current stream is after all of it


@needs_gpu
def test_a_graph_captures_both_streams() -> None:
    """Stages of a size that takes longer than a launch, each of which reads what the one before it has written."""
    values = torch.zeros(2, 1 << 22, device="cuda")
    streams = TwoStreams(values.device)

    def half(x: torch.Tensor) -> Iterator[None]:
        for stage in range(20):
            x.mul_(1.5).add_(stage)
            yield
        x.neg_()

    def run() -> None:
        streams.run([half(values[0]), half(values[1])])

    run()
    expected = values.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    values.zero_()
    graph.replay()
    assert torch.equal(values, expected)


def test_a_half_that_fails_fails_the_step() -> None:
    def failing() -> Iterator[None]:
        yield
        raise ValueError("a kernel failed")

    with pytest.raises(ValueError, match="a kernel failed"):
        TwoStreams(CPU.device).run([failing(), failing()])


def test_cuts_are_measured(ranks: Ranks, hf_model) -> None:  # noqa: F811
    first, second, *_ = ranks.call(Group(2, "shared memory").run, cut_times, hf_model("llama")[1], EVERYWHERE)
    assert first == second  # of the slowest rank
    assert first.keys() == {8, 24}
    for row in first.values():
        assert row.keys() == {tune_weave.WHOLE, *tune_weave.OFFSETS} and min(row.values()) > 0


def test_the_best_cuts() -> None:
    whole, late = {tune_weave.WHOLE: 1.0}, dict.fromkeys(tune_weave.OFFSETS, 2.0)
    times = {
        512: whole | late | {0: 0.9}, 1024: whole | late, 2048: whole | late | {128: 0.8, 0: 0.9}, 4096: whole | late | {-128: 0.9}
    }  # fmt: skip
    assert tune_weave.best(times) == {"min_tokens": 2048, "offsets": {"2048": 128, "4096": -128}}
    assert tune_weave.best({512: whole | late}) == {"min_tokens": tune_weave.NEVER, "offsets": {}}
