"""FlashInfer's interface, as far as the benches use it, in plain torch: what a wrong page, length or scale would change, shows.

Signatures as in FlashInfer 0.6.13. K and V lie in pages of [num_pages, num_kv_heads, page_size, head_dim] (HND) but for the
ragged wrapper, which takes [num_tokens, num_kv_heads, head_dim] (NHD).
"""

from __future__ import annotations

from itertools import pairwise

import torch


def _attend(q, keys_and_values, causal):
    """q: [num_tokens, num_qo_heads, dim], one request's. Output and log-sum-exps in base e."""
    k, v = (x.float().repeat_interleave(q.size(1) // x.size(1), 1) for x in keys_and_values)
    logits = torch.einsum("qhd,khd->hqk", q.float(), k) * q.size(2) ** -0.5
    if causal:
        logits += torch.full_like(logits[0], -torch.inf).triu(k.size(0) - q.size(0) + 1)
    return torch.einsum("hqk,khd->qhd", logits.softmax(-1), v), logits.logsumexp(-1).T


def _attend_all(q, starts, keys_and_values, causal):
    parts = [_attend(q[begin:end], kv, causal) for (begin, end), kv in zip(pairwise(starts), keys_and_values, strict=True)]
    return tuple(map(torch.cat, zip(*parts)))


def _requests(pages, indptr, indices, lengths):
    """Each request's keys and values, out of its pages."""
    for (begin, end), length in zip(pairwise(indptr), lengths, strict=True):
        yield [cache[indices[begin:end].long()].transpose(1, 2).flatten(0, 1)[: int(length)] for cache in pages]


class _Paged:
    def __init__(self, float_workspace_buffer, kv_layout="NHD"):
        assert kv_layout == "HND"

    def _plan(self, qo_indptr, kv_indptr, kv_indices, last_page_len, heads, causal, q_data_type, kv_data_type):
        *self.heads, self.page_size = heads
        assert all(x.dtype == torch.int32 for x in (qo_indptr, kv_indptr, kv_indices, last_page_len))
        lengths = (kv_indptr.diff() - 1) * self.page_size + last_page_len
        self.starts, self.table, self.causal = qo_indptr, (kv_indptr, kv_indices, lengths), causal
        self.dtypes = q_data_type, kv_data_type

    def _run(self, q, pages, *scales, out=None):
        assert (q.dtype, pages[0].dtype) == self.dtypes
        assert [q.size(1), pages[0].size(1), q.size(2), pages[0].size(2)] == [*self.heads, self.page_size]
        result, lse = _attend_all(q, self.starts, _requests(pages, *self.table), self.causal)
        return (result.bfloat16() if out is None else out.copy_(result)), lse


class BatchPrefillWithPagedKVCacheWrapper(_Paged):
    def __init__(self, float_workspace_buffer, kv_layout="NHD", *, backend="auto"):
        super().__init__(float_workspace_buffer, kv_layout)
        self.backend = backend

    def plan(self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads,
             head_dim_qk, page_size, *, causal=False, q_data_type="float16", kv_data_type=None,
             o_data_type=None):  # fmt: skip
        assert self.backend == "fa3" or q_data_type == torch.bfloat16
        self.num_scales = 3 if q_data_type == torch.float8_e4m3fn else 0
        heads = num_qo_heads, num_kv_heads, head_dim_qk, page_size
        table = paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len
        self._plan(qo_indptr, *table, heads, causal, q_data_type, kv_data_type)

    def run(self, q, paged_kv_cache, *args, out=None):
        assert len(args) == self.num_scales
        return self._run(q, paged_kv_cache, out=out)[0]


class BatchDecodeWithPagedKVCacheWrapper(_Paged):
    def __init__(self, float_workspace_buffer, kv_layout="NHD", *, use_tensor_cores=False):
        super().__init__(float_workspace_buffer, kv_layout)

    def plan(self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, *, q_data_type="float16",
             kv_data_type=None):  # fmt: skip
        one_each = torch.arange(len(indptr), dtype=torch.int32)
        heads = num_qo_heads, num_kv_heads, head_dim, page_size
        self._plan(one_each, indptr, indices, last_page_len, heads, False, q_data_type, kv_data_type)

    def run(self, q, paged_kv_cache, *, out=None):
        return self._run(q, paged_kv_cache, out=out)[0]


class BatchPrefillWithRaggedKVCacheWrapper:
    def __init__(self, float_workspace_buffer, kv_layout="NHD", *, backend="auto"):
        assert kv_layout == "NHD"

    def plan(self, qo_indptr, kv_indptr, num_qo_heads, num_kv_heads, head_dim_qk, *, causal=False, q_data_type="float16",
             kv_data_type=None):  # fmt: skip
        self.starts, self.kv_starts, self.causal = qo_indptr, kv_indptr, causal
        self.heads = num_qo_heads, num_kv_heads, head_dim_qk

    def run(self, q, k, v, *, out=None):
        assert (q.size(1), k.size(1), q.size(2)) == self.heads
        kv = [(k[begin:end], v[begin:end]) for begin, end in pairwise(self.kv_starts)]
        return out.copy_(_attend_all(q, self.starts, kv, self.causal)[0])


class BatchAttention(_Paged):
    def __init__(self, kv_layout="NHD", device="cuda"):
        super().__init__(None, kv_layout)

    def plan(self, qo_indptr, kv_indptr, kv_indices, kv_len_arr, num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo,
             page_size, *, causal=False, q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16):  # fmt: skip
        last = (kv_len_arr - 1) % page_size + 1
        heads = num_qo_heads, num_kv_heads, head_dim_qk, page_size
        self._plan(qo_indptr, kv_indptr, kv_indices, last, heads, causal, q_data_type, kv_data_type)

    def run(self, q, kv_cache, out=None, lse=None):
        result, lse[:] = self._run(q, kv_cache, out=out)
        return result, lse


class BatchPODWithPagedKVCacheWrapper:
    def __init__(self, float_workspace_buffer, kv_layout="NHD"):
        self.sides = [_Paged(float_workspace_buffer, kv_layout) for _ in range(2)]

    def plan(self, qo_indptr_p, kv_indptr_p, kv_indices_p, last_page_len_p, qo_indptr_d, kv_indptr_d, kv_indices_d,
             last_page_len_d, num_qo_heads, num_kv_heads, head_dim, page_size, *, q_data_type="float16",
             kv_data_type=None):  # fmt: skip
        chunk = qo_indptr_p, kv_indptr_p, kv_indices_p, last_page_len_p
        decodes = qo_indptr_d, kv_indptr_d, kv_indices_d, last_page_len_d
        for side, table in zip(self.sides, (chunk, decodes)):
            side._plan(*table, (num_qo_heads, num_kv_heads, head_dim, page_size), False, q_data_type, kv_data_type)

    def run(self, q_p, paged_kv_cache_p, q_d, paged_kv_cache_d, *, causal_p=False):
        self.sides[0].causal = causal_p
        return self.sides[0]._run(q_p, paged_kv_cache_p)[0], self.sides[1]._run(q_d, paged_kv_cache_d)[0]


class MultiLevelCascadeAttentionWrapper:
    def __init__(self, num_levels, float_workspace_buffer, kv_layout="NHD"):
        self.levels = [_Paged(float_workspace_buffer, kv_layout) for _ in range(num_levels)]

    def plan(self, qo_indptr_arr, paged_kv_indptr_arr, paged_kv_indices_arr, paged_kv_last_page_len, num_qo_heads, num_kv_heads,
             head_dim, page_size, *, q_data_type="float16", kv_data_type=None):  # fmt: skip
        tables = zip(qo_indptr_arr, paged_kv_indptr_arr, paged_kv_indices_arr, paged_kv_last_page_len, strict=True)
        for level, table in zip(self.levels, tables, strict=True):
            level._plan(*table, (num_qo_heads, num_kv_heads, head_dim, page_size), False, q_data_type, kv_data_type)

    def run(self, q, paged_kv_cache):
        outs, lses = zip(*(level._run(q, paged_kv_cache) for level in self.levels))
        weights = torch.stack(lses).softmax(0)[..., None]
        return (torch.stack(outs).float() * weights).sum(0)


class decode:  # noqa: N801: a module there
    @staticmethod
    def trtllm_batch_decode_with_kv_cache(query, kv_cache, workspace_buffer, block_tables, seq_lens, max_seq_len, *,
                                          bmm1_scale=1.0, bmm2_scale=1.0, out=None, kv_layout="HND",
                                          backend="auto"):  # fmt: skip
        assert not workspace_buffer.any() and max_seq_len == seq_lens.max()
        page_size = kv_cache[0].size(2)
        counts = -(-seq_lens // page_size)
        indptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        indices = torch.cat([row[:count] for row, count in zip(block_tables, counts)])
        starts, requests = torch.arange(len(query) + 1), _requests(kv_cache, indptr, indices, seq_lens)
        q = query.float() * (bmm1_scale * query.size(2) ** 0.5)
        return out.copy_(_attend_all(q, starts, requests, False)[0] * bmm2_scale)
