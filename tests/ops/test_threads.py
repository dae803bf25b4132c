"""The CPU backend's team: where its threads run, how many there are, and that neither changes a result."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tilestream import ops
from tilestream._native import _C


def describe(sysfs: Path, cores: list[list[int]], nodes: list[str]) -> str:
    """Writes the part of /sys/devices/system that tells which CPUs share a core and a node."""
    for core in cores:
        for cpu in core:
            folder = sysfs / f"cpu/cpu{cpu}/topology"
            folder.mkdir(parents=True)
            (folder / "thread_siblings_list").write_text(",".join(map(str, core)) + "\n")
    for node, cpus in enumerate(nodes):
        (sysfs / f"node/node{node}").mkdir(parents=True)
        (sysfs / f"node/node{node}/cpulist").write_text(cpus + "\n")
    return str(sysfs)


def test_two_nodes_with_two_threads_a_core(tmp_path: Path) -> None:
    sysfs = describe(tmp_path, [[0, 4], [1, 5], [2, 6], [3, 7]], ["0,2,4,6", "1,3,5,7"])
    assert _C.order_cpus(list(range(8)), sysfs) == ([0, 2, 1, 3, 4, 6, 5, 7], 4)
    # What the process may not use does not count: 5 is all it has of its core.
    assert _C.order_cpus([0, 2, 4, 5], sysfs) == ([0, 2, 5, 4], 3)


def test_ranges(tmp_path: Path) -> None:
    sysfs = describe(tmp_path, [[cpu] for cpu in range(6)], ["3-5", "0-1,2"])
    assert _C.order_cpus(list(range(6)), sysfs) == ([3, 4, 5, 0, 1, 2], 6)


def test_a_machine_that_describes_nothing(tmp_path: Path) -> None:
    assert _C.order_cpus([1, 3, 8], str(tmp_path)) == ([1, 3, 8], 3)


@pytest.mark.parametrize("num_rows", [1, 100])
def test_results_do_not_depend_on_threads(set_num_threads, num_rows: int) -> None:
    weight = ops.pack_weight(torch.randn(1536, 576), format=ops.PackedFormat.BFLOAT16)
    x = torch.randn(num_rows, 576)
    set_num_threads(1)
    expected = ops.linear(x, weight)
    for num in (2, 3, 7, 16, 64, 256):
        set_num_threads(num)
        for _ in range(20):
            assert torch.equal(ops.linear(x, weight), expected), f"{num} threads"


ON_ONE_CPU = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import torch
from tilestream import LLM, SamplingParams
llm = LLM(kv_cache_tokens=512)
output = llm.generate("The capital of France is", SamplingParams(max_tokens=8, temperature=0.0))
print(len(os.listdir("/proc/self/task")), output[0].token_ids)
"""


def test_one_cpu() -> None:
    """Many threads asked for on one CPU: the same answer as with one thread, and no thread started for it."""
    answers = [
        subprocess.run(
            [sys.executable, "-c", ON_ONE_CPU], capture_output=True, text=True, check=True,
            env=os.environ | {"TILESTREAM_NUM_THREADS": num, "OMP_NUM_THREADS": "1"},
        ).stdout
        for num in ("1", "64")
    ]  # fmt: skip
    assert answers[0] == answers[1] != ""


MOVED = """
import os, sys, torch
from tilestream import ops
from tilestream._native import _C

def workers():
    '''Where the pinned threads of this process may run.'''
    cpus = [os.sched_getaffinity(int(task)) for task in os.listdir("/proc/self/task") if int(task) != os.getpid()]
    return sorted(min(c) for c in cpus if len(c) == 1)

x, weight = torch.randn(64, 576), ops.pack_weight(torch.randn(1536, 576), format=ops.PackedFormat.BFLOAT16)
ops.linear(x, weight)
cpus = sorted(os.sched_getaffinity(0))
assert len(workers()) == len(cpus) - 1 == _C.num_threads() - 1, (workers(), cpus)
for cpu in cpus + cpus:
    os.sched_setaffinity(0, {cpu})
    ops.linear(x, weight)
    assert workers() == [other for other in cpus if other != cpu], (cpu, workers())
print("moved")
"""


@pytest.mark.skipif(not 2 <= _C.num_threads() == len(os.sched_getaffinity(0)), reason="one thread, or two a core")
def test_workers_make_room_for_the_launching_thread() -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TILESTREAM_")}
    result = subprocess.run([sys.executable, "-c", MOVED], capture_output=True, text=True, check=False, env=environment)
    assert result.stdout.split() == ["moved"], result.stderr
