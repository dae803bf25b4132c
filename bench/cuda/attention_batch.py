"""What the attention benches share: batches over shuffled pages, checked against float32, and peers, checked against ours."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from bench.cuda.timing import DEVICE, Run, check, relative_error, working
from bench.peers.flashinfer import PagedBatch
from bench.sm90_loads import ROW_BYTES
from tilestream import ops
from tilestream.ops import AttentionPlanner, KvCache

PAGE_SIZE = 64
BACKENDS = {"SDPA flash": SDPBackend.FLASH_ATTENTION, "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION}
# How far from the attention over what is stored a result may be.
BOUNDS = {"bfloat16": 0.01, "fp8": 0.08, "int8": 0.02, "int4": 0.02}
PEER_BOUNDS = {kv_dtype: 2 * bound for kv_dtype, bound in BOUNDS.items()}  # from ours: both round
APPENDED_TOKENS = 1 << 17  # at a time


class Pages:
    """Sets of random keys and values in shuffled pages. Request b has kv_lens[b] tokens; the first `prefix` are everyone's."""

    def __init__(self, kv_lens: Sequence[int], num_kv_heads: int, head_dim: int, kv_dtype: str = "bfloat16", *, sets: int = 1,
                 prefix: int = 0) -> None:  # fmt: skip
        self.kv_lens, self.kv_dtype = list(kv_lens), kv_dtype
        shared = prefix // PAGE_SIZE
        own = [math.ceil(kv_len / PAGE_SIZE) - shared for kv_len in kv_lens]
        num_pages = shared + sum(own)
        pages = torch.randperm(num_pages, device=DEVICE).int()
        self.block_table = torch.zeros(len(own), shared + max(own), dtype=torch.int32, device=DEVICE)
        self.block_table[:, :shared] = pages[:shared]
        for row, mine in zip(self.block_table, pages[shared:].split(own)):
            row[shared : shared + len(mine)] = mine
        self.caches = []
        for _ in range(sets):
            cache = KvCache.allocate(
                num_pages, num_kv_heads, PAGE_SIZE, head_dim, kv_dtype=kv_dtype, blocked=False, device=DEVICE
            )
            for slots in torch.arange(num_pages * PAGE_SIZE, dtype=torch.int32, device=DEVICE).split(APPENDED_TOKENS):
                k, v = (torch.randn(len(slots), num_kv_heads, head_dim, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
                ops.append_kv(None, k, v, torch.zeros_like(slots), slots, cache)
            self.caches.append(cache)

    @staticmethod
    def bytes_of_a_token(num_kv_heads: int, head_dim: int, kv_dtype: str) -> int:
        return 2 * num_kv_heads * ROW_BYTES[kv_dtype](head_dim)

    def keys_and_values(self, i: int, b: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[token, kv head, dim], float32, of a request, as stored."""
        tokens = torch.arange(self.kv_lens[b], device=DEVICE)
        slots = self.block_table[b, tokens // PAGE_SIZE] * PAGE_SIZE + tokens % PAGE_SIZE
        return ops.gather_kv(self.caches[i], slots.int())

    def bfloat16_tokens(self, i: int, b: int) -> list[torch.Tensor]:
        return [side.bfloat16() for side in self.keys_and_values(i, b)]


class Batch:
    """A step over pages: request b of them, counted from `first`, has q_lens[b] query tokens, its last ones."""

    def __init__(self, pages: Pages, q_lens: Sequence[int], num_qo_heads: int, *, first: int = 0, prefix: int = 0,
                 float8_q: bool = False) -> None:
        """prefix: tokens that all requests share, and that the plan is told of. float8_q: ours is given q in e4m3."""
        cache = pages.caches[0]
        num_kv_heads, head_dim = cache.k_cache.size(1), cache.head_dim_vo
        self.pages, self.first, self.q_lens = pages, first, list(q_lens)
        self.kv_lens = pages.kv_lens[first : first + len(q_lens)]
        self.table = pages.block_table[first : first + len(q_lens)]
        self.starts = torch.tensor([0, *q_lens]).cumsum(0).int()
        self.q = torch.randn(sum(q_lens), num_qo_heads, head_dim, dtype=torch.bfloat16, device=DEVICE)
        self.float8_q = self.q.to(torch.float8_e4m3fn) if float8_q else None
        if self.float8_q is not None:
            self.q = self.float8_q.bfloat16()
        self.out = torch.full_like(self.q, math.nan)
        self.planner = AttentionPlanner(
            num_qo_heads, num_kv_heads, head_dim, page_size=PAGE_SIZE, device=DEVICE, kv_dtype=pages.kv_dtype
        )
        lengths = torch.tensor(self.kv_lens, dtype=torch.int32)
        groups = [(prefix, range(len(q_lens)))] if prefix else []
        self.planner.reserve(self.starts, lengths, groups)
        self.plan = self.planner.plan(self.starts, lengths, groups)

    def ours(self, i: int) -> torch.Tensor:
        q = self.q if self.float8_q is None else self.float8_q
        return ops.attention(q, self.pages.caches[i], self.table, self.plan, out=self.out)

    @property
    def paged(self) -> PagedBatch:
        """As FlashInfer takes it."""
        return PagedBatch(self.q, self.pages.caches, self.table, self.q_lens, self.kv_lens)

    def num_ops(self) -> int:
        """Of both products, where a query sees a key."""
        num_seen = sum(q * (kv - q) + q * (q + 1) // 2 for q, kv in zip(self.q_lens, self.kv_lens))
        return 4 * num_seen * self.q.size(1) * self.q.size(2)

    def check(self) -> None:
        """A few rows of the first and the last request, against float32."""
        self.ours(0)
        got, expected = [], []
        for b in {0, len(self.q_lens) - 1}:
            k, v = self.pages.keys_and_values(0, self.first + b)
            for row in {0, self.q_lens[b] // 3, self.q_lens[b] - 1}:
                seen = self.kv_lens[b] - self.q_lens[b] + row + 1
                index = int(self.starts[b]) + row
                q = self.q[index].float().unflatten(0, (k.size(1), -1))  # [kv head, group, dim]
                weights = torch.einsum("hgd,thd->hgt", q, k[:seen]).mul_(q.size(-1) ** -0.5).softmax(-1)
                expected.append(torch.einsum("hgt,thd->hgd", weights, v[:seen]).flatten(0, 1))
                got.append(self.out[index])
        check(torch.stack(got), torch.stack(expected), BOUNDS[self.pages.kv_dtype])
        assert bool(self.out.isfinite().all())

    def working(self, peers: dict[str, Run]) -> dict[str, Run]:
        """Those that can do it, and give what ours does."""
        expected, bound = self.ours(0).clone(), PEER_BOUNDS[self.pages.kv_dtype]

        def complaint(result: torch.Tensor | tuple[torch.Tensor, ...]) -> str:
            parts = result if isinstance(result, tuple) else (result,)
            error = relative_error(torch.cat([part.reshape(-1, *expected.shape[1:]) for part in parts]), expected)
            return "" if error <= bound else f"its result is {error:.3g} from ours, allowed {bound:g}"

        return working(peers, complaint)


def sdpa(batch: Batch) -> dict[str, Run]:
    """Backends of torch for requests of one length: over contiguous K and V in bfloat16, whatever the cache is."""
    q_len, kv_len = batch.q_lens[0], batch.kv_lens[0]
    q = batch.q.unflatten(0, (-1, q_len)).transpose(1, 2)
    sets = []
    for i in range(len(batch.pages.caches)):
        sides = zip(*(batch.pages.bfloat16_tokens(i, batch.first + b) for b in range(len(batch.q_lens))))
        sets.append([torch.stack(side).transpose(1, 2) for side in sides])
    mask = causal_lower_right(q_len, kv_len) if 1 < q_len < kv_len else None

    def run(i: int, backend: SDPBackend) -> torch.Tensor:
        with sdpa_kernel(backend):
            out = scaled_dot_product_attention(q, *sets[i], attn_mask=mask, is_causal=q_len == kv_len > 1, enable_gqa=True)
            return out.transpose(1, 2)

    return {name: lambda i, backend=backend: run(i, backend) for name, backend in BACKENDS.items()}


def with_best(times: dict[str, list[float]]) -> dict[str, list[float]]:
    """Beside each peer, the fastest of them: what the goals are over."""
    peers = {name: seconds for name, seconds in times.items() if not name.startswith("ours")}
    if len(peers) < 2:
        return times
    best = fastest(peers)
    return times | {f"best: {best}": times[best]}


def fastest(times: dict[str, list[float]]) -> str:
    return min(times, key=lambda name: statistics.median(times[name]))
