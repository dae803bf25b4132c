"""append_kv with keys rounded with feedback, against float64 and against rounding to nearest."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from tests.ops.test_append_kv import NUM_PAGES, Case, Tensors, make_cache, make_tensors, odd_strides, rotated
from tilestream import ops, testing
from tilestream.reference import append_kv as reference

pytestmark = pytest.mark.simt
CASE = Case(kv_dtype="int4")


def moment_of_queries(case: Case) -> torch.Tensor:
    """float64 [num_kv_heads, head_dim, head_dim] of queries whose elements have much to do with each other."""
    num_kv_heads, d = case.heads[1], case.head_dim
    q = torch.randn(num_kv_heads, 4 * d, d // 4).double() @ torch.randn(num_kv_heads, d // 4, d).double()
    q = (q + 0.3 * torch.randn_like(q)) * (0.2 + 2 * torch.rand(num_kv_heads, 1, d).double())
    return q.mT @ q / (4 * d)


def rounding_for(moment: torch.Tensor, offset: torch.Tensor) -> ops.KeyRounding:
    """As GPTQ does it: falling diagonal, 1% damping, U / its diagonal, where the inverse of the moment is U^T U."""
    diagonal = moment.diagonal(dim1=1, dim2=2)
    order = diagonal.argsort(dim=1, descending=True)
    damped = moment + 0.01 * diagonal.mean(1).view(-1, 1, 1) * torch.eye(moment.shape[1]).double()
    ordered = torch.stack([m[o][:, o] for m, o in zip(damped, order, strict=True)])
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(ordered))
    upper = torch.linalg.cholesky(inverse, upper=True)
    feedback = (upper / upper.diagonal(dim1=1, dim2=2).unsqueeze(2)).triu(1)
    return ops.KeyRounding(offset, order.int(), feedback.float().contiguous())


def make_rounding(case: Case) -> tuple[torch.Tensor, ops.KeyRounding]:
    moment = moment_of_queries(case)
    return moment, rounding_for(moment, torch.randn(case.heads[1], case.head_dim))


def append(
    case: Case, t: Tensors, rounding: ops.KeyRounding | None, key_stats: torch.Tensor | None = None
) -> tuple[torch.Tensor, ops.KvCache]:
    """The rotated q and a cache with the tokens in it."""
    cache, q = make_cache(case), t.q.clone()
    ops.append_kv(q, t.k, t.v, t.positions, t.slots, cache, cos_sin=t.cos_sin, interleaved=case.interleaved,
                  key_stats=key_stats, key_rounding=rounding)  # fmt: skip
    return q, cache


def stored(case: Case, t: Tensors, cache: ops.KvCache) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys of the tokens that were written: their values, float64, and their codes."""
    slots = t.slots[t.slots >= 0]
    k = ops.gather_kv(cache, slots)[0].double()
    scale, zero = cache.kv_scales[slots.long() // case.page_size, 0, :, slots.long() % case.page_size].double().unbind(-1)
    return k, ((k - zero.unsqueeze(-1)) / scale.unsqueeze(-1)).round().long()


def weighted_error(error: torch.Tensor, moment: torch.Tensor) -> float:
    """e^T C e, summed over tokens and heads."""
    return float(torch.einsum("thi,hij,thj->", error, moment, error))


def check(case: Case) -> None:
    t = make_tensors(case)
    moment, rounding = make_rounding(case)
    want_q, plain = append(case, t, None)
    q, cache = append(case, t, rounding)
    assert torch.equal(q, want_q) and torch.equal(cache.v_cache, plain.v_cache)
    assert torch.equal(cache.kv_scales[:, 1].nan_to_num(9), plain.kv_scales[:, 1].nan_to_num(9))
    untouched = make_cache(case)
    others = torch.tensor([s for s in range(NUM_PAGES * case.page_size) if s not in set(t.slots.tolist())], dtype=torch.int32)
    for got, before in zip(ops.gather_kv(cache, others), ops.gather_kv(untouched, others), strict=True):
        assert torch.equal(got.nan_to_num(9), before.nan_to_num(9)), "a slot that was not given was written"
    if not case.num_tokens:
        return
    keys = rotated(case, t.k, t)[t.slots >= 0]
    want = reference.quantise_keys(keys, rounding.offset, rounding.order, rounding.feedback)
    k, codes = stored(case, t, cache)
    # Where float32 lands on a tie's other side, all that follows in the row differs, and is as good.
    assert float((codes == want.q).all(-1).double().mean()) >= 0.97
    keys = keys - rounding.offset
    error, want_error = (weighted_error(values - keys, moment) for values in (k, want.dequantise()))
    assert abs(error - want_error) <= 0.03 * want_error, f"weighted error {error:.4g}, of the reference {want_error:.4g}"
    nearest = weighted_error(reference.quantise_rows(keys, 4).dequantise() - keys, moment)
    assert error <= 0.2 * nearest, f"weighted error {error:.4g}, of rounding to nearest {nearest:.4g}"


@pytest.mark.parametrize("interleaved", [False, True], ids=["neox", "interleaved"])
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim"), [(16, 16), (64, 0), (64, 32), (80, 80), (80, 2), (128, 128), (144, 24), (256, 64)]
)
def test_head_dims_and_rotary(backend: testing.Backend, head_dim: int, rotary_dim: int, interleaved: bool) -> None:
    check(dataclasses.replace(CASE, head_dim=head_dim, rotary_dim=rotary_dim, interleaved=interleaved))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("page_size", [16, 32, 64])
def test_dtypes(backend: testing.Backend, page_size: int, dtype: str) -> None:
    check(dataclasses.replace(CASE, dtype=dtype, page_size=page_size))


@pytest.mark.parametrize("layout", ["hnd", "blocked"])
def test_every_simd_level(simd_level: str, layout: str) -> None:
    check(dataclasses.replace(CASE, layout=layout, head_dim=80, rotary_dim=32, dtype="bfloat16"))


@pytest.mark.parametrize("num_tokens", [0, 1, 33])
@pytest.mark.parametrize("heads", [(1, 1), (9, 3), (8, 8)])
def test_sizes(backend: testing.Backend, heads: tuple[int, int], num_tokens: int) -> None:
    check(dataclasses.replace(CASE, heads=heads, num_tokens=num_tokens))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["hnd", "nhd", "blocked"])
def test_without_feedback_it_is_rounding_to_nearest(backend: testing.Backend, layout: str, dtype: str) -> None:
    """Bit by bit, whatever the order."""
    for head_dim, rotary_dim, interleaved in ((64, 64, False), (80, 24, False), (128, 64, True), (256, 0, False)):
        case = dataclasses.replace(
            CASE, head_dim=head_dim, rotary_dim=rotary_dim, interleaved=interleaved, layout=layout, dtype=dtype
        )
        t, num_kv_heads = make_tensors(case), case.heads[1]
        order = torch.stack([torch.randperm(head_dim).int() for _ in range(num_kv_heads)])
        rounding = ops.KeyRounding(
            torch.zeros(num_kv_heads, head_dim), order, torch.zeros(num_kv_heads, head_dim, head_dim)
        )
        (_, got), (_, want) = append(case, t, rounding), append(case, t, None)
        assert torch.equal(got.k_cache, want.k_cache)
        assert torch.equal(got.kv_scales.nan_to_num(9), want.kv_scales.nan_to_num(9))


def test_the_lower_triangle_is_not_used(backend: testing.Backend) -> None:
    t, (_, rounding) = make_tensors(CASE), make_rounding(CASE)
    below = torch.full_like(rounding.feedback, math.nan).tril()
    (_, got), (_, want) = (
        append(CASE, t, r) for r in (dataclasses.replace(rounding, feedback=rounding.feedback + below), rounding)
    )
    assert torch.equal(got.k_cache, want.k_cache)


def test_a_key_does_not_depend_on_its_batch(backend: testing.Backend) -> None:
    t, (_, rounding) = make_tensors(CASE), make_rounding(CASE)
    _, want = append(CASE, t, rounding)
    cache = make_cache(CASE)
    for i in range(CASE.num_tokens):
        row = slice(i, i + 1)
        ops.append_kv(None, t.k[row], t.v[row], t.positions[row], t.slots[row], cache, cos_sin=t.cos_sin, key_rounding=rounding)
    assert torch.equal(cache.k_cache, want.k_cache)


def test_alignment_does_not_matter(backend: testing.Backend) -> None:
    case = dataclasses.replace(CASE, layout="hnd", head_dim=80, rotary_dim=32, dtype="bfloat16")
    t, (_, rounding) = make_tensors(case), make_rounding(case)
    results = []
    for place in (torch.clone, odd_strides):
        cache = make_cache(case)
        cache = dataclasses.replace(cache, k_cache=place(cache.k_cache))
        feedback = rounding.feedback
        if place is odd_strides:
            feedback = torch.cat([torch.zeros(1), feedback.flatten()])[1:].view_as(feedback)
        ops.append_kv(None, place(t.k), t.v, t.positions, t.slots, cache, cos_sin=t.cos_sin,
                      key_rounding=dataclasses.replace(rounding, feedback=feedback))  # fmt: skip
        results.append(ops.gather_kv(cache, t.slots[t.slots >= 0])[0])
    assert torch.equal(*results)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_nan_key_is_stored_as_nan_and_alone(backend: testing.Backend, bad: float) -> None:
    t, (_, rounding) = make_tensors(CASE), make_rounding(CASE)
    want, _ = stored(CASE, t, append(CASE, t, rounding)[1])
    t.k[1, 0, 5] = bad
    got, _ = stored(CASE, t, append(CASE, t, rounding)[1])
    assert bool(got[1, 0].isnan().all())
    got[1, 0] = want[1, 0]
    assert torch.equal(got, want)


def test_constant_rows(backend: testing.Backend) -> None:
    """A scale of 0 divides by 1."""
    t, (_, rounding) = make_tensors(CASE), make_rounding(CASE)
    rounding = dataclasses.replace(rounding, offset=torch.full_like(rounding.offset, 0.5))
    t.cos_sin = None
    t.k[:] = torch.linspace(-2, 9, CASE.num_tokens).half().float().view(-1, 1, 1) + 0.5
    k, _ = ops.gather_kv(append(CASE, t, rounding)[1], t.slots[t.slots >= 0])
    assert torch.equal(k, (t.k - 0.5)[t.slots >= 0])


def test_key_statistics_are_of_the_rotated_keys(backend: testing.Backend) -> None:
    t, (_, rounding) = make_tensors(CASE), make_rounding(CASE)
    t.slots = torch.arange(9, 9 + CASE.num_tokens, dtype=torch.int32)
    t.slots[4] = -1
    got, want = (torch.zeros(NUM_PAGES, CASE.heads[1], 2, CASE.head_dim) for _ in range(2))
    _, with_stats = append(CASE, t, rounding, got)
    _, without = append(CASE, t, rounding)
    append(CASE, t, None, want)
    assert torch.equal(got, want) and bool(got.any())
    assert torch.equal(with_stats.k_cache, without.k_cache)


def test_opcheck(backend: testing.Backend) -> None:
    t, (_, r) = make_tensors(CASE), make_rounding(CASE)
    cache = make_cache(CASE)
    torch.library.opcheck(
        torch.ops.tilestream.append_kv.default,
        (t.q.clone(), t.k.clone(), t.v.clone(), t.cos_sin, t.positions, t.slots, cache.k_cache.clone(), cache.v_cache.clone(),
         cache.kv_scales.nan_to_num(), None, r.offset, r.order, r.feedback),
        {"interleaved": False, "blocked": cache.blocked, "int4": True})  # fmt: skip


BAD_ROUNDING = {
    "offset": ({"offset": torch.zeros(2, 32)}, ValueError, r"key_offset has shape \[2, 32\]; dimension 1 must be 64"),
    "offset dtype": ({"offset": torch.zeros(2, 64).half()}, TypeError, "key_offset has dtype Half; supported: Float"),
    "order": ({"order": torch.zeros(3, 64).int()}, ValueError, r"key_order has shape \[3, 64\]; dimension 0 must be 2"),
    "order dtype": ({"order": torch.zeros(2, 64).long()}, TypeError, "key_order has dtype Long; supported: Int"),
    "order range": ({"order": torch.full((2, 64), 64).int()}, ValueError, "key_order holds 64; allowed: 0 to 63"),
    "feedback": (
        {"feedback": torch.zeros(2, 64, 32)},
        ValueError,
        r"key_feedback has shape \[2, 64, 32\]; dimension 2 must be 64",
    ),
    "only some": ({"feedback": None}, ValueError, "go together; only some are given"),
    "feedback strides": ({"feedback": torch.zeros(2, 64, 64).mT}, ValueError, "key_feedback has strides .*contiguous"),
}


@pytest.mark.parametrize("name", BAD_ROUNDING)
def test_bad_rounding(name: str) -> None:
    changes, error, message = BAD_ROUNDING[name]
    with pytest.raises(error, match=message):
        append(CASE, make_tensors(CASE), dataclasses.replace(make_rounding(CASE)[1], **changes))


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "fp8", "int8"])
def test_only_int4_keys_are_rounded(kv_dtype: str) -> None:
    case = dataclasses.replace(CASE, kv_dtype=kv_dtype)
    with pytest.raises(ValueError, match="key_rounding is for int4 caches; this one is"):
        append(case, make_tensors(case), make_rounding(case)[1])
