"""Times of GPU work: each candidate is a CUDA graph of many calls that go through more buffers than the L2 cache holds.

A candidate is called with the number of the buffers it is to use: 0 .. num_sets - 1. Its time is the graph's, between two
events, over the number of calls, so that neither the host nor the launch of the graph is in it.
"""

from __future__ import annotations

import functools
import math
import re
import shutil
import statistics
import subprocess
from collections.abc import Callable

import torch

from bench.harness import versions
from bench.roofs import Machine

DEVICE = torch.device("cuda")
Run = Callable[[int], object]

_MAX_SETS = 128
_SAMPLE_S = 500e-6  # a sample takes at least this long, so that what surrounds the graph does not show
_CASE_S = 0.4  # of timing, for all candidates of a case
_MIN_ROUNDS, _MAX_ROUNDS = 5, 25
_HEAD_START_CYCLES = 400_000  # the GPU is kept busy for 0.2 ms while the host queues a sample
_COPY_BYTES = 1 << 30
_MATRIX_SIZE = 8192


@functools.cache
def l2_bytes() -> int:
    return torch.cuda.get_device_properties(DEVICE).L2_cache_size


def num_sets(num_bytes: int) -> int:
    """How many sets of buffers a call that touches `num_bytes` goes through, for each to come from memory. Calls of less than
    a few MB do not get as many as that takes, and find some of their buffers in L2, as in a model they would."""
    return min(_MAX_SETS, math.ceil(4 * l2_bytes() / num_bytes))


def interleave(candidates: dict[str, Run], num_sets: int) -> dict[str, list[float]]:
    """Seconds of a call of each candidate, in turn, so that drift of the clocks hits all alike."""
    captured = {name: _sized(run, num_sets) for name, run in candidates.items()}
    round_s = sum(sample(graph) for graph, _ in captured.values())
    rounds = min(_MAX_ROUNDS, max(_MIN_ROUNDS, int(_CASE_S / round_s)))
    times: dict[str, list[float]] = {name: [] for name in captured}
    for _ in range(rounds):
        for name, (graph, num_calls) in captured.items():
            times[name].append(sample(graph) / num_calls)
    return times


def _sized(run: Run, num_sets: int) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph that goes through all sets as often as makes a sample long enough, and its calls."""
    graph = capture(run, num_sets, num_sets)
    graph.replay()  # the first replay also uploads the graph
    num_calls = num_sets * math.ceil(_SAMPLE_S / sample(graph))
    return (graph, num_sets) if num_calls == num_sets else (capture(run, num_sets, num_calls), num_calls)


def capture(run: Run, num_sets: int, num_calls: int) -> torch.cuda.CUDAGraph:
    """Calls that go through the sets of buffers in turn."""
    run(0)  # what sets itself up or compiles does so outside of the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(num_calls):
            run(i % num_sets)
    return graph


def sample(graph: torch.cuda.CUDAGraph) -> float:
    """Seconds of a replay."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_HEAD_START_CYCLES)
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def working(peers: dict[str, Run], complaint: Callable[[object], str] = lambda result: "") -> dict[str, Run]:
    """Those that take the case, and can be captured: not every backend of torch takes every shape. Of the others it is said
    why not. complaint: what is wrong with a result, if anything."""
    found = {}
    for name, run in peers.items():
        try:
            reason = complaint(run(0))
            if not reason:
                capture(run, 1, 1)
                found[name] = run
        except Exception as error:  # whatever a library raises: that it cannot is no fault of ours
            reason = (str(error).strip() or repr(error)).splitlines()[0][:200]
        if reason:
            print(f"\nleft out: {name}: {reason}")
    return found


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """By norms."""
    return float((got.float() - expected.float()).norm() / expected.float().norm())


def check(got: torch.Tensor, expected: torch.Tensor, bound: float) -> None:
    """Against a reference of higher precision; NaN does not pass."""
    error = relative_error(got, expected)
    assert error <= bound, f"relative error {error:.3g}, allowed {bound:g}"


def this_gpu() -> Machine:
    """The GPU that this runs on."""
    properties = torch.cuda.get_device_properties(DEVICE)
    driver = ""
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = (subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines() or [""])[0]
    description = (
        f"{properties.name}, {properties.multi_processor_count} SMs, {l2_bytes() >> 20} MB of L2, "
        f"driver {driver or 'unknown'}, CUDA {torch.version.cuda}, {versions()}; graphs of many calls, buffers beyond L2"
    )
    name = re.sub(r"[^a-z0-9]+", "-", properties.name.lower()).strip("-")
    memory_rates = {"read": read_rate, "copy": copy_rate}
    return Machine(name, description, tuple(memory_rates), ("bf16", "int8"), lambda kind, _: memory_rates[kind](), matrix_rate)


@functools.cache
def copy_rate() -> float:
    """Bytes per second, read and written ones together, of a large copy within the GPU's memory."""
    source = torch.randint(0, 256, (_COPY_BYTES,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    times = interleave({"copy": lambda i: target.copy_(source)}, 1)["copy"]
    return 2 * _COPY_BYTES / statistics.median(times)


@functools.cache
def read_rate() -> float:
    """Bytes per second of reading alone: of torch's ways to reduce a large buffer, or the copy, the fastest."""
    source = torch.randn(_COPY_BYTES // 4, device=DEVICE)
    times = interleave({"sum": lambda i: source.sum(), "largest": lambda i: source.amax()}, 1)
    return max(copy_rate(), _COPY_BYTES / min(map(statistics.median, times.values())))


@functools.cache
def matrix_rate(kind: str) -> float:
    """Operations per second of a large matrix product by torch, on random data: "bf16" or "int8"."""
    n = _MATRIX_SIZE
    if kind == "bf16":
        a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
        run = lambda i: torch.mm(a, b.t())  # noqa: E731
    else:
        a, b = (torch.randint(-127, 128, (n, n), dtype=torch.int8, device=DEVICE) for _ in range(2))
        run = lambda i: torch._int_mm(a, b.t())  # noqa: E731
    return 2 * n**3 / statistics.median(interleave({"product": run}, 1)["product"])
