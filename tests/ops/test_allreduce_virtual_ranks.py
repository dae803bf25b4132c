"""allreduce_rmsnorm on a GPU: several ranks, each a stream of one GPU, whose blocks wait for each other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tilestream import ops, testing
from tilestream._native import _C
from tilestream.ops.allreduce import SIGNAL_BYTES, allreduce_rmsnorm, rank_table
from tilestream.reference import norm as reference

EPS = 1e-5
pytestmark = pytest.mark.skipif(not torch.cuda.is_available() or not _C.cuda_archs, reason="needs a GPU and its kernels")


class VirtualRanks:
    """Ranks on one GPU. A block may fill an SM, and all have to be resident together: 8 ranks' 72 for the 65 tokens here."""

    def __init__(self, world_size: int, num_tokens: int, hidden: int, dtype: torch.dtype) -> None:
        num_bytes = SIGNAL_BYTES + num_tokens * hidden * dtype.itemsize
        self.blocks = torch.zeros(world_size, -(-num_bytes // 64) * 64, dtype=torch.uint8, device="cuda")
        addresses = [block.data_ptr() for block in self.blocks]
        self.tables = [rank_table(rank, addresses, self.blocks.shape[1], timeout_s=5) for rank in range(world_size)]
        self.streams = [torch.cuda.Stream() for _ in range(world_size)]
        self.hidden, self.dtype = hidden, dtype

    def x(self, rank: int, num_tokens: int) -> torch.Tensor:
        num_bytes = num_tokens * self.hidden * self.dtype.itemsize
        return self.blocks[rank, SIGNAL_BYTES : SIGNAL_BYTES + num_bytes].view(self.dtype).view(num_tokens, self.hidden)

    def run(self, sources: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None) -> None:
        """Each rank's x becomes sources[rank], and then the op's result."""
        torch.cuda.synchronize()
        for rank, stream in enumerate(self.streams):
            with torch.cuda.stream(stream):
                x = self.x(rank, sources.shape[1])
                x.copy_(sources[rank])
                allreduce_rmsnorm(x, residual, weight, self.tables[rank], eps=EPS)
        torch.cuda.synchronize()
        assert self.blocks[:, SIGNAL_BYTES - 4 : SIGNAL_BYTES].sum() == 0, "a rank has not come"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_against_float64_on_cuda(world_size: int, dtype: torch.dtype) -> None:
    """One residual for all: each rank has its own tokens of it."""
    for hidden in (64, 1003, 4096, 9000):
        ranks = VirtualRanks(world_size, 65, hidden, dtype)
        for num_tokens in (1, world_size - 1, 65, 19):
            sources, residual = torch.randn(world_size, num_tokens, hidden).to(dtype), torch.randn(num_tokens, hidden).to(dtype)
            weight = (1 + 0.2 * torch.randn(hidden)).to(dtype).float()
            on_gpu = residual.cuda()
            ranks.run(sources.cuda(), on_gpu, weight.cuda())
            want, plain = sources.double().sum(0) + residual.double(), sources[0].clone()
            for part in sources[1:]:
                plain += part
            plain += residual
            testing.assert_as_good_as_plain(on_gpu.cpu(), want, plain, "residual")
            plain = F.rms_norm(plain, (hidden,), weight.to(dtype), EPS)
            got = [ranks.x(rank, num_tokens).cpu() for rank in range(world_size)]
            testing.assert_as_good_as_plain(got[0], reference.rms_norm(want, weight, EPS), plain, "x")
            assert all(torch.equal(x, got[0]) for x in got)


def test_has_the_bits_of_the_norm_alone_on_cuda() -> None:
    """Where all ranks but one bring zeros the sum is exact."""
    for hidden in (1024, 4096):
        sources, weight = torch.zeros(4, 33, hidden, dtype=torch.bfloat16, device="cuda"), torch.rand(hidden, device="cuda")
        sources[2].normal_()
        ranks = VirtualRanks(4, 33, hidden, torch.bfloat16)
        ranks.run(sources, None, weight)
        assert torch.equal(ranks.x(1, 33), ops.rms_norm(sources[2], weight, eps=EPS))
