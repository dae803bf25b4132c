"""attention against float64: shapes, dtypes, layouts and variants. How steps are cut: test_attention_plans.py."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from tests.ops.attention_case import Case, Tensors, check, exact, make_plan, make_tensors, run
from tilestream import ops, testing
from tilestream.testing.paged import KV_FLOAT_DTYPES, stored_pages

pytestmark = pytest.mark.simt(archs=(80, 90))
DTYPES = [  # (q and out, cache)
    ("float32", "float32"),
    ("float16", "float16"),
    ("bfloat16", "bfloat16"),
    ("float32", "bfloat16"),
    ("bfloat16", "fp8"),
    ("float32", "fp8"),
    ("float16", "fp8"),
    ("fp8", "fp8"),
    ("bfloat16", "int8"),
    ("bfloat16", "int4"),
    ("float32", "int8"),
]
each_dtype = pytest.mark.parametrize(("dtype", "kv_dtype"), DTYPES, ids=lambda d: d)
each_layout = pytest.mark.parametrize("layout", ["hnd", "nhd", "blocked"])

MIXED = Case(q_lens=(1, 7, 33, 1), kv_lens=(130, 7, 90, 1))


@each_dtype
@each_layout
@pytest.mark.parametrize("page_size", [16, 32, 64])
def test_layouts(backend: testing.Backend, layout: str, page_size: int, dtype: str, kv_dtype: str) -> None:
    check(dataclasses.replace(MIXED, layout=layout, page_size=page_size, dtype=dtype, kv_dtype=kv_dtype))


@each_dtype
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
def test_head_dims(backend: testing.Backend, head_dim: int, dtype: str, kv_dtype: str) -> None:
    check(Case(q_lens=(1, 9), kv_lens=(70, 20), head_dim=head_dim, dtype=dtype, kv_dtype=kv_dtype))


@each_dtype
@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (8, 8), (9, 3), (64, 1), (12, 4), (7, 7)])
def test_heads(backend: testing.Backend, heads: tuple[int, int], dtype: str, kv_dtype: str) -> None:
    check(Case(q_lens=(1, 5), kv_lens=(40, 5), heads=heads, dtype=dtype, kv_dtype=kv_dtype))


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "fp8", "int4"])
@pytest.mark.parametrize("page_size", [16, 64])
def test_lengths_around_a_page(backend: testing.Backend, page_size: int, kv_dtype: str) -> None:
    lengths = (1, 15, 16, 17, page_size - 1, page_size, page_size + 1, 2 * page_size - 1, 2 * page_size, 200)
    case = Case(page_size=page_size, dtype="bfloat16", kv_dtype=kv_dtype)
    check(dataclasses.replace(case, q_lens=(1,) * len(lengths), kv_lens=lengths))
    check(dataclasses.replace(case, q_lens=lengths[:-1], kv_lens=lengths[:-1]))
    check(dataclasses.replace(case, q_lens=tuple(min(3, n) for n in lengths), kv_lens=lengths))


def test_an_empty_step_and_empty_requests(backend: testing.Backend) -> None:
    check(Case(q_lens=(), kv_lens=()))
    check(Case(q_lens=(0, 1, 0, 4, 0), kv_lens=(0, 5, 9, 20, 64)))


def test_a_row_that_sees_no_key(backend: testing.Backend) -> None:
    """A query without any key gives 0 and -inf."""
    out, lse = check(Case(q_lens=(2, 1), kv_lens=(0, 3), causal=False))
    assert torch.equal(out[:2], torch.zeros_like(out[:2])) and bool((lse[:2] == -math.inf).all())


VARIANTS = [
    {"causal": False},
    {"window_left": 0},
    {"window_left": 1},
    {"window_left": 16},
    {"window_left": 63},
    {"window_left": 20, "causal": False},
    {"soft_cap": 5.0},
    {"sm_scale": 0.5},
    {"alibi": True},
    {"sinks": True},
    {"alibi": True, "causal": False},
    {"soft_cap": 10.0, "window_left": 40, "sinks": True, "alibi": True},
]
each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: ",".join(f"{k}={x}" for k, x in v.items()))


@each_variant
@each_dtype
def test_variants(backend: testing.Backend, variant: dict, dtype: str, kv_dtype: str) -> None:
    check(dataclasses.replace(MIXED, dtype=dtype, kv_dtype=kv_dtype, **variant))


@each_variant
def test_variants_on_every_simd_level(simd_level: str, variant: dict) -> None:
    check(Case(q_lens=(1, 18), kv_lens=(100, 30), dtype="bfloat16", kv_dtype="bfloat16", **variant))


@each_dtype
@each_layout
def test_every_simd_level(simd_level: str, layout: str, dtype: str, kv_dtype: str) -> None:
    check(Case(q_lens=(1, 19, 1), kv_lens=(70, 40, 16), heads=(9, 3), layout=layout, dtype=dtype, kv_dtype=kv_dtype))
    check(Case(q_lens=(2, 1), kv_lens=(33, 64), heads=(2, 1), head_dim=80, layout=layout, dtype=dtype, kv_dtype=kv_dtype))


def test_unequal_head_dims(backend: testing.Backend) -> None:
    for dims in ((192, 128), (64, 128)):
        for kv_dtype in ("bfloat16", "fp8", "int8"):
            check(Case(q_lens=(1, 6), kv_lens=(50, 40), head_dim=dims[0], head_dim_vo=dims[1], dtype="bfloat16",
                       kv_dtype=kv_dtype))


@each_dtype
def test_long_context(backend: testing.Backend, dtype: str, kv_dtype: str) -> None:
    """The error of a sum must not grow with its length faster than torch's does."""
    for num_workers in (1, 5):
        check(Case(q_lens=(1,), kv_lens=(9001,), heads=(3, 1), page_size=64, dtype=dtype, kv_dtype=kv_dtype,
                   num_workers=num_workers))


@each_dtype
def test_large_logits(backend: testing.Backend, dtype: str, kv_dtype: str) -> None:
    """Softmax must be shifted by the running maximum, and rescaled when that grows."""
    case = Case(q_lens=(1, 20), kv_lens=(300, 20), dtype=dtype, kv_dtype=kv_dtype, sm_scale=3.0)
    check(case)


def test_a_nan_in_one_request_stays_there(backend: testing.Backend) -> None:
    for kv_dtype in ("float32", "bfloat16", "fp8", "int8"):
        case = Case(q_lens=(1, 4, 2), kv_lens=(40, 50, 60), kv_dtype=kv_dtype, layout="hnd")
        t = make_tensors(case)
        clean, _ = run(case, t)
        t.q[2] = math.nan  # second token of the second request
        out, lse = run(case, t)
        others = [i for i in range(7) if i != 2]
        assert torch.equal(out[others], clean[others])
        assert bool(out[2].isnan().all()) and bool(lse[2].isnan().all())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("variant", [{}, {"sinks": True}, {"soft_cap": 5.0, "causal": False}], ids=str)
def test_scales_of_an_fp8_cache(backend: testing.Backend, variant: dict, dtype: str) -> None:
    """k_scale joins sm_scale, v_scale the division by the sum; of partial results too."""
    for num_workers in (1, 5):
        check(
            dataclasses.replace(
                MIXED, dtype=dtype, kv_dtype="fp8", k_scale=0.375, v_scale=3.0, num_workers=num_workers, **variant
            )
        )


def test_descales(backend: testing.Backend) -> None:
    """Each kv head's own, of a float8 q and its cache."""
    for num_workers in (1, 5):
        check(
            dataclasses.replace(
                MIXED, dtype="fp8", kv_dtype="fp8", k_scale=0.375, v_scale=3.0, descales=True, num_workers=num_workers
            )
        )


def test_a_float8_q_gives_any_dtype(backend: testing.Backend) -> None:
    t = make_tensors(case := dataclasses.replace(MIXED, dtype="fp8", kv_dtype="fp8"))
    plan = make_plan(case, t)
    rounded = ops.attention(t.q, t.kv.cache, t.kv.block_table, plan)
    out = ops.attention(t.q, t.kv.cache, t.kv.block_table, plan, out=torch.empty_like(rounded, dtype=torch.float32))
    assert rounded.dtype == torch.bfloat16 and torch.equal(out.bfloat16(), rounded)


def check_every_fp8_code(layout: str, dtype: str = "float32") -> None:
    """Request c sees one key, of which one element is code c, and one value, with 64 codes: lse and out are these.

    The key's offset in its page and the element's place in the key change from request to request.
    """
    codes = torch.arange(256)
    k, v = torch.zeros(2, 256, 1, 16, 64, dtype=torch.uint8)
    k[codes, 0, codes % 5, codes * 7 % 64] = codes.byte()
    v[codes, 0, codes % 5] = (codes.unsqueeze(1) + torch.arange(64)).byte()
    k, v = k.view(torch.float8_e4m3fn), v.view(torch.float8_e4m3fn)
    pages = (stored_pages(k, "fp8", layout, side=0), stored_pages(v, "fp8", layout, side=1))
    kv = testing.PagedKv(ops.KvCache(*pages, blocked=layout == "blocked"), codes.int().unsqueeze(1), k.double(), v.double())
    case = Case(q_lens=(1,) * 256, kv_lens=tuple((1 + codes % 5).tolist()), heads=(1, 1), window_left=0, sm_scale=1.0)
    q, cu_seqlens_q = torch.ones(256, 1, 64, dtype=KV_FLOAT_DTYPES[dtype]), torch.arange(257, dtype=torch.int32)
    t = Tensors(q, kv, cu_seqlens_q, torch.tensor(case.kv_lens, dtype=torch.int32), None, None)
    out, lse = run(case, t)
    want_out, want_lse = exact(case, t)
    # 2^-14: a kernel that adds up weights before it rounds them has 1 + 2^-15 for the only weight of a logit of 448.
    for got, want, tolerance in ((out, want_out, 2.0**-14), (lse, want_lse, 1e-6)):
        testing.assert_same_special(got, want)
        assert bool(((got - want).abs() <= (tolerance * want.abs()).clamp_min(1e-6))[want.isfinite()].all())


@pytest.mark.parametrize("layout", ["hnd", "blocked"])
def test_every_fp8_code_on_every_simd_level(simd_level: str, layout: str) -> None:
    check_every_fp8_code(layout)


@pytest.mark.parametrize("dtype", ["float32", "float16", "fp8"])
def test_every_fp8_code(backend: testing.Backend, dtype: str) -> None:
    check_every_fp8_code("hnd", dtype)


def test_second_call_on_the_same_workspace(backend: testing.Backend) -> None:
    case = dataclasses.replace(MIXED, dtype="bfloat16", kv_dtype="bfloat16", num_workers=5)
    t = make_tensors(case)
    plan = make_plan(case, t)
    first = run(case, t, plan)
    second = run(case, t, plan)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rows_at_any_address(backend: testing.Backend, dtype: str) -> None:
    """Rows of q and out that begin at no multiple of 16 bytes."""
    kv_dtype = "float16" if dtype == "float16" else "bfloat16"
    case = Case(q_lens=(1, 40), kv_lens=(70, 40), dtype=dtype, kv_dtype=kv_dtype, num_workers=1)
    t = make_tensors(case)
    want, _ = run(case, t)
    q, out = (torch.zeros(41 * 4 * 65 + 1, dtype=t.q.dtype)[1:].view(41, 4, 65)[..., :64] for _ in range(2))
    ops.attention(q.copy_(t.q), t.kv.cache, t.kv.block_table, make_plan(case, t), out=out)
    assert torch.equal(out, want)


def test_lse_is_optional(backend: testing.Backend) -> None:
    case = dataclasses.replace(MIXED, num_workers=3)
    t = make_tensors(case)
    assert torch.equal(ops.attention(t.q, t.kv.cache, t.kv.block_table, make_plan(case, t)), run(case, t)[0])


def test_page_offsets_are_64_bit(backend: testing.Backend) -> None:
    """Two pages more than 2^31 bytes apart; the memory between is never touched."""
    page_stride = (1 << 31) + 4096
    storage = torch.empty(page_stride + (1 << 16), dtype=torch.uint8)
    case = Case(q_lens=(1,), kv_lens=(30,), heads=(2, 1), kv_dtype="int8", layout="hnd")
    t = make_tensors(case)
    pages = t.kv.block_table[0, :2].long()
    far = [storage[side * 8192 :].as_strided((2, 1, 16, 64), (page_stride, 1024, 64, 1)) for side in (0, 1)]
    for view, cache in zip(far, (t.kv.cache.k_cache, t.kv.cache.v_cache), strict=True):
        view.copy_(cache[pages])
    moved = dataclasses.replace(
        t, kv=dataclasses.replace(
            t.kv, cache=ops.KvCache(far[0], far[1], t.kv.cache.kv_scales[pages].contiguous()),
            block_table=torch.tensor([[0, 1, 1 << 30]], dtype=torch.int32)))
    assert torch.equal(run(case, moved)[0], run(case, t)[0])


def test_opcheck(backend: testing.Backend) -> None:
    for kv_dtype in ("float32", "int4"):
        case = Case(q_lens=(1, 3), kv_lens=(20, 5), kv_dtype=kv_dtype, alibi=True, sinks=True)
        t = make_tensors(case)
        plan = make_plan(case, t)
        c = t.kv.cache
        torch.library.opcheck(
            torch.ops.tilestream.attention.default,
            (t.q, c.k_cache.nan_to_num(), c.v_cache.nan_to_num(), c.kv_scales, t.kv.block_table, plan.plan, plan.host_plan,
             torch.zeros_like(plan.workspace), torch.zeros(4, 4, 64), torch.zeros(4, 4), t.alibi_slopes, t.sinks),
            {"sm_scale": 0.125, "logits_soft_cap": 0.0, "blocked": c.blocked, "int4": c.int4},
        )


def test_page_ids_are_checked_where_they_are_read(backend: testing.Backend) -> None:
    case = Case(q_lens=(1, 1), kv_lens=(40, 17))
    t = make_tensors(case)
    num_pages = t.kv.cache.num_pages
    for row, column, page in ((0, 2, num_pages), (1, 0, -1), (1, 1, 1 << 30)):
        broken = t.kv.block_table.clone()
        broken[row, column] = page
        with pytest.raises(ValueError, match=f"block_table .* holds {page}; allowed: 0 to {num_pages - 1}"):
            run(case, dataclasses.replace(t, kv=dataclasses.replace(t.kv, block_table=broken)))


def _change(t, **changes):
    return dataclasses.replace(t, **changes)


BAD_INPUT = {
    "q dtype": (
        lambda t: _change(t, q=t.q.double()),
        TypeError,
        "q has dtype Double; supported: Float, Half, BFloat16, Float8_e4m3fn",
    ),
    "q of fp8": (
        lambda t: _change(t, q=t.q.to(torch.float8_e4m3fn)),
        TypeError,
        "k_cache has dtype Float; it must be Float8_e4m3fn as q",
    ),
    "q rank": (lambda t: _change(t, q=t.q[:, 0]), ValueError, r"q has 2 dimensions \[3, 64\]; it needs 3"),
    "q tokens": (lambda t: _change(t, q=t.q[:2]), ValueError, r"q has shape \[2, 4, 64\]; the plan was made for 3 tokens"),
    "q heads": (lambda t: _change(t, q=t.q[:, :3]), ValueError, r"q has shape .*dimension 1 must be 4"),
    "q head_dim": (lambda t: _change(t, q=t.q[..., :32]), ValueError, r"q has shape .*dimension 2 must be 64"),
    "q stride": (
        lambda t: _change(t, q=t.q.transpose(0, 2).contiguous().transpose(0, 2)),
        ValueError,
        "q has strides .* last dimension must be contiguous",
    ),
    "alibi": (
        lambda t: _change(t, alibi_slopes=torch.ones(5)),
        ValueError,
        r"alibi_slopes has shape \[5\]; dimension 0 must be 4",
    ),
    "sinks": (lambda t: _change(t, sinks=torch.ones(4).half()), TypeError, "sinks has dtype Half; supported: Float"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input(name: str) -> None:
    change, error, message = BAD_INPUT[name]
    case = Case(q_lens=(1, 2), kv_lens=(20, 5))
    t = make_tensors(case)
    plan = make_plan(case, t)
    with pytest.raises(error, match=message):
        broken = change(t)
        ops.attention(broken.q, t.kv.cache, t.kv.block_table, plan, alibi_slopes=broken.alibi_slopes, sinks=broken.sinks)


BAD_CACHE = {
    "block_table dtype": ({"block_table": torch.zeros(2, 4).long()}, TypeError, "block_table has dtype Long; supported: Int"),
    "block_table rows": (
        {"block_table": torch.zeros(1, 4).int()},
        ValueError,
        r"block_table has shape \[1, 4\]; the plan needs 2 rows",
    ),
    "block_table columns": ({"block_table": torch.zeros(2, 1).int()}, ValueError, r"longest list has 20 tokens, that is 2 pages"),
    "plan": ({"plan": torch.zeros(100).int()}, ValueError, "host_plan does not hold a plan"),
    "short plan": ({"plan": torch.zeros(3).int()}, ValueError, "host_plan has 3 elements"),
    "out": ({"out": torch.zeros(3, 4, 32)}, ValueError, r"out has shape \[3, 4, 32\]; dimension 2 must be 64"),
    "descale": ({"q_descale": torch.ones(2)}, ValueError, "q_descale is given for a Float q; only a Float8_e4m3fn q"),
    "lse": ({"lse": torch.zeros(3, 5)}, ValueError, r"lse has shape \[3, 5\]; dimension 1 must be 4"),
    "soft cap": ({"logits_soft_cap": -1.0}, ValueError, "logits_soft_cap is -1; allowed: 0"),
    "page size": (
        {"cache": ops.KvCache(*[torch.zeros(9, 2, 32, 64)] * 2)},
        ValueError,
        "k_cache has page_size 32; the plan was made for 16",
    ),
    "odd page size": (
        {"cache": ops.KvCache(*[torch.zeros(9, 2, 24, 64)] * 2)},
        ValueError,
        "page_size 24; supported: 16, 32, 64",
    ),
    "head_dim": ({"cache": ops.KvCache(*[torch.zeros(9, 2, 16, 72)] * 2)}, ValueError, "head_dim 72; supported: multiples of 16"),
    "kv heads": (
        {"cache": ops.KvCache(*[torch.zeros(9, 4, 16, 64)] * 2)},
        ValueError,
        "k_cache has 4 kv heads; the plan was made for 2",
    ),
    "sides": ({"cache": ops.KvCache(torch.zeros(9, 2, 16, 64), torch.zeros(8, 2, 16, 64))}, ValueError, "v_cache has shape"),
    "dtypes": (
        {"cache": ops.KvCache(torch.zeros(9, 2, 16, 64), torch.zeros(9, 2, 16, 64).half())},
        TypeError,
        "v_cache has dtype Half; it must be Float as k_cache",
    ),
    "k_scale of a wide cache": (
        {"cache": ops.KvCache(*[torch.zeros(9, 2, 16, 64)] * 2, k_scale=0.5)},
        ValueError,
        "k_scale is 0.5 for a Float cache; only a Float8_e4m3fn cache has one",
    ),
    "v_scale": (
        {"cache": ops.KvCache(*[torch.zeros(9, 2, 16, 64).to(torch.float8_e4m3fn)] * 2, v_scale=0.0)},
        ValueError,
        "v_scale is 0; allowed: positive and finite",
    ),
    "int4 of fp8": (
        {"cache": ops.KvCache(*[torch.zeros(9, 2, 16, 64).to(torch.float8_e4m3fn)] * 2, int4=True)},
        TypeError,
        "k_cache has dtype Float8_e4m3fn; an int4 cache is stored as Byte",
    ),
    "scales": ({"cache": ops.KvCache(*[torch.zeros(9, 2, 16, 64, dtype=torch.uint8)] * 2)}, ValueError, "kv_scales is missing"),
}


@pytest.mark.parametrize("name", BAD_CACHE)
def test_bad_cache_plan_or_output(name: str) -> None:
    change, error, message = BAD_CACHE[name]
    case = Case(q_lens=(1, 2), kv_lens=(20, 5), layout="hnd")
    t = make_tensors(case)
    plan = make_plan(case, t)
    plan = ops.AttentionPlan(plan.plan, change.get("plan", plan.plan), plan.workspace)
    options = {key: value for key, value in change.items() if key in ("out", "lse", "logits_soft_cap", "q_descale")}
    with pytest.raises(error, match=message):
        ops.attention(t.q, change.get("cache", t.kv.cache), change.get("block_table", t.kv.block_table), plan, **options)


def test_small_workspace() -> None:
    case = Case(q_lens=(1,), kv_lens=(500,), num_workers=4)
    t = make_tensors(case)
    plan = dataclasses.replace(make_plan(case, t), workspace=torch.empty(1))
    with pytest.raises(ValueError, match="workspace has 1 floats; this plan needs"):
        ops.attention(t.q, t.kv.cache, t.kv.block_table, plan)


def test_float64_agrees_with_torch() -> None:
    """The reference itself, against torch's own attention."""
    case = Case(q_lens=(5,), kv_lens=(40,), heads=(4, 4))
    t = make_tensors(case)
    want, _ = exact(case, t)
    k, v = (side[t.kv.block_table[0, :3].long()].transpose(0, 1).flatten(1, 2)[:, :40] for side in (t.kv.k, t.kv.v))
    mask = torch.ones(5, 40, dtype=torch.bool).tril(35)
    got = torch.nn.functional.scaled_dot_product_attention(t.q.double().transpose(0, 1), k, v, attn_mask=mask)
    testing.assert_within(got.transpose(0, 1), want, 1e-12)
