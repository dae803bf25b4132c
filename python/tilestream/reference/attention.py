"""Paged attention in float64, one request and one kv head at a time."""

import math
from collections.abc import Callable

import torch


def visible(q_len: int, kv_len: int, *, causal: bool, window_left: int = -1) -> torch.Tensor:
    """Which keys each of the last `q_len` tokens of a list of `kv_len` sees.

    Returns:
        bool [q_len, kv_len]: key j for query i at position p = kv_len - q_len + i iff (not causal or j <= p) and
        (window_left < 0 or j >= p - window_left).
    """
    position = torch.arange(kv_len - q_len, kv_len).unsqueeze(1)
    key = torch.arange(kv_len).unsqueeze(0)
    mask = torch.ones(q_len, kv_len, dtype=torch.bool)
    if causal:
        mask &= key <= position
    if window_left >= 0:
        mask &= key >= position - window_left
    return mask


def one_group(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, *, sm_scale: float,
              logits_soft_cap: float, alibi_slopes: torch.Tensor,
              sinks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(mask(cap(sm_scale q . k) + slope (key - query position))) v for the q heads of one kv head.

    Args:
        q: [group_size, q_len, head_dim].   k, v: [kv_len, head_dim], NaN allowed where no query sees them.
        mask: bool [q_len, kv_len].
        alibi_slopes: [group_size].
        sinks: [group_size]: exp(sink) joins the denominator; -inf is off.
    Returns:
        out: [group_size, q_len, head_dim_vo], lse: [group_size, q_len], float64; a row that sees no key gives 0, -inf.
    """
    used = mask.any(0).unsqueeze(1)
    k = torch.where(used, k.double(), 0.0)
    v = torch.where(used, v.double(), 0.0)
    scores = sm_scale * (q.double() @ k.T)
    if logits_soft_cap > 0:
        scores = logits_soft_cap * torch.tanh(scores / logits_soft_cap)
    q_len, kv_len = mask.shape
    distance = torch.arange(kv_len) - torch.arange(kv_len - q_len, kv_len).unsqueeze(1)
    scores = scores + alibi_slopes.double().view(-1, 1, 1) * distance
    scores = torch.where(mask, scores, -math.inf)
    lse = torch.logsumexp(torch.cat([scores, sinks.double().view(-1, 1, 1).expand(-1, q_len, 1)], 2), 2)
    weight = torch.exp(scores - torch.where(lse == -math.inf, 0.0, lse).unsqueeze(2))
    empty = ~mask.any(1)
    return torch.where(empty.unsqueeze(1), 0.0, weight @ v), torch.where(empty, -math.inf, lse)


def gather_pages(cache: torch.Tensor, pages: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """The first `num_tokens` rows of a page list of one kv head.

    Args:
        cache: [num_pages, page_size, head_dim].
        pages: [max_pages] page ids.
    Returns:
        [num_tokens, head_dim].
    """
    page_size = cache.shape[1]
    needed = -(-num_tokens // page_size)
    return cache[pages[:needed].long()].flatten(0, 1)[:num_tokens]


def attention(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor,
              cu_seqlens_q: torch.Tensor, kv_lens: torch.Tensor, *, sm_scale: float | None = None, causal: bool = True,
              window_left: int = -1, logits_soft_cap: float = 0.0, alibi_slopes: torch.Tensor | None = None,
              sinks: torch.Tensor | None = None,
              one_group: Callable = one_group) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of every request's new tokens over its pages.

    Args:
        q: [num_tokens, num_qo_heads, head_dim].
        k_cache, v_cache: [num_pages, num_kv_heads, page_size, head_dim] values (dequantised if the cache is not).
        block_table: [batch_size, max_pages_per_seq], or [batch_size * num_kv_heads, ...] when kv_lens is 2-D.
        cu_seqlens_q: [batch_size + 1].
        kv_lens: [batch_size], or [batch_size, num_kv_heads] for page lists of each head's own: then positions are
            those in the list.
        one_group: computes one request and kv head; tests put plain torch here.
    Returns:
        out: [num_tokens, num_qo_heads, head_dim_vo], lse: [num_tokens, num_qo_heads], float64, natural log, sinks
        included.
    """
    num_tokens, num_qo_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[1]
    group_size = num_qo_heads // num_kv_heads
    sm_scale = head_dim**-0.5 if sm_scale is None else sm_scale
    out = torch.zeros(num_tokens, num_qo_heads, v_cache.shape[-1], dtype=torch.float64)
    lse = torch.full((num_tokens, num_qo_heads), -math.inf, dtype=torch.float64)
    slopes = torch.zeros(num_qo_heads) if alibi_slopes is None else alibi_slopes
    sinks = torch.full((num_qo_heads,), -math.inf) if sinks is None else sinks
    per_head = kv_lens.dim() == 2
    for b in range(len(cu_seqlens_q) - 1):
        tokens = slice(int(cu_seqlens_q[b]), int(cu_seqlens_q[b + 1]))
        for kv_head in range(num_kv_heads):
            heads = slice(kv_head * group_size, (kv_head + 1) * group_size)
            kv_len = int(kv_lens[b, kv_head] if per_head else kv_lens[b])
            pages = block_table[b * num_kv_heads + kv_head if per_head else b]
            k = gather_pages(k_cache[:, kv_head], pages, kv_len)
            v = gather_pages(v_cache[:, kv_head], pages, kv_len)
            mask = visible(tokens.stop - tokens.start, kv_len, causal=causal, window_left=window_left)
            group_out, group_lse = one_group(
                q[tokens, heads].transpose(0, 1), k, v, mask, sm_scale=sm_scale, logits_soft_cap=logits_soft_cap,
                alibi_slopes=slopes[heads], sinks=sinks[heads])
            out[tokens, heads], lse[tokens, heads] = group_out.transpose(0, 1), group_lse.T
    return out, lse
