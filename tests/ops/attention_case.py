"""One attention step as tests describe it: run it, compute it in float64, and as plain torch would."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import torch

from tests.ops.layouts import layout_or_own
from tilestream import ops, testing
from tilestream.reference import attention as reference
from tilestream.testing.paged import FLOAT_DTYPES, KV_FLOAT_DTYPES


@dataclasses.dataclass(frozen=True)
class Case:
    """A step: requests, shapes, dtypes, layout, variants and how it is planned."""

    q_lens: tuple[int, ...] = (1,)
    kv_lens: tuple[int, ...] = (33,)
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 64
    head_dim_vo: int | None = None
    page_size: int = 16
    dtype: str = "float32"
    kv_dtype: str = "float32"
    layout: str | None = None  # None: the backend's own
    causal: bool = True
    window_left: int = -1
    soft_cap: float = 0.0
    sm_scale: float | None = None
    alibi: bool = False
    sinks: bool = False
    k_scale: float = 1.0
    v_scale: float = 1.0
    descales: bool = False  # of q, K and V, by kv head
    unified_max: float | None = None
    prefix_groups: tuple[tuple[int, tuple[int, ...]], ...] = ()
    lists_per_head: bool = False
    batch_invariant: bool = False
    num_workers: int | None = None
    planner: tuple[tuple[str, int], ...] = ()

    @property
    def torch_dtype(self) -> torch.dtype:
        return KV_FLOAT_DTYPES[self.dtype]


@dataclasses.dataclass
class Tensors:
    """A case's inputs. Made once, so that a case can be run in several ways over the same numbers."""

    q: torch.Tensor
    kv: testing.PagedKv
    cu_seqlens_q: torch.Tensor
    kv_lens: torch.Tensor
    alibi_slopes: torch.Tensor | None
    sinks: torch.Tensor | None
    descales: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)

    @property
    def out_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.q.dtype == torch.float8_e4m3fn else self.q.dtype

    @property
    def values(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What q, K and V stand for."""
        q, k, v = self.q.double(), self.kv.k, self.kv.v
        if not self.descales:
            return q, k, v
        by_head = {name: scale.double().view(-1, 1, 1) for name, scale in self.descales.items()}
        q = q.unflatten(1, (k.size(1), -1)) * by_head["q_descale"]
        return q.flatten(1, 2), k * by_head["k_descale"], v * by_head["v_descale"]


def make_tensors(case: Case) -> Tensors:
    num_qo_heads, num_kv_heads = case.heads
    num_tokens = sum(case.q_lens)
    lengths = torch.tensor(case.kv_lens, dtype=torch.int32)
    lists = list(case.kv_lens)
    if case.lists_per_head:
        lengths = lengths.unsqueeze(1).repeat(1, num_kv_heads)
        lengths[:, 1::2] = torch.maximum(lengths[:, 1::2] // 2, torch.tensor(case.q_lens).unsqueeze(1).int())
        lists = lengths.flatten().tolist()
    prefix = case.prefix_groups[0] if case.prefix_groups else None
    kv = testing.paged_kv(
        lists, num_kv_heads=num_kv_heads, head_dim=case.head_dim, head_dim_vo=case.head_dim_vo, page_size=case.page_size,
        kv_dtype=case.kv_dtype, layout=layout_or_own(case.layout), shared_prefix=(prefix[0], list(prefix[1])) if prefix else None,
        k_scale=case.k_scale, v_scale=case.v_scale,
    )
    # The heads of a fused QKV projection: neither dimension but the last is contiguous.
    q = testing.Guarded((num_tokens, num_qo_heads, case.head_dim), case.torch_dtype,
                        fill=torch.randn(num_tokens, num_qo_heads, case.head_dim)).tensor
    return Tensors(
        q=q, kv=kv, cu_seqlens_q=torch.tensor([0, *case.q_lens]).cumsum(0).int(), kv_lens=lengths,
        alibi_slopes=-torch.rand(num_qo_heads) if case.alibi else None,
        sinks=torch.randn(num_qo_heads) if case.sinks else None,
        descales={f"{name}_descale": torch.rand(num_kv_heads) + 0.5 for name in "qkv"} if case.descales else {},
    )


def make_plan(case: Case, t: Tensors) -> ops.AttentionPlan:
    planner = ops.AttentionPlanner(
        *case.heads, case.head_dim_vo or case.head_dim, page_size=case.page_size, num_workers=case.num_workers,
        causal=case.causal, window_left=case.window_left, batch_invariant=case.batch_invariant, **dict(case.planner),
    )
    plan = planner.plan(t.cu_seqlens_q, t.kv_lens, [(n, list(members)) for n, members in case.prefix_groups])
    plan.workspace.fill_(math.nan)
    return plan


def run(case: Case, t: Tensors, plan: ops.AttentionPlan | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The op's out and lse, every write outside of them caught."""
    out = testing.Guarded((t.q.size(0), t.q.size(1), case.head_dim_vo or case.head_dim), t.out_dtype)
    lse, lse_memory = testing.guarded_contiguous((t.q.size(0), t.q.size(1)), torch.float32)
    ops.attention(
        t.q, t.kv.cache, t.kv.block_table, make_plan(case, t) if plan is None else plan, sm_scale=case.sm_scale,
        logits_soft_cap=case.soft_cap, alibi_slopes=t.alibi_slopes, sinks=t.sinks, unified_max=case.unified_max,
        out=out.tensor, lse=lse, **t.descales,
    )
    out.assert_untouched_outside()
    testing.assert_margins(lse_memory)
    return out.tensor.clone(), lse.clone()


def exact(case: Case, t: Tensors, one_group: Callable = reference.one_group) -> tuple[torch.Tensor, torch.Tensor]:
    return reference.attention(
        *t.values, t.kv.block_table, t.cu_seqlens_q, t.kv_lens, causal=case.causal, window_left=case.window_left,
        sm_scale=case.sm_scale, logits_soft_cap=case.soft_cap, alibi_slopes=t.alibi_slopes, sinks=t.sinks, one_group=one_group,
    )


def plain_one_group(q, k, v, mask, *, shuffle, dtype, weight_dtype, sm_scale, logits_soft_cap, alibi_slopes, sinks):
    """What a user would write in torch: matmul, softmax, matmul, every result in `dtype`, what it multiplies V by in
    `weight_dtype`; sums in some order."""
    q_len, kv_len = mask.shape
    distance = torch.arange(kv_len) - torch.arange(kv_len - q_len, kv_len).unsqueeze(1)
    keys = torch.randperm(kv_len) if shuffle else torch.arange(kv_len)
    dims = torch.randperm(q.shape[2]) if shuffle else torch.arange(q.shape[2])
    used = mask.any(0).unsqueeze(1)
    q = q[..., dims].to(dtype)
    k, v = torch.where(used, k, 0.0)[keys][:, dims].to(dtype), torch.where(used, v, 0.0)[keys].to(dtype)
    scores = (q @ k.T) * sm_scale
    if logits_soft_cap > 0:
        scores = logits_soft_cap * torch.tanh(scores / logits_soft_cap)
    scores = scores + (alibi_slopes.view(-1, 1, 1) * distance[:, keys]).to(dtype)
    scores = scores.masked_fill(~mask[:, keys], -math.inf)
    scores = torch.cat([scores, sinks.to(dtype).view(-1, 1, 1).expand(-1, q_len, 1)], 2)
    empty = ~mask.any(1)
    weight = torch.softmax(scores, 2)[..., :-1].to(weight_dtype).to(dtype)
    out = torch.where(empty.unsqueeze(1), 0.0, (weight @ v).double())
    return out, torch.where(empty, -math.inf, torch.logsumexp(scores.float(), 2).double())


def plain(case: Case, t: Tensors, want: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain torch in the coarser of q's and the cache's dtype (quantised caches: over the values they represent; fp8 has no
    arithmetic of its own and counts as bfloat16, but under an fp8 q the weights are e4m3).

    One order of summation may happen to round well, so each element is the worst of four.
    """
    computes = {**FLOAT_DTYPES, "fp8": torch.bfloat16}
    dtype = max(t.out_dtype, computes.get(case.kv_dtype, t.out_dtype), key=lambda d: torch.finfo(d).eps)
    weight_dtype = torch.float8_e4m3fn if t.q.dtype == torch.float8_e4m3fn else dtype
    orders = [
        functools.partial(plain_one_group, shuffle=attempt > 0, dtype=dtype, weight_dtype=weight_dtype) for attempt in range(4)
    ]
    outs, lses = zip(*[exact(case, t, one_group) for one_group in orders], strict=True)
    return testing.worst_of(list(outs), want[0]), testing.worst_of(list(lses), want[1])


def check(case: Case, t: Tensors | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the case and holds it to the project's error rule."""
    t = make_tensors(case) if t is None else t
    out, lse = run(case, t)
    want = exact(case, t)
    for got, exactly, plainly, name in zip((out, lse), want, plain(case, t, want), ("out", "lse"), strict=True):
        testing.assert_within(got, exactly, testing.plain_bound(exactly, plainly, got.dtype), name)
    return out, lse
