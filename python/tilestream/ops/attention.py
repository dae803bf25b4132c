"""Paged variable-length attention from a plan, and the merge of partial states."""

from __future__ import annotations

import torch

from tilestream.ops.kv_cache import KvCache
from tilestream.ops.plan import AttentionPlan


def attention(
    q: torch.Tensor,
    kv_cache: KvCache,
    block_table: torch.Tensor,
    plan: AttentionPlan,
    *,
    sm_scale: float | None = None,
    logits_soft_cap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    unified_max: float | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend a step's queries over the paged KV cache: prefill chunks, decodes and shared prefixes in one launch.

    out[t, h] = softmax(mask(cap(sm_scale * q[t, h] . K[h // group_size]))) . V[h // group_size]

    Args:
        q: [num_tokens, num_qo_heads, head_dim], float32, float16 or bfloat16, last dim contiguous; requests packed
            one after another as in the plan's cu_seqlens_q. Rows past the plan's tokens are left alone. With an fp8 cache
            also float8_e4m3fn: on Hopper both products are then of e4m3, and so are the weights; elsewhere q counts as
            bfloat16.
        kv_cache: pages of one layer; this step's own tokens already appended.
        block_table: [batch_size, max_pages_per_seq] (or [batch_size * num_kv_heads, ...] for a plan with per-head
            lists), int32; entries past a request's length are never read.
        plan: from AttentionPlanner.plan; it fixes causality, window and lengths.
        sm_scale: multiplies q . k; default head_dim ** -0.5.
        logits_soft_cap: s <- cap * tanh(s / cap) after sm_scale and before masks; 0 is off.
        alibi_slopes: [num_qo_heads], float32: adds slope * (key position - query position).
        sinks: [num_qo_heads], float32: exp(sink) joins the denominator, and the lse.
        unified_max: about the largest logit (after sm_scale, soft cap and ALiBi) of every row, known beforehand, as
            calibration gives it. CUDA decodes with a float16 or bfloat16 product then neither look for the maximum nor
            rescale: they weigh by exp(logit - unified_max), and a job with a row whose largest logit turns out to be too
            far from it for the weights' range is done again with the online softmax. The result is the same but for
            rounding. Not used with a batch-invariant plan; the CPU backend always keeps the online softmax, whose
            rescaling is not what binds it.
        q_descale, k_descale, v_descale: [num_kv_heads], float32, for a float8 q: value = stored * descale, one number for
            each kv head (of q: for its q heads); k_scale and v_scale of the cache still count.
        out: [num_tokens, num_qo_heads, head_dim_vo], as q, for a float8 q of any other dtype of q; allocated when None, for a
            float8 q in bfloat16.
        lse: [num_tokens, num_qo_heads], float32, written when given: natural log of the denominator.
    Returns:
        out. A row that sees no key is 0, with lse = -inf.
    Raises:
        ValueError, TypeError: which argument, what it was, what is allowed; on the CPU page ids are checked too.
        RuntimeError: a CUDA graph is being captured, and the plan is not of a planner with reserved buffers.
    Error: at most 2x plain torch in the cache's dtype (fp8: in bfloat16; under a float8 q with weights rounded to e4m3), against
    reference.attention in float64.
    Source: FlashAttention-2 (2307.08691); stream-K decode, Lean Attention (2405.10480); unified maximum,
    FlashDecoding++ (2311.01282), section 3. Reads: KV once per q tile.
    Deterministic: yes; bitwise independent of the batch with a batch-invariant plan.
    """
    if q.is_cuda and not plan.fixed and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "attention is captured in a CUDA graph with a plan whose buffers may move; call AttentionPlanner.reserve() with "
            "the largest step first"
        )
    if out is None:
        dtype = torch.bfloat16 if q.dtype == torch.float8_e4m3fn else q.dtype
        out = q.new_empty(q.size(0), q.size(1), kv_cache.head_dim_vo, dtype=dtype)
    torch.ops.tilestream.attention(
        q,
        kv_cache.k_cache,
        kv_cache.v_cache,
        kv_cache.kv_scales,
        block_table,
        plan.plan,
        plan.host_plan,
        plan.workspace,
        out,
        lse,
        alibi_slopes,
        sinks,
        sm_scale=q.size(-1) ** -0.5 if sm_scale is None else sm_scale,
        logits_soft_cap=logits_soft_cap,
        k_scale=kv_cache.k_scale,
        v_scale=kv_cache.v_scale,
        blocked=kv_cache.blocked,
        int4=kv_cache.int4,
        unified_max=unified_max,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
    )
    return out


def merge_states(v: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge partial attention results over disjoint key sets.

    Args:
        v: [num_tokens, num_states, num_heads, head_dim], float32, float16 or bfloat16, contiguous.
        lse: [num_tokens, num_states, num_heads], float32, natural log; -inf marks an empty state, whose v is ignored.
    Returns:
        out: [num_tokens, num_heads, head_dim], as v.   lse: [num_tokens, num_heads], float32.
        Where every state is empty, 0 and -inf.
    Raises:
        ValueError, TypeError: which argument, what it was, what is allowed.
    Source: FlashAttention-2 section 3.1. Deterministic: yes, in the order of the states.
    """
    out = v.new_empty(v.size(0), v.size(2), v.size(3))
    out_lse = torch.empty(v.size(0), v.size(2), dtype=torch.float32, device=v.device)
    torch.ops.tilestream.merge_states(v, lse, out, out_lse)
    return out, out_lse
