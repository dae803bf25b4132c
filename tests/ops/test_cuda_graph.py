"""CUDA graphs: a captured step replays with other lengths, pages and plans; what would move its buffers is refused."""

from __future__ import annotations

import pytest
import torch

from tilestream import ops, testing

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")
NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE = 8, 2, 128, 16


class Decode:
    """A batch of decodes on fixed buffers: one new token each, over caches of changing lengths."""

    def __init__(self, batch_size: int, max_len: int) -> None:
        self.kv = testing.paged_kv(
            [max_len] * batch_size, num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM, page_size=PAGE_SIZE, kv_dtype="bfloat16"
        )
        c = self.kv.cache
        self.cache = ops.KvCache(c.k_cache.cuda(), c.v_cache.cuda())
        self.block_table = self.kv.block_table.cuda()
        self.q = torch.randn(batch_size, NUM_QO_HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
        self.out = torch.empty_like(self.q)
        self.planner = ops.AttentionPlanner(NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM, page_size=PAGE_SIZE, device="cuda")
        self.cu_seqlens_q = torch.arange(batch_size + 1, dtype=torch.int32)

    def plan(self, kv_lens: list[int]) -> ops.AttentionPlan:
        return self.planner.plan(self.cu_seqlens_q, torch.tensor(kv_lens, dtype=torch.int32))

    def reserve(self, max_len: int) -> None:
        self.planner.reserve(self.cu_seqlens_q, torch.full((len(self.q),), max_len, dtype=torch.int32))

    def attend(self, plan: ops.AttentionPlan) -> None:
        ops.attention(self.q, self.cache, self.block_table, plan, out=self.out)


def test_a_captured_decode_replays_with_other_lengths_and_pages() -> None:
    step = Decode(batch_size=4, max_len=300)
    step.reserve(300)
    plan = step.plan([1, 16, 17, 300])
    step.attend(plan)  # loads the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.attend(plan)
    for kv_lens in ([300, 300, 300, 300], [5, 1, 64, 65], [1, 16, 17, 300]):
        step.block_table.copy_(step.block_table[[1, 2, 3, 0]])  # other pages, in the same place
        step.q.normal_()
        plan = step.plan(kv_lens)
        step.attend(plan)
        want = step.out.clone()
        step.out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(step.out, want)


def test_planning_in_a_capture_is_refused() -> None:
    step = Decode(batch_size=2, max_len=64)
    step.reserve(64)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="in a CUDA graph capture; plan before it"), torch.cuda.graph(graph):
        step.plan([3, 4])


def test_capturing_a_plan_whose_buffers_may_move_is_refused() -> None:
    step = Decode(batch_size=2, max_len=64)
    plan = step.plan([3, 4])
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match=r"call AttentionPlanner.reserve\(\)"), torch.cuda.graph(graph):
        step.attend(plan)
