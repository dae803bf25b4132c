"""linear against float64 and against the exact model of its int8 activations; packing and embedding."""

from __future__ import annotations

import pytest
import torch

from tilestream import ops, testing
from tilestream.ops import PackedFormat
from tilestream.reference import linear as reference

pytestmark = pytest.mark.simt
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
QUANTISED = {f: 2**f.bits - 1 for f in PackedFormat if f.is_quantised}
SYMMETRIC_ZERO = {f: -(2.0 ** (f.bits - 1)) for f in QUANTISED if f.is_symmetric}
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
PANELS = [f for f in PackedFormat if not f.is_row_major]  # test_linear_rows.py has the others
each_format = pytest.mark.parametrize("format", PANELS, ids=lambda f: f.name)
each_quantised = pytest.mark.parametrize("format", list(QUANTISED), ids=lambda f: f.name)


class Weight:
    """A random weight: its packed form, and the values that it stands for."""

    def __init__(self, n: int, k: int, format: PackedFormat, group: int | None = None) -> None:
        self.format = format
        self.group = group = group or format.group_size
        if format not in QUANTISED:
            values = torch.randn(n, k) / k**0.5
            self.values = (values.bfloat16() if format == PackedFormat.BFLOAT16 else values).double()
            self.packed = ops.pack_weight(values, format=format)
            return
        levels = QUANTISED[format]
        self.q = torch.randint(levels + 1, (n, k), dtype=torch.uint8)
        # float16 values, as the packed form keeps them
        self.scale = ((0.5 + torch.rand(n, -(-k // group))) / levels / k**0.5).half().float()
        if format in SYMMETRIC_ZERO:
            self.zero = self.scale * SYMMETRIC_ZERO[format]
            self.packed = ops.pack_weight(q=self.q, scale=self.scale, format=format)
        else:
            self.zero = (-self.scale * levels * torch.rand(n, -(-k // group))).half().float()
            self.packed = ops.pack_weight(q=self.q, scale=self.scale, zero=self.zero, format=format)
        self.values = reference.dequantise(self.q, self.scale, self.zero, group)


def check(m: int, n: int, k: int, format: PackedFormat, dtype: torch.dtype, bias: bool = False, group: int | None = None) -> None:
    weight = Weight(n, k, format, group)
    values = torch.randn(m, k).to(dtype)
    x = testing.Guarded((m, k), dtype, fill=unambiguous(values) if format in QUANTISED else values).tensor
    b = torch.randn(n) if bias else None
    out = testing.Guarded((m, n), dtype)
    ops.linear(x, weight.packed, b, out=out.tensor)
    out.assert_untouched_outside()
    if format in QUANTISED:
        want = reference.linear_int8(x, weight.q, weight.scale, weight.zero, weight.group, b)
        bound = int8_bound(x, weight, want, dtype)
        testing.assert_within(out.tensor, want, bound)
        return
    want = reference.linear(x, weight.values, b)
    # A bfloat16 weight meets bfloat16 activations; with a float32 one, plain torch computes in float32.
    computed = torch.bfloat16 if format == PackedFormat.BFLOAT16 else torch.float32
    plain = []
    for order in [torch.arange(k)] + [torch.randperm(k) for _ in range(3)]:
        # 64 rows: torch sums one row and many rows in different orders
        rows = torch.cat([x, torch.zeros(64, k, dtype=dtype)]).to(computed)[:, order]
        y = (rows @ weight.values.to(computed)[:, order].T)[:m].float() + (b if bias else 0.0)
        plain.append(y.to(dtype))
    testing.assert_as_good_as_plain(out.tensor, want, testing.worst_of(plain, want))


def unambiguous(x: torch.Tensor) -> torch.Tensor:
    """x without the activations so near to the middle of two int8 steps that float32 may round them either way."""
    _, scale = reference.quantise(x)
    steps = x.double() / scale.clamp(min=1e-30).repeat_interleave(reference.SCALE_K, 1)[:, : x.shape[1]]
    return torch.where(((steps - steps.floor()) - 0.5).abs() < 1e-4, 0.0, x)


def int8_bound(x: torch.Tensor, weight: Weight, want: torch.Tensor, dtype: torch.dtype) -> float:
    """float32 arithmetic over exact integer sums: a few roundings per group of 32 and span of 128, and one of the output.

    The terms of a group are x . (q * scale) and sum(x) * zero; they may cancel.
    """
    if x.numel() == 0:
        return 0.0
    x = x.abs().double()
    zero = reference.dequantise(torch.zeros_like(weight.q), weight.scale, weight.zero, weight.group)
    terms = x @ (weight.values - zero).abs().T + x @ zero.abs().T
    arithmetic = ((x.shape[1] // 32) ** 0.5 + 4) * testing.unit_roundoff(torch.float32) * float(terms.max())
    return arithmetic + 1.01 * testing.unit_roundoff(dtype) * float(want.abs().max())


@each_format
@each_dtype
@pytest.mark.parametrize(("m", "n", "k"), [
    (0, 32, 64), (1, 1, 32), (1, 31, 64), (1, 33, 96), (2, 64, 32), (3, 100, 160), (5, 32, 576), (7, 40, 160), (8, 96, 64),
    (9, 130, 96), (17, 70, 128), (33, 65, 64), (63, 36, 32), (64, 64, 64), (65, 40, 32), (130, 40, 96),
    (130, 130, 64),
])
def test_shapes(backend: testing.Backend, m: int, n: int, k: int, format: PackedFormat, dtype: torch.dtype) -> None:
    check(m, n, k, format, dtype)


@pytest.mark.parametrize("format", [PackedFormat.FLOAT32, PackedFormat.BFLOAT16], ids=lambda f: f.name)
@pytest.mark.parametrize("k", [1, 2, 3, 17, 31, 33, 127])
def test_any_k_for_float_weights(backend: testing.Backend, k: int, format: PackedFormat) -> None:
    for m in (1, 9):
        for dtype in DTYPES:
            check(m, 37, k, format, dtype)


@each_format
@pytest.mark.parametrize("k", [1536, 4096])
def test_long_sums(backend: testing.Backend, k: int, format: PackedFormat) -> None:
    """The error of a sum must not grow with its length faster than torch's does."""
    for m in (1, 12):
        check(m, 96, k, format, torch.float32)


@each_format
def test_every_simd_level(simd_level: str, format: PackedFormat) -> None:
    for m in (1, 2, 4, 7, 40):
        check(m, 75, 96, format, torch.bfloat16, bias=True)
        check(m, 32, 64, format, torch.float32)


@each_format
@each_dtype
def test_bias(backend: testing.Backend, format: PackedFormat, dtype: torch.dtype) -> None:
    for m in (1, 20):
        check(m, 50, 64, format, dtype, bias=True)


@each_quantised
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_groups_of_the_weight(backend: testing.Backend, groups: int, format: PackedFormat) -> None:
    check(3, 40, 512, format, torch.float32, group=groups * format.group_size)


@each_quantised
def test_integer_sums_are_exact(backend: testing.Backend, format: PackedFormat) -> None:
    """Whole numbers up to 127 as activations, powers of two as scales: no rounding anywhere, extremes included."""
    n, k, levels, group = 40, 128, QUANTISED[format], format.group_size
    q = torch.randint(levels + 1, (n, k), dtype=torch.uint8)
    q[0], q[1] = levels, 0
    scale = 2.0 ** torch.randint(0, 2, (n, k // group))  # sums stay below 2^24
    symmetric = SYMMETRIC_ZERO.get(format)
    zero = scale * symmetric if symmetric else torch.randint(-8, 9, (n, k // group)).float()
    packed = ops.pack_weight(q=q, scale=scale, zero=None if symmetric else zero, format=format)
    x = torch.randint(-127, 128, (9, k)).float()
    x[:, ::128] = 127.0  # every span's scale is 1
    x[0], x[1] = 127.0, -127.0
    for m in (1, 9):
        want = reference.linear(x[:m], reference.dequantise(q, scale, zero, group))
        assert torch.equal(ops.linear(x[:m], packed).double(), want)


@each_format
def test_rows_do_not_depend_on_others_or_threads(backend: testing.Backend, set_num_threads, format: PackedFormat) -> None:
    n, k, dtypes, threads = (200, 192, DTYPES, (1, 2, 3, 7)) if backend.name == "cpu" else (40, 1184, DTYPES[2:], (1,))
    weight = Weight(n, k, format).packed
    for dtype in dtypes:
        x = torch.randn(70, k).to(dtype)
        alone = torch.cat([ops.linear(rows, weight) for rows in x.split(1 if backend.name == "cpu" else 8)])
        for num in threads:
            set_num_threads(num)
            for m in (2, 3, 4, 6, 8, 15, 16, 33, 70):
                assert torch.equal(ops.linear(x[:m], weight), alone[:m]), f"{m} rows, {num} threads, {dtype}"


@pytest.mark.parametrize("format", [PackedFormat.U4G32, PackedFormat.U8G32S], ids=lambda f: f.name)
def test_columns_do_not_depend_on_others(backend: testing.Backend, format: PackedFormat) -> None:
    """So many that a GPU's blocks no longer divide K among them."""
    n, k, levels = 66 * 128, 288, QUANTISED[format]
    q, scale = torch.randint(levels + 1, (n, k), dtype=torch.uint8), torch.rand(n, k // 32)
    zero = None if format in SYMMETRIC_ZERO else -scale
    x = torch.randn(9, k)
    some = slice(n - 70, n)
    few = ops.pack_weight(q=q[some], scale=scale[some], zero=None if zero is None else zero[some], format=format)
    assert torch.equal(ops.linear(x, ops.pack_weight(q=q, scale=scale, zero=zero, format=format))[:, some], ops.linear(x, few))


@each_format
def test_zeros_nan_and_infinity_stay_in_their_row(backend: testing.Backend, format: PackedFormat) -> None:
    weight = Weight(40, 64, format).packed
    x = torch.randn(5, 64)
    clean = ops.linear(x, weight)
    x[1], x[2, 40], x[3, 3] = 0.0, float("nan"), float("inf")
    out = ops.linear(x, weight)
    assert torch.equal(out[[0, 4]], clean[[0, 4]])
    assert torch.equal(out[1], torch.zeros(40))
    assert bool(out[2].isnan().all()) and not bool(out[3].isfinite().any())


@each_format
def test_embedding_gives_back_what_was_packed(backend: testing.Backend, format: PackedFormat) -> None:
    for n, k in ((1, 32), (33, 64), (100, 96)):
        weight = Weight(n, k, format)
        ids = torch.cat([torch.tensor([0, n - 1, n - 1]), torch.randint(n, (20,))])
        for dtype in DTYPES:
            want = weight.values[ids]
            got = ops.embedding(ids, weight.packed, dtype=dtype)
            bound = 1.01 * testing.unit_roundoff(dtype) * float(want.abs().max())
            if format in QUANTISED:  # q * scale + zero, each rounded to float32
                bound += (
                    2 * testing.unit_roundoff(torch.float32) * float((weight.scale * QUANTISED[format] + weight.zero.abs()).max())
                )
            testing.assert_within(got, want, bound)
    assert ops.embedding(torch.empty(0, dtype=torch.int64), weight.packed).shape == (0, 96)


def test_embedding_on_every_simd_level(simd_level: str) -> None:
    for format in PANELS:
        test_embedding_gives_back_what_was_packed(testing.backends()[0], format)


def test_opcheck() -> None:
    op = torch.ops.tilestream
    for format in PANELS:
        weight = Weight(33, 64, format).packed
        sizes = {"n": 33, "format": int(format)}
        torch.library.opcheck(op.linear.default, (torch.randn(3, 64), weight.data, torch.randn(33), torch.empty(3, 33)), sizes)
    ids = torch.tensor([1, 2])
    torch.library.opcheck(op.embedding.default, (ids, weight.data, torch.empty(2, 64)), sizes)
    values, packed = torch.randn(33, 64), ops.PackedWeight.empty(33, 64, PackedFormat.FLOAT32)
    torch.library.opcheck(op.pack_weight.default, (values, None, None, None, 64, packed.data), {"n": 33, "k": 64, "format": 0})


BAD_LINEAR = {
    "x dtype": ({"x": torch.zeros(2, 64).double()}, TypeError, "x has dtype Double; supported: Float, Half, BFloat16"),
    "x rank": ({"x": torch.zeros(64)}, ValueError, r"x has 1 dimensions|Dimension out of range|has shape"),
    "x stride": ({"x": torch.zeros(64, 2).T}, ValueError, "x has strides .* last dimension must be contiguous"),
    "k": ({"x": torch.zeros(2, 32)}, ValueError, r"weight has \d+ bytes; 40 x 32 in format 3 takes"),
    "k not of groups": ({"x": torch.zeros(2, 40)}, ValueError, "k is 40; group-quantised weights need a multiple of 32"),
    "bias": ({"bias": torch.zeros(41)}, ValueError, r"bias has shape \[41\]; dimension 0 must be 40"),
    "bias dtype": ({"bias": torch.zeros(40).half()}, TypeError, "bias has dtype Half; supported: Float"),
    "out": ({"out": torch.zeros(2, 41)}, ValueError, r"out has shape \[2, 41\]; dimension 1 must be 40"),
    "out dtype": ({"out": torch.zeros(2, 40).half()}, TypeError, "out has dtype Half; it must be Float as x"),
}


@pytest.mark.parametrize("name", BAD_LINEAR)
def test_bad_input(name: str) -> None:
    change, error, message = BAD_LINEAR[name]
    weight = Weight(40, 64, PackedFormat.U4G32).packed
    arguments = {"x": torch.zeros(2, 64), "bias": None, "out": torch.zeros(2, 40)} | change
    with pytest.raises(error, match=message):
        torch.ops.tilestream.linear(arguments["x"], weight.data, arguments["bias"], arguments["out"], n=40, format=3)


def test_bad_weight_and_ids() -> None:
    weight = Weight(40, 64, PackedFormat.U4G32).packed
    with pytest.raises(ValueError, match="format is 11; allowed: 0 to 10"):
        torch.ops.tilestream.linear(torch.zeros(2, 64), weight.data, None, torch.zeros(2, 40), n=40, format=11)
    with pytest.raises(ValueError, match="weight must start at a 64-byte boundary"):
        moved = torch.empty(weight.data.numel() + 64, dtype=torch.uint8)[1 : weight.data.numel() + 1]
        torch.ops.tilestream.linear(torch.zeros(2, 64), moved, None, torch.zeros(2, 40), n=40, format=3)
    for bad in (-1, 40):
        with pytest.raises(ValueError, match=f"ids holds {bad}; allowed: 0 to 39"):
            ops.embedding(torch.tensor([0, bad, 3]), weight)
    with pytest.raises(TypeError, match="ids has dtype Int; supported: Long"):
        ops.embedding(torch.tensor([0], dtype=torch.int32), weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"q": torch.full((32, 32), 16, dtype=torch.uint8), "scale": torch.ones(32, 1), "format": PackedFormat.U4G32S},
            "q holds 16; allowed: 0 to 15",
        ),
        (
            {"q": torch.zeros(32, 32, dtype=torch.uint8), "scale": torch.ones(32, 1), "format": PackedFormat.U4G32},
            "zero is missing",
        ),
        (
            {
                "q": torch.zeros(32, 32, dtype=torch.uint8),
                "scale": torch.ones(32, 1),
                "zero": torch.ones(32, 1),
                "format": PackedFormat.U8G32S,
            },
            "zero is given",
        ),
        (
            {"q": torch.zeros(32, 32, dtype=torch.uint8), "scale": torch.ones(32, 2), "format": PackedFormat.U8G32S, "group": 16},
            "group is 16; allowed for format 4: multiples of 32",
        ),
        (
            {"q": torch.zeros(32, 64, dtype=torch.uint8), "scale": torch.ones(31, 2), "format": PackedFormat.U8G32S},
            r"scale has shape \[31, 2\]; dimension 0 must be 32",
        ),
        ({"values": torch.zeros(32, 32), "format": PackedFormat.U8G32S}, "packed from q and scale, not from values"),
        (
            {"q": torch.zeros(32, 32, dtype=torch.uint8), "scale": torch.ones(32, 1), "format": PackedFormat.FLOAT32},
            "packed from values, not from q",
        ),
        ({"format": PackedFormat.FLOAT32}, "pack_weight needs values"),
    ],
)
def test_bad_packing(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.pack_weight(**arguments)
