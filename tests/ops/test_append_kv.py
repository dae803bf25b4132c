"""append_kv and gather_kv against float64: rotary embedding, quantisation, page layouts, key statistics."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from tests.ops.layouts import layout_or_own
from tilestream import ops, testing
from tilestream.reference import append_kv as reference
from tilestream.testing.paged import FLOAT_DTYPES, KV_BITS, KV_FLOAT_DTYPES, stored_pages

pytestmark = pytest.mark.simt
NUM_PAGES, MAX_POSITION = 7, 50
KV_DTYPES = ["float32", "float16", "bfloat16", "fp8", "int8", "int4"]
LAYOUTS = ["hnd", "nhd", "blocked"]


@dataclasses.dataclass(frozen=True)
class Case:
    num_tokens: int = 23
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 64
    rotary_dim: int = 64
    page_size: int = 16
    dtype: str = "float32"
    kv_dtype: str = "float32"
    layout: str | None = None  # None: the backend's own
    interleaved: bool = False


@dataclasses.dataclass
class Tensors:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cos_sin: torch.Tensor | None
    positions: torch.Tensor
    slots: torch.Tensor


def make_tensors(case: Case) -> Tensors:
    dtype, n = FLOAT_DTYPES[case.dtype], case.num_tokens
    num_qo_heads, num_kv_heads = case.heads
    fused = torch.randn(n, num_qo_heads + 2 * num_kv_heads, case.head_dim).to(dtype)  # q, k and v are views of it
    angles = torch.rand(MAX_POSITION, case.rotary_dim // 2) * 6
    slots = torch.randperm(NUM_PAGES * case.page_size)[:n].int()
    if n > 4:
        slots[4] = -1
    return Tensors(
        *fused.split([num_qo_heads, num_kv_heads, num_kv_heads], 1),
        torch.cat([angles.cos(), angles.sin()], 1) if case.rotary_dim else None,
        torch.randint(MAX_POSITION, (n,)).int(), slots,
    )


def make_cache(case: Case) -> ops.KvCache:
    """A cache whose every byte is garbage: 0xb5 in the pages, NaN in the scales."""
    shape = (NUM_PAGES, case.heads[1], case.page_size, case.head_dim)
    sides, layout = [], layout_or_own(case.layout)
    for side in range(2):
        if case.kv_dtype in KV_BITS:
            values = torch.full(shape, 0xB5 if case.kv_dtype == "int8" else 0x5, dtype=torch.uint8)
        else:
            values = torch.full(shape, math.nan, dtype=KV_FLOAT_DTYPES[case.kv_dtype])
        sides.append(stored_pages(values, case.kv_dtype, layout, side=side).clone(memory_format=torch.preserve_format))
    scales = None
    if case.kv_dtype in KV_BITS:
        scales = torch.full((NUM_PAGES, 2, case.heads[1], case.page_size, 2), math.nan, dtype=torch.float16)
    return ops.KvCache(sides[0], sides[1], scales, layout == "blocked", case.kv_dtype == "int4")


def rotated(case: Case, x: torch.Tensor, t: Tensors) -> torch.Tensor:
    if t.cos_sin is None:
        return x.double()
    return reference.rope(x, t.cos_sin, t.positions, interleaved=case.interleaved)


def check_values(case: Case, got: torch.Tensor, want: torch.Tensor, exact_input: bool) -> None:
    """Within one rounding to the cache's dtype, or half a step of its own quantisation, plus float32 arithmetic."""
    arithmetic = 0.0 if exact_input else 3 * testing.unit_roundoff(torch.float32) * float(want.abs().max())
    if case.kv_dtype not in KV_BITS:
        bound = testing.unit_roundoff(KV_FLOAT_DTYPES[case.kv_dtype]) * float(want.abs().max()) + arithmetic
        testing.assert_within(got, want, bound)
        return
    # scale and zero are float16: they move a value by at most (levels * scale + |zero|) * 2^-11.
    levels = 2 ** KV_BITS[case.kv_dtype] - 1
    span, most = want.amax(-1) - want.amin(-1), want.abs().amax(-1)
    bound = span / levels / 2 + (span + most) * 2.0**-11 + arithmetic
    err = (got.double() - want).abs().amax(-1)
    assert bool((err <= bound).all()), f"error {float((err - bound).max()):.2e} above half a step"


def check(case: Case) -> None:
    t = make_tensors(case)
    cache, untouched = make_cache(case), make_cache(case)
    k_before, v_before = t.k.clone(), t.v.clone()
    want_q, want_k = rotated(case, t.q, t), rotated(case, t.k, t)
    ops.append_kv(t.q, t.k, t.v, t.positions, t.slots, cache, cos_sin=t.cos_sin, interleaved=case.interleaved)
    assert torch.equal(t.k, k_before) and torch.equal(t.v, v_before)
    u = testing.unit_roundoff(t.q.dtype) + (3 * testing.unit_roundoff(torch.float32) if t.cos_sin is not None else 0.0)
    testing.assert_within(t.q, want_q, u * float(want_q.abs().max() if t.q.numel() else 0.0), "q")
    written = t.slots >= 0
    k, v = ops.gather_kv(cache, t.slots[written])
    if t.slots.numel():
        check_values(case, k, want_k[written], t.cos_sin is None)
        check_values(case, v, t.v.double()[written], True)
    others = torch.tensor([s for s in range(NUM_PAGES * case.page_size) if s not in set(t.slots.tolist())], dtype=torch.int32)
    for got, before in zip(ops.gather_kv(cache, others), ops.gather_kv(untouched, others), strict=True):
        assert torch.equal(got.nan_to_num(12345.0), before.nan_to_num(12345.0)), "a slot that was not given was written"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("page_size", [16, 32, 64])
def test_dtypes_and_layouts(backend: testing.Backend, page_size: int, layout: str, kv_dtype: str, dtype: str) -> None:
    check(Case(page_size=page_size, layout=layout, kv_dtype=kv_dtype, dtype=dtype))


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_simd_level(simd_level: str, layout: str, kv_dtype: str) -> None:
    check(Case(layout=layout, kv_dtype=kv_dtype, head_dim=80, rotary_dim=32, dtype="bfloat16"))


@pytest.mark.parametrize("interleaved", [False, True], ids=["neox", "interleaved"])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 0), (64, 2), (64, 32), (80, 80), (96, 24), (128, 128), (256, 64)])
def test_rotary(backend: testing.Backend, head_dim: int, rotary_dim: int, interleaved: bool) -> None:
    for kv_dtype in ("float32", "bfloat16", "fp8", "int8"):
        check(Case(head_dim=head_dim, rotary_dim=rotary_dim, interleaved=interleaved, kv_dtype=kv_dtype))


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 100])
@pytest.mark.parametrize("heads", [(1, 1), (9, 3), (8, 8)])
def test_sizes(backend: testing.Backend, heads: tuple[int, int], num_tokens: int) -> None:
    for kv_dtype in ("bfloat16", "fp8", "int4"):
        check(Case(num_tokens=num_tokens, heads=heads, kv_dtype=kv_dtype))


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_blocked_bytes_are_the_documented_order(backend: testing.Backend, kv_dtype: str) -> None:
    """A full blocked cache is the strided one in the order of types.h, element by element."""
    case = Case(num_tokens=NUM_PAGES * 16, kv_dtype=kv_dtype, rotary_dim=0, layout="blocked")
    t = make_tensors(case)
    t.slots = torch.randperm(case.num_tokens).int()
    blocked, strided = make_cache(case), make_cache(dataclasses.replace(case, layout="hnd"))
    for cache in (blocked, strided):
        ops.append_kv(None, t.k, t.v, t.positions, t.slots, cache)
    for side, (b, s) in enumerate(((blocked.k_cache, strided.k_cache), (blocked.v_cache, strided.v_cache))):
        values = torch.stack([s & 15, s >> 4], -1).flatten(-2) if kv_dtype == "int4" else s
        assert torch.equal(stored_pages(values, kv_dtype, "blocked", side=side), b)
    if kv_dtype in KV_BITS:
        assert torch.equal(blocked.kv_scales, strided.kv_scales)


@pytest.mark.parametrize("kv_dtype", list(KV_BITS))
def test_quantisation_rule(backend: testing.Backend, kv_dtype: str) -> None:
    """zero = float16(min), scale = float16((max - min) / levels), q to the nearest: equal but for float32 near-halves."""
    case = Case(kv_dtype=kv_dtype, rotary_dim=0, layout="hnd")
    t, cache = make_tensors(case), make_cache(case)
    ops.append_kv(None, t.k, t.v, t.positions, t.slots, cache)
    want = reference.quantise_rows(t.k, KV_BITS[kv_dtype])
    for token in range(case.num_tokens):
        slot = int(t.slots[token])
        if slot < 0:
            continue
        scales = cache.kv_scales[slot // 16, 0, :, slot % 16].double()
        assert torch.equal(scales[:, 1], want.zero[token])
        assert bool(((scales[:, 0] - want.scale[token]).abs() <= want.scale[token] * 2.0**-10).all())
    written = t.slots >= 0
    slots = t.slots[written].long()
    k, _ = ops.gather_kv(cache, t.slots[written])
    # A scale between two float16 may be rounded either way, which moves the whole row.
    moved = (cache.kv_scales[slots // 16, 0, :, slots % 16, 0].double() - want.scale[written]).abs() * 2 ** KV_BITS[kv_dtype]
    same = (k.double() - want.dequantise()[written]).abs() <= (1e-3 * want.scale[written] + moved).unsqueeze(-1)
    assert float(same.double().mean()) >= 0.999


FP8_CODES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def check_fp8_rounding(layout: str | None, k_scale: float, v_scale: float) -> None:
    """The bits of torch's cast, after saturation: every code, every tie, their neighbours in float32, and what overflows."""
    finite = FP8_CODES[FP8_CODES.isfinite()].unique()  # sorted
    ties = (finite[1:] + finite[:-1]) / 2
    edges = torch.cat([finite, ties])
    x = torch.cat([
        edges, edges.nextafter(torch.tensor(math.inf)), edges.nextafter(torch.tensor(-math.inf)), torch.randn(200),
        torch.tensor([-0.0, 449, 463.9, 464, 465, 480, 1e9, -464, -1e30, math.inf, -math.inf, 1e-40, -1e-40, math.nan]),
    ])
    x = torch.nn.functional.pad(x, (0, -len(x) % 64)).view(-1, 1, 64)
    num_pages = -(-len(x) // 16)
    blocked = layout_or_own(layout) == "blocked"
    cache = ops.KvCache.allocate(num_pages, 1, 16, 64, kv_dtype="fp8", blocked=blocked, k_scale=k_scale, v_scale=v_scale)
    slots = torch.randperm(num_pages * 16)[: len(x)].int()
    ops.append_kv(None, x * k_scale, x * v_scale, torch.zeros_like(slots), slots, cache)
    for got, scale in zip(ops.gather_kv(cache, slots), (k_scale, v_scale), strict=True):
        # Dividing again: where x * scale / scale is not x, the operand of the cast is not x either.
        want = (x * scale / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
        assert torch.equal(got.isnan(), want.isnan())
        same = torch.where(want.isnan(), 0.0, got).view(torch.int32) == torch.where(want.isnan(), 0.0, want).view(torch.int32)
        assert bool(same.all()), f"{x[~same][:4]} at scale {scale} became {got[~same][:4]}, expected {want[~same][:4]}"


@pytest.mark.parametrize(("k_scale", "v_scale"), [(1.0, 1.0), (0.25, 3.0)])
@pytest.mark.parametrize("layout", ["hnd", "blocked"])
def test_fp8_rounding_on_every_simd_level(simd_level: str, layout: str, k_scale: float, v_scale: float) -> None:
    check_fp8_rounding(layout, k_scale, v_scale)


@pytest.mark.parametrize(("k_scale", "v_scale"), [(1.0, 1.0), (0.25, 3.0)])
def test_fp8_rounding(backend: testing.Backend, k_scale: float, v_scale: float) -> None:
    check_fp8_rounding(None, k_scale, v_scale)


def test_every_fp8_code_is_read_back(backend: testing.Backend) -> None:
    pages = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(1, 1, 16, 16)
    cache = ops.KvCache(pages, pages, k_scale=2.0)
    k, v = ops.gather_kv(cache, torch.arange(16, dtype=torch.int32))
    assert torch.equal(v.flatten().nan_to_num(1e9), FP8_CODES.nan_to_num(1e9))
    assert torch.equal(k.flatten().nan_to_num(1e9), (2 * FP8_CODES).nan_to_num(1e9))


def test_constant_rows_survive_quantisation(backend: testing.Backend) -> None:
    for kv_dtype in KV_BITS:
        case = Case(num_tokens=3, kv_dtype=kv_dtype, rotary_dim=0)
        t, cache = make_tensors(case), make_cache(case)
        t.k[:] = torch.tensor([0.0, -1.5, 1000.0]).view(3, 1, 1)
        ops.append_kv(None, t.k, t.v, t.positions, t.slots, cache)
        assert torch.equal(ops.gather_kv(cache, t.slots)[0], t.k.float())


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "int4"])
@pytest.mark.parametrize("layout", ["hnd", "blocked"])
def test_key_statistics(backend: testing.Backend, layout: str, kv_dtype: str, set_num_threads) -> None:
    """Minimum and maximum of a page's rotated keys, over several steps; offset 0 starts afresh; others keep theirs."""
    case = Case(num_tokens=20, kv_dtype=kv_dtype, layout=layout)
    cache = make_cache(case)
    stats = torch.full((NUM_PAGES, case.heads[1], 2, case.head_dim), math.nan)
    pages: dict[int, list[torch.Tensor]] = {}
    for threads, begin in ((1, 0), (2, 20), (3, 40), (7, 16)):  # the last step writes page 1 anew
        set_num_threads(threads)
        t = make_tensors(case)
        t.slots = torch.arange(begin, begin + 20, dtype=torch.int32)
        want_k = rotated(case, t.k, t)
        ops.append_kv(t.q, t.k, t.v, t.positions, t.slots, cache, cos_sin=t.cos_sin, key_stats=stats)
        for token, slot in enumerate(t.slots.tolist()):
            page, offset = divmod(slot, case.page_size)
            pages[page] = ([] if offset == 0 else pages[page]) + [want_k[token]]
    testing.assert_within(stats, reference.key_statistics(pages, NUM_PAGES), 1e-6)


def odd_strides(x: torch.Tensor) -> torch.Tensor:
    """A copy whose rows start anywhere."""
    padded = x.new_empty(*x.shape[:-1], x.shape[-1] + 1)
    return padded[..., :-1].copy_(x)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("interleaved", [False, True], ids=["neox", "interleaved"])
def test_alignment_does_not_matter(backend: testing.Backend, interleaved: bool, kv_dtype: str) -> None:
    case = Case(kv_dtype=kv_dtype, dtype="bfloat16", layout="hnd", head_dim=80, rotary_dim=32)
    t, results = make_tensors(case), []
    for place in (torch.clone, odd_strides):
        cache = make_cache(case)
        cache = dataclasses.replace(cache, k_cache=place(cache.k_cache), v_cache=place(cache.v_cache))
        q, k, v = place(t.q), place(t.k), place(t.v)
        ops.append_kv(q, k, v, t.positions, t.slots, cache, cos_sin=t.cos_sin, interleaved=interleaved)
        results.append((q, *ops.gather_kv(cache, t.slots[t.slots >= 0])))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_threads_do_not_matter(backend: testing.Backend, set_num_threads) -> None:
    """Neighbouring tokens of a blocked int4 page share bytes: whoever writes them, none is lost."""
    case = Case(num_tokens=NUM_PAGES * 16, kv_dtype="int4", heads=(9, 3))
    t = make_tensors(case)
    t.slots = torch.randperm(case.num_tokens).int()
    results = []
    for num in (1, 2, 3, 7):
        set_num_threads(num)
        cache, q = make_cache(case), t.q.clone()
        ops.append_kv(q, t.k, t.v, t.positions, t.slots, cache, cos_sin=t.cos_sin)
        results.append((q, cache.k_cache, cache.v_cache, cache.kv_scales))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_a_nan_key_is_stored_as_nan(backend: testing.Backend) -> None:
    for kv_dtype in KV_DTYPES:
        case = Case(num_tokens=3, kv_dtype=kv_dtype, rotary_dim=0)
        t, cache = make_tensors(case), make_cache(case)
        t.k[1, 0, 5] = math.nan
        ops.append_kv(None, t.k, t.v, t.positions, t.slots, cache)
        k, v = ops.gather_kv(cache, t.slots)
        assert bool(k[1, 0, 5].isnan()) and not bool(k[[0, 2]].isnan().any()) and not bool(v.isnan().any())


def test_opcheck(backend: testing.Backend) -> None:
    for kv_dtype in ("bfloat16", "int8"):
        case = Case(num_tokens=3, kv_dtype=kv_dtype)
        t = make_tensors(case)
        blocked = layout_or_own(None) == "blocked"
        cache = ops.KvCache.allocate(NUM_PAGES, case.heads[1], 16, 64, kv_dtype=kv_dtype, blocked=blocked)
        options = {"blocked": blocked, "int4": False}
        torch.library.opcheck(
            torch.ops.tilestream.append_kv.default,
            (t.q.clone(), t.k.clone(), t.v.clone(), t.cos_sin, t.positions, t.slots, cache.k_cache, cache.v_cache,
             cache.kv_scales, torch.zeros(NUM_PAGES, 2, 2, 64)), {"interleaved": False, **options})
        torch.library.opcheck(
            torch.ops.tilestream.gather_kv.default,
            (cache.k_cache, cache.v_cache, cache.kv_scales, t.slots, torch.zeros(3, 2, 64), torch.zeros(3, 2, 64)), options)


BAD_INPUT = {
    "slot": (
        {"slots": torch.tensor([0, 1, NUM_PAGES * 16], dtype=torch.int32)},
        ValueError,
        f"slot_mapping holds {NUM_PAGES * 16}; allowed: -1 to {NUM_PAGES * 16 - 1}",
    ),
    "negative slot": ({"slots": torch.tensor([0, -2, 1], dtype=torch.int32)}, ValueError, "slot_mapping holds -2; allowed: -1"),
    "slot dtype": ({"slots": torch.tensor([0, 1, 2])}, TypeError, "slot_mapping has dtype Long; supported: Int"),
    "slot count": (
        {"slots": torch.tensor([0, 1], dtype=torch.int32)},
        ValueError,
        r"slot_mapping has shape \[2\]; dimension 0 must be 3",
    ),
    "position": (
        {"positions": torch.tensor([0, 1, MAX_POSITION], dtype=torch.int32)},
        ValueError,
        f"positions holds {MAX_POSITION}; allowed: 0 to {MAX_POSITION - 1}",
    ),
    "negative position": ({"positions": torch.tensor([0, 1, -1], dtype=torch.int32)}, ValueError, "positions holds -1"),
    "q head_dim": ({"q": torch.zeros(3, 4, 32)}, ValueError, r"q has shape \[3, 4, 32\]; dimension 2 must be 64"),
    "q dtype": ({"q": torch.zeros(3, 4, 64).half()}, TypeError, "q has dtype Half; it must be Float as k"),
    "k heads": ({"k": torch.zeros(3, 3, 64)}, ValueError, r"k has shape \[3, 3, 64\]; dimension 1 must be 2"),
    "v tokens": ({"v": torch.zeros(2, 2, 64)}, ValueError, r"v has shape \[2, 2, 64\]; dimension 0 must be 3"),
    "v stride": ({"v": torch.zeros(3, 64, 2).transpose(1, 2)}, ValueError, "v has strides .* last dimension must be contiguous"),
    "odd rotary_dim": ({"cos_sin": torch.zeros(MAX_POSITION, 33)}, ValueError, "cos_sin has rotary_dim 33; allowed: even"),
    "rotary_dim": (
        {"cos_sin": torch.zeros(MAX_POSITION, 66)},
        ValueError,
        "cos_sin has rotary_dim 66; allowed: even, at most head_dim 64",
    ),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input(name: str) -> None:
    changes, error, message = BAD_INPUT[name]
    case = Case(num_tokens=3)
    t = dataclasses.replace(make_tensors(case), **changes)
    with pytest.raises(error, match=message):
        ops.append_kv(t.q, t.k, t.v, t.positions, t.slots, make_cache(case), cos_sin=t.cos_sin)


def test_bad_statistics_and_gather() -> None:
    case = Case(num_tokens=3)
    t, cache = make_tensors(case), make_cache(case)
    with pytest.raises(ValueError, match="key_stats has shape .* dimension 3 must be 64"):
        ops.append_kv(None, t.k, t.v, t.positions, t.slots, cache, key_stats=torch.zeros(NUM_PAGES, 2, 2, 32))
    with pytest.raises(ValueError, match="slot_mapping holds -1; allowed: 0 to"):
        ops.gather_kv(cache, torch.tensor([-1], dtype=torch.int32))
    with pytest.raises(ValueError, match="kv_dtype is 'int3'; supported: float32"):
        ops.KvCache.allocate(1, 1, 16, 64, kv_dtype="int3")
    with pytest.raises(ValueError, match="page_size is 8; supported: 16, 32, 64"):
        ops.KvCache.allocate(1, 1, 8, 64)
