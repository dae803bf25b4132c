"""attention however its step is cut: workers, tiles, threads, prefix groups, per-head lists, batch invariance."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.attention_case import Case, Tensors, check, make_plan, make_tensors, run
from tilestream import ops, testing
from tilestream.reference.plan import decode_plan

STEP = Case(q_lens=(1, 40, 1, 3, 1), kv_lens=(300, 40, 1, 150, 65), dtype="bfloat16", kv_dtype="bfloat16")
KV_DTYPES = ["float32", "bfloat16", "fp8", "int8", "int4"]


@pytest.mark.simt(archs=(80, 90))
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("num_workers", [1, 2, 3, 7, 64])
def test_any_number_of_workers(backend: testing.Backend, num_workers: int, kv_dtype: str) -> None:
    check(dataclasses.replace(STEP, num_workers=num_workers, kv_dtype=kv_dtype))


@pytest.mark.simt(archs=(80, 90))
@pytest.mark.parametrize("tile_keys", [16, 32, 64, 128])
@pytest.mark.parametrize("tile_rows", [2, 5, 16, 96])
def test_any_tile_size(backend: testing.Backend, tile_rows: int, tile_keys: int) -> None:
    planner = (("tile_rows", tile_rows), ("tile_keys", tile_keys), ("split_tokens", 2 * tile_keys))
    check(dataclasses.replace(STEP, num_workers=4, planner=planner))
    check(dataclasses.replace(STEP, num_workers=4, planner=planner, batch_invariant=True, window_left=50))


@pytest.mark.simt(archs=(80, 90))
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("window_left", [-1, 50])
def test_narrow_lists_and_merge_information(backend: testing.Backend, window_left: int, kv_dtype: str) -> None:
    """Kernels that know one kind of list walk all of them, and leave the merge information alone."""
    planner = (("narrow_rows", 16), ("merge_inside", True))
    case = dataclasses.replace(STEP, num_workers=4, kv_dtype=kv_dtype, window_left=window_left, planner=planner)
    check(case)
    plan = decode_plan(make_plan(case, make_tensors(case)).host_plan)
    assert plan.num_narrow_workers == 4 and plan.merge_of_row


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_threads_do_not_matter(backend: testing.Backend, set_num_threads, kv_dtype: str) -> None:
    """A plan's jobs are dealt to its workers; how many threads there are to run them changes nothing."""
    case = dataclasses.replace(STEP, num_workers=4, kv_dtype=kv_dtype)
    t = make_tensors(case)
    plan = make_plan(case, t)
    want = run(case, t, plan)
    for num in (1, 2, 3, 7):
        set_num_threads(num)
        assert all(torch.equal(a, b) for a, b in zip(run(case, t, plan), want, strict=True))


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_layouts_agree_bit_for_bit(backend: testing.Backend, kv_dtype: str) -> None:
    results = []
    for layout in ("hnd", "nhd", "blocked"):
        case = dataclasses.replace(STEP, kv_dtype=kv_dtype, layout=layout, num_workers=3)
        torch.manual_seed(1)
        results.append(run(case, make_tensors(case)))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.simt(archs=(80, 90))
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("variant", [{}, {"sinks": True, "soft_cap": 8.0}], ids=str)
@pytest.mark.parametrize("num_workers", [1, 3, 8])
def test_prefix_groups(backend: testing.Backend, num_workers: int, variant: dict, kv_dtype: str) -> None:
    """Three of four requests share 64 tokens; the group's job takes the queries of all three."""
    case = Case(q_lens=(1, 5, 2, 1), kv_lens=(100, 90, 64 + 2, 130), dtype="bfloat16", kv_dtype=kv_dtype,
                prefix_groups=((64, (0, 1, 3)),), num_workers=num_workers, **variant)
    t = make_tensors(case)
    assert torch.equal(t.kv.block_table[0, :4], t.kv.block_table[3, :4])
    check(case, t)
    check(dataclasses.replace(case, batch_invariant=True), t)


@pytest.mark.simt(archs=(80, 90))
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("num_workers", [1, 4])
def test_per_head_lists(backend: testing.Backend, num_workers: int, kv_dtype: str) -> None:
    """Every kv head has pages and a length of its own, as streaming and page-sparse heads do."""
    check(Case(q_lens=(1, 4, 1), kv_lens=(120, 60, 17), heads=(6, 3), dtype="bfloat16", kv_dtype=kv_dtype,
               lists_per_head=True, num_workers=num_workers))


@settings(max_examples=30)
@given(st.data())
def test_random_steps(data: st.DataObject) -> None:
    requests = data.draw(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 200)), min_size=1, max_size=6), "q, earlier")
    group_size, num_kv_heads = data.draw(st.integers(1, 5), "group"), data.draw(st.integers(1, 3), "kv heads")
    torch.manual_seed(data.draw(st.integers(0, 2**31 - 1), "seed"))
    check(Case(
        q_lens=tuple(q for q, _ in requests), kv_lens=tuple(q + earlier for q, earlier in requests),
        heads=(group_size * num_kv_heads, num_kv_heads), head_dim=data.draw(st.sampled_from([16, 64, 80]), "head_dim"),
        page_size=data.draw(st.sampled_from([16, 32, 64]), "page"), kv_dtype=data.draw(st.sampled_from(KV_DTYPES), "cache"),
        dtype="bfloat16", layout=data.draw(st.sampled_from(["hnd", "nhd", "blocked"]), "layout"),
        causal=data.draw(st.booleans(), "causal"), window_left=data.draw(st.sampled_from([-1, 0, 5, 64]), "window"),
        sinks=data.draw(st.booleans(), "sinks"), num_workers=data.draw(st.integers(1, 9), "workers"),
        batch_invariant=data.draw(st.booleans(), "invariant"),
    ))


INVARIANT = Case(batch_invariant=True, planner=(("split_tokens", 128),), dtype="bfloat16", kv_dtype="bfloat16", num_workers=4)


def request_of(t: Tensors, index: int, tokens: slice, kv_len: int) -> Tensors:
    """One request of a step, or the last tokens of its first kv_len, as a step of its own over the same pages."""
    begin = int(t.cu_seqlens_q[index])
    q = t.q[begin + tokens.start : begin + tokens.stop]
    return dataclasses.replace(
        t, q=q, kv=dataclasses.replace(t.kv, block_table=t.kv.block_table[index : index + 1]),
        cu_seqlens_q=torch.tensor([0, len(q)], dtype=torch.int32), kv_lens=torch.tensor([kv_len], dtype=torch.int32))


@pytest.mark.simt(archs=(80, 90))
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("variant", [{}, {"window_left": 70}, {"sinks": True}, {"alibi": True}], ids=str)
def test_batch_invariance(backend: testing.Backend, variant: dict, kv_dtype: str) -> None:
    """A request alone gives the bits that it gives in a batch."""
    lengths = ((1, 700), (90, 90), (1, 129), (50, 400), (1, 5))
    case = dataclasses.replace(INVARIANT, q_lens=tuple(q for q, _ in lengths), kv_lens=tuple(n for _, n in lengths),
                               kv_dtype=kv_dtype, **variant)
    t = make_tensors(case)
    out, lse = run(case, t)
    for index, (q_len, kv_len) in enumerate(lengths):
        begin, num_workers = int(t.cu_seqlens_q[index]), 1 if index % 2 else 7
        alone = run(dataclasses.replace(case, num_workers=num_workers), request_of(t, index, slice(0, q_len), kv_len))
        assert torch.equal(alone[0], out[begin : begin + q_len]), f"request {index}, {num_workers} workers"
        assert torch.equal(alone[1], lse[begin : begin + q_len])


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("variant", [{}, {"window_left": 70}], ids=str)
@pytest.mark.parametrize("group", [(4, 2), (9, 3), (8, 8)])
def test_chunking_invariance(backend: testing.Backend, group: tuple[int, int], variant: dict, kv_dtype: str) -> None:
    """However a prompt is chunked, down to one token at a time, its bits are the same."""
    num_tokens = 300
    case = dataclasses.replace(INVARIANT, q_lens=(num_tokens,), kv_lens=(num_tokens,), kv_dtype=kv_dtype, heads=group, **variant)
    t = make_tensors(case)
    out, lse = run(case, t)
    for chunk in (1, 7, 64, 129):
        begins = range(0, num_tokens, chunk) if chunk > 1 else (0, 1, 15, 16, 63, 64, 127, 128, 129, 255, 256, 299)
        for begin in begins:
            end = min(begin + chunk, num_tokens)
            part = run(case, request_of(t, 0, slice(begin, end), end))
            assert torch.equal(part[0], out[begin:end]), f"tokens {begin} to {end}"
            assert torch.equal(part[1], lse[begin:end])


@pytest.mark.simt(archs=(80, 90))
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("variant", [{}, {"window_left": 37, "sinks": True}], ids=str)
def test_rows_of_a_job_do_not_matter(backend: testing.Backend, variant: dict, kv_dtype: str) -> None:
    """However many rows a job has, and however a kernel divides them among its warps, a row's bits are the same."""
    num_tokens = 70
    case = dataclasses.replace(
        INVARIANT, q_lens=(num_tokens,), kv_lens=(num_tokens,), kv_dtype=kv_dtype, head_dim=80,
        planner=(("tile_rows", 128), ("tile_keys", 16), ("split_tokens", 48)), **variant)
    t = make_tensors(case)
    out, lse = run(case, t)  # jobs of 128 and of 12 rows
    for begin, end in ((0, 1), (69, 70), (47, 49), (30, 38), (20, 29), (10, 50), (5, 70)):  # of 2, 4, 16, 18, 80, 130 rows
        part = run(case, request_of(t, 0, slice(begin, end), end))
        assert torch.equal(part[0], out[begin:end]), f"tokens {begin} to {end}"
        assert torch.equal(part[1], lse[begin:end])


def test_planner_rejects(backend: testing.Backend) -> None:
    with pytest.raises(ValueError, match="num_qo_heads"):
        ops.AttentionPlanner(5, 2, 64)
    with pytest.raises(ValueError, match="page_size"):
        ops.AttentionPlanner(4, 2, 64, page_size=24)
    windowed = Case(q_lens=(1, 1), kv_lens=(70, 70), prefix_groups=((64, (0, 1)),), window_left=30)
    with pytest.raises(ValueError, match="prefix groups need causal on and window_left = -1"):
        make_plan(windowed, make_tensors(windowed))
    sloped = Case(q_lens=(1, 1), kv_lens=(70, 70), prefix_groups=((64, (0, 1)),), alibi=True)
    with pytest.raises(ValueError, match="alibi_slopes need query positions"):
        run(sloped, make_tensors(sloped))


def test_reserved_buffers_stay_and_refuse_what_does_not_fit() -> None:
    planner = ops.AttentionPlanner(4, 2, 64, num_workers=4)
    lens = {size: (torch.arange(size + 1, dtype=torch.int32), torch.full((size,), 300, dtype=torch.int32)) for size in (2, 8)}
    assert not planner.plan(*lens[2]).fixed
    planner.reserve(*lens[2])
    first, second = planner.plan(*lens[2]), planner.plan(*lens[2])
    assert first.fixed and first.workspace.data_ptr() == second.workspace.data_ptr()
    with pytest.raises(ValueError, match=r"takes \d+ int32 and \d+ floats of workspace; reserve\(\) made room for"):
        planner.plan(*lens[8])
    planner.plan(*lens[2])  # the refusal has changed nothing


@pytest.mark.simt(archs=(80, 90))
def test_rows_past_the_plans_tokens_are_left_alone(backend: testing.Backend) -> None:
    """As a captured graph has them, which runs with fewer requests than it was captured for."""
    case = Case(q_lens=(1, 1), kv_lens=(40, 9), dtype="bfloat16", kv_dtype="bfloat16")
    t = make_tensors(case)
    q, out = torch.cat([t.q, torch.full((2, *t.q.shape[1:]), math.nan)]), torch.full((4, 4, 64), 7.0, dtype=torch.bfloat16)
    ops.attention(q.bfloat16(), t.kv.cache, t.kv.block_table, make_plan(case, t), out=out)
    assert torch.equal(out[:2], run(case, t)[0]) and bool((out[2:] == 7).all())
