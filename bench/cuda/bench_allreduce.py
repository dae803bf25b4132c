"""allreduce_rmsnorm on a GPU: sum over the ranks, residual addition and RMS norm in one kernel

On one GPU: the ranks are streams, and all their blocks share its memory, so what is timed is the fusion, not a link. Beside it
stands torch's: the sum, copied to every rank, then the residual's addition and a norm on each. The limit is a copy of the bytes
that ours reads and writes. On several, one process each:

    torchrun --nproc-per-node 8 -m pytest bench/cuda/bench_allreduce.py -s -k link

against NCCL's all-reduce with torch's addition and norm, and against our plain all-reduce.
"""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed
from torch.nn.functional import rms_norm

from bench.cuda.timing import DEVICE, Run, capture, check, interleave, num_sets, sample, working
from bench.harness import Report
from bench.roofs import Work
from tilestream.ops.allreduce import SIGNAL_BYTES, allreduce_rmsnorm, rank_table

EPS = 1e-5
BLOCKS = 16  # of a launch at most, each on an SM of its own
CALLS, ROUNDS = 20, 15  # of a graph; of graphs, between GPUs
each_num_tokens = pytest.mark.parametrize("num_tokens", [1, 8, 64, 256, 1024, 4096])


class VirtualRanks:
    """Ranks that are streams of one GPU, with one of several sets of x for all of them."""

    def __init__(self, world_size: int, num_tokens: int, hidden: int, sets: int) -> None:
        self.num_bytes = num_tokens * hidden * 2
        self.blocks = torch.zeros(world_size, SIGNAL_BYTES + sets * self.num_bytes, dtype=torch.uint8, device=DEVICE)
        addresses = [block.data_ptr() for block in self.blocks]
        self.tables = [rank_table(rank, addresses, self.blocks.shape[1], timeout_s=2) for rank in range(world_size)]
        self.streams = [torch.cuda.Stream() for _ in range(world_size)]
        self.shape = (num_tokens, hidden)
        for i in range(sets):
            for rank in range(world_size):
                self.x(rank, i).normal_()

    def x(self, rank: int, i: int) -> torch.Tensor:
        begin = SIGNAL_BYTES + i * self.num_bytes
        return self.blocks[rank, begin : begin + self.num_bytes].view(torch.bfloat16).view(self.shape)

    def run(self, i: int, residual: torch.Tensor, weight: torch.Tensor) -> None:
        caller = torch.cuda.current_stream()
        for rank, stream in enumerate(self.streams):
            stream.wait_stream(caller)
            with torch.cuda.stream(stream):
                allreduce_rmsnorm(self.x(rank, i), residual, weight, self.tables[rank], eps=EPS)
        for stream in self.streams:
            caller.wait_stream(stream)

    def assert_all_came(self) -> None:
        assert self.blocks[:, SIGNAL_BYTES - 4 : SIGNAL_BYTES].sum() == 0, "a rank did not come: the streams were not run at once"


@each_num_tokens
@pytest.mark.parametrize("world_size", [2, 8])
def test_on_one_gpu(world_size: int, num_tokens: int, report: Report) -> None:
    hidden = 8192
    if (num_sms := torch.cuda.get_device_properties(DEVICE).multi_processor_count) < BLOCKS * world_size:
        pytest.skip(
            f"{world_size} ranks have up to {BLOCKS * world_size} blocks, which have to run at once; here are {num_sms} SMs"
        )
    num_bytes = 2 * hidden * num_tokens * (2 * world_size + 2)  # x of all ranks and the residual, read and written
    sets = num_sets(num_bytes)
    ranks = VirtualRanks(world_size, num_tokens, hidden, sets)
    residuals = torch.randn(sets, num_tokens, hidden, device=DEVICE).bfloat16()
    weight = torch.rand(hidden, device=DEVICE)
    cast = weight.bfloat16()

    total = residuals[0].float() + sum(ranks.x(rank, 0).float() for rank in range(world_size))
    ranks.run(0, residuals[0], weight)
    ranks.assert_all_came()
    check(ranks.x(world_size - 1, 0), rms_norm(total, (hidden,), weight, EPS), 0.01)

    def with_torch(i: int) -> None:
        """Each rank norms all tokens, as it does behind an all-reduce; the residual is whole on each."""
        total = ranks.x(0, i) + ranks.x(1, i)
        for rank in range(2, world_size):
            total += ranks.x(rank, i)
        for rank in range(world_size):
            ranks.x(rank, i).copy_(rms_norm(residuals[i] + total, (hidden,), cast, EPS))

    times = interleave({"ours": lambda i: ranks.run(i, residuals[i], weight)} | working({"torch": with_torch}), sets)
    ranks.assert_all_came()
    case = f"{world_size} ranks on one GPU, {num_tokens} x {hidden} bf16"
    report.add("allreduce_rmsnorm", case, times, work=Work(num_bytes, memory="copy"))


@pytest.fixture(scope="module")
def link():
    """The communicator of this process's GPU with those of the others that torchrun has started."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        pytest.skip("one GPU alone: several are started by torchrun")
    from tilestream.distributed.communicator import connect
    from tilestream.placement import Placement

    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl")
    communicator = connect(torch.distributed.group.WORLD, Placement.of("cuda"), num_bytes=1 << 30)
    yield communicator
    communicator.close()
    torch.distributed.destroy_process_group()


@each_num_tokens
def test_link(num_tokens: int, link, report: Report) -> None:
    hidden = 8192
    x = link.empty(num_tokens * hidden * 2).view(torch.bfloat16).view(num_tokens, hidden).normal_()
    residual, weight = torch.randn_like(x), torch.rand(hidden, device=DEVICE)
    theirs, whole, cast = x.clone(), residual.clone(), weight.bfloat16()
    total = x.float()
    torch.distributed.all_reduce(total)
    link.allreduce_rmsnorm(x, None, weight, eps=EPS)
    check(x, rms_norm(total, (hidden,), weight, EPS), 0.01)
    x.zero_(), theirs.zero_()  # what is summed again and again must not grow

    def with_nccl(_: int) -> None:
        torch.distributed.all_reduce(theirs)
        rms_norm(whole.add_(theirs), (hidden,), cast, EPS)

    candidates: dict[str, Run] = {
        "ours": lambda _: link.allreduce_rmsnorm(x, residual, weight, eps=EPS),
        "NCCL and torch's norm": with_nccl,
        "our sum alone": lambda _: link.allreduce_rmsnorm(x, None, None, eps=EPS),
    }
    # All ranks have to make the same calls: as many, whatever each of them measures.
    graphs = {name: capture(run, 1, CALLS) for name, run in candidates.items()}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(ROUNDS):
        for name, graph in graphs.items():
            times[name].append(sample(graph) / CALLS)
    link.check()
    if link.rank == 0:
        report.add("allreduce_rmsnorm", f"{link.world_size} GPUs by {link.transport}, {num_tokens} x {hidden} bf16", times)
