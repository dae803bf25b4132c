"""Activation rows as integers: quantise, the ops that quantise their result, and the linear that takes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from tilestream import ops, testing
from tilestream.ops import PackedFormat, QuantisedRows
from tilestream.reference import activation as activation_reference
from tilestream.reference import linear as reference
from tilestream.reference import norm as norm_reference

EPS = 1e-5
pytestmark = pytest.mark.simt
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
K4 = [(1, 128, 128), (3, 576, 256), (5, 1536, 1408), (9, 2048 + 160, 2048), (2, 4096, 2304)]
each_k4 = pytest.mark.parametrize(("rows", "k", "k4"), K4)
SHAPES = [(0, 64), (1, 32), (1, 576), (3, 96), (5, 128), (7, 160), (33, 1536), (2, 2048 + 32)]


def check_rows(got: QuantisedRows, values: torch.Tensor, error: float = 0.0) -> None:
    """`got` stands for `values` (float64), which the op may have computed with an error of up to `error`."""
    want_q, want_scale = reference.quantise(values, got.k4)
    q = reference.unpack_rows(got.q, got.k4)
    tolerance = error + 2 * testing.unit_roundoff(torch.float32) * float(values.abs().max()) if values.numel() else 0.0
    assert torch.equal(got.sum.long(), q.unflatten(1, (-1, 32)).sum(2))
    if values.numel():
        assert q.abs().max() <= 127 and q[:, : got.k4].ge(-8).all() and q[:, : got.k4].le(7).all()
    testing.assert_within(got.scale, want_scale, 1.01 * tolerance / (8 if got.k4 else 127))
    # Half a step from the value, or a whole one where INT4 has no 8; an integer may differ from the reference's only where
    # the value is near the middle.
    steps = want_scale.abs().repeat_interleave(reference.SCALE_K, 1)[:, : values.shape[1]]
    allowed = torch.full_like(steps, 0.5)
    allowed[:, : got.k4][q[:, : got.k4] == 7] = 1.0
    assert bool(((reference.dequantise_rows(q, got.scale) - values).abs() <= allowed * steps + 2 * tolerance).all())
    differs = q != want_q
    assert bool(((values / steps.clamp(min=1e-30)).abs().frac()[differs] - 0.5).abs().max() < 1e-2) if differs.any() else True


@each_dtype
@pytest.mark.parametrize(("rows", "k"), SHAPES)
def test_quantise(backend: testing.Backend, rows: int, k: int, dtype: torch.dtype) -> None:
    x = testing.Guarded((rows, k), dtype, fill=torch.randn(rows, k)).tensor
    check_rows(ops.quantise(x), x.double())


@each_dtype
@each_k4
def test_int4_blocks(backend: testing.Backend, rows: int, k: int, k4: int, dtype: torch.dtype) -> None:
    """From each op that quantises."""
    x = torch.randn(rows, 2 * k).to(dtype)
    q, memory = testing.guarded_contiguous((rows, k - k4 // 2), torch.int8)
    out = dataclasses.replace(QuantisedRows.empty(rows, k, k4=k4), q=q)
    check_rows(ops.quantise(x[:, :k], out=out), x[:, :k].double())
    testing.assert_margins(memory)
    values = activation_reference.silu_and_mul(x)
    check_rows(ops.silu_and_mul_quant(x, k4=k4), values, 16 * testing.unit_roundoff(torch.float32) * float(values.abs().max()))
    residual, weight = torch.randn(rows, k).to(dtype), 1 + 0.2 * torch.randn(k)
    got = ops.fused_add_rms_norm_quant(x[:, :k], residual, weight, eps=EPS, k4=k4)
    values = norm_reference.rms_norm(residual, weight, EPS)
    check_rows(got, values, 8 * testing.unit_roundoff(torch.float32) * float(values.abs().max()))
    check_rows(
        ops.rms_norm_quant(residual, weight, eps=EPS, k4=k4),
        values,
        8 * testing.unit_roundoff(torch.float32) * float(values.abs().max()),
    )


def test_int4_uses_all_of_its_sixteen_values(backend: testing.Backend) -> None:
    """The largest magnitude is -8 whatever its sign, the positive one of two; what then would be 8 is 7."""
    x = torch.zeros(5, 128)
    x[0, :2], x[1, :2], x[2, 5], x[2, 100] = torch.tensor([4.0, -3.0]), torch.tensor([-4.0, 3.0]), 4.0, -4.0
    x[3, :4] = torch.tensor([-4.0, 3.76, 3.74, -0.24])
    rows = ops.quantise(x, k4=128)
    q = reference.unpack_rows(rows.q, 128)
    assert rows.scale[:, 0].tolist() == [-0.5, 0.5, -0.5, 0.5, 0.0]
    assert q[0, :2].tolist() == [-8, 6] and q[1, :2].tolist() == [-8, 6]
    assert (q[2, 5], q[2, 100]) == (-8, 7)
    assert q[3, :4].tolist() == [-8, 7, 7, 0] and not q[4].any()
    assert torch.equal(rows.sum.long(), q.unflatten(1, (-1, 32)).sum(2))


@each_dtype
@pytest.mark.parametrize(("rows", "k"), SHAPES)
def test_fused_add_rms_norm_quant(backend: testing.Backend, rows: int, k: int, dtype: torch.dtype) -> None:
    x, residual, weight = torch.randn(rows, k).to(dtype), torch.randn(rows, k).to(dtype), 1 + 0.2 * torch.randn(k)
    plain_x, plain_residual, x_before = x.clone(), residual.clone(), x.clone()
    rows_out = ops.fused_add_rms_norm_quant(x, residual, weight, eps=EPS)
    ops.fused_add_rms_norm(plain_x, plain_residual, weight, eps=EPS)
    assert torch.equal(x, x_before)
    assert torch.equal(residual, plain_residual)
    values = norm_reference.rms_norm(residual, weight, EPS)
    check_rows(rows_out, values, 8 * testing.unit_roundoff(torch.float32) * float(values.abs().max()) if rows else 0.0)


@each_dtype
@pytest.mark.parametrize(("rows", "k"), SHAPES)
def test_rms_norm_quant(backend: testing.Backend, rows: int, k: int, dtype: torch.dtype) -> None:
    """As quantised after an addition of nothing, bit for bit."""
    x, weight = testing.Guarded((rows, k), dtype, fill=torch.randn(rows, k)).tensor, 1 + 0.2 * torch.randn(k)
    values = norm_reference.rms_norm(x, weight, EPS)
    got = ops.rms_norm_quant(x, weight, eps=EPS)
    check_rows(got, values, 8 * testing.unit_roundoff(torch.float32) * float(values.abs().max()) if rows else 0.0)
    added = ops.fused_add_rms_norm_quant(x, torch.zeros(rows, k, dtype=dtype), weight, eps=EPS)
    for part in ("q", "scale", "sum"):
        assert torch.equal(getattr(got, part), getattr(added, part))


@each_dtype
@pytest.mark.parametrize("name", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("rows", "k"), SHAPES)
def test_gated_activations(backend: testing.Backend, rows: int, k: int, name: str, dtype: torch.dtype) -> None:
    x = (3 * torch.randn(rows, 2 * k)).to(dtype)
    values = getattr(activation_reference, name + "_and_mul")(x)
    error = 16 * testing.unit_roundoff(torch.float32) * float(values.abs().max()) if rows else 0.0
    check_rows(getattr(ops, name + "_and_mul_quant")(x), values, error)


@each_dtype
@pytest.mark.parametrize(
    ("rows", "k", "k4"), [(0, 128, 0), (1, 128, 0), *K4[:1], (3, 640, 256), (5, 1536, 1408), (2, 4224, 2304)]
)
def test_hadamard(backend: testing.Backend, rows: int, k: int, k4: int, dtype: torch.dtype) -> None:
    """Turned rows, as floats and as integers."""
    x = torch.randn(rows, k + 8).to(dtype)[:, 8:]
    values = reference.hadamard(x)
    error = 16 * testing.unit_roundoff(torch.float32) * (float(x.abs().max()) if rows else 0.0)
    out = testing.Guarded((rows, k), dtype)
    ops.hadamard(x, out=out.tensor)
    out.assert_untouched_outside()
    rounding = testing.unit_roundoff(dtype) * (float(values.abs().max()) if rows else 0.0)
    testing.assert_within(out.tensor, values, error + rounding)
    check_rows(ops.quantise(x, k4=k4, hadamard=True), values, error)
    in_place = x.clone()
    assert torch.equal(ops.hadamard(in_place, out=in_place), out.tensor)


def test_hadamard_undoes_itself_and_spreads_outliers(backend: testing.Backend) -> None:
    x = torch.zeros(2, 256)
    x[0, 5], x[1] = 128**0.5, torch.randn(256)
    turned = ops.hadamard(x)
    torch.testing.assert_close(turned[0, :128].abs(), torch.ones(128))
    assert not turned[0, 128:].any()
    torch.testing.assert_close(ops.hadamard(turned), x, atol=1e-5, rtol=0)


def test_hadamard_of_what_is_not_finite(backend: testing.Backend) -> None:
    x = torch.randn(1, 384)
    clean = ops.quantise(x, hadamard=True)
    x[0, 130] = float("inf")
    turned, rows = ops.hadamard(x), ops.quantise(x, hadamard=True)
    assert not turned[0, 128:256].isfinite().any() and turned[0, :128].isfinite().all() and turned[0, 256:].isfinite().all()
    assert bool(rows.scale[0, 1].isnan()) and torch.equal(rows.scale[0, [0, 2]], clean.scale[0, [0, 2]])


def test_hadamard_errors() -> None:
    with pytest.raises(ValueError, match=r"x has shape \[2, 160\]; with hadamard dimension 1 must be a multiple of 128"):
        ops.hadamard(torch.zeros(2, 160))
    with pytest.raises(ValueError, match=r"multiple of 128"):
        ops.quantise(torch.zeros(2, 160), hadamard=True)
    with pytest.raises(ValueError, match=r"out has shape"):
        ops.hadamard(torch.zeros(2, 128), out=torch.zeros(3, 128))
    with pytest.raises(TypeError, match=r"out"):
        ops.hadamard(torch.zeros(2, 128), out=torch.zeros(2, 128, dtype=torch.float16))


@each_dtype
def test_every_simd_level(simd_level: str, dtype: torch.dtype) -> None:
    x = torch.randn(5, 576).to(dtype)
    check_rows(ops.quantise(x), x.double())
    values = activation_reference.silu_and_mul(x)
    check_rows(ops.silu_and_mul_quant(x), values, 16 * testing.unit_roundoff(torch.float32) * float(values.abs().max()))
    check_rows(ops.quantise(x[:, :512], k4=256), x[:, :512].double())
    error = 16 * testing.unit_roundoff(torch.float32) * float(x.abs().max())
    check_rows(ops.quantise(x[:, :512], k4=256, hadamard=True), reference.hadamard(x[:, :512]), error)


@pytest.mark.parametrize("format", [f for f in PackedFormat if f.is_quantised], ids=lambda f: f.name)
@each_dtype
def test_linear_on_int8_rows_is_linear(
    backend: testing.Backend, set_num_threads: Callable[[int], None], format: PackedFormat, dtype: torch.dtype
) -> None:
    """Quantising before and inside the linear is the same, bit for bit, whatever the number of rows and threads."""
    n, k = 75, 224
    levels = 2**format.bits
    q, scale = torch.randint(levels, (n, k), dtype=torch.uint8), torch.rand(n, -(-k // format.group_size))
    weight = ops.pack_weight(q=q, scale=scale, zero=None if format.is_symmetric else -scale * levels / 3, format=format)
    bias = torch.randn(n)
    for m in (0, 1, 3, 6, 7, 40):
        x = torch.randn(m, k).to(dtype)
        for num in (1, 3) if backend.name == "cpu" else (1,):
            set_num_threads(num)
            out = testing.Guarded((m, n), dtype)
            ops.linear(ops.quantise(x), weight, bias, out=out.tensor)
            out.assert_untouched_outside()
            assert torch.equal(out.tensor, ops.linear(x, weight, bias))


def test_rows_do_not_depend_on_others_or_threads(backend: testing.Backend, set_num_threads) -> None:
    x, weight = torch.randn(301, 576), torch.ones(576)
    alone = [ops.fused_add_rms_norm_quant(row, torch.zeros_like(row), weight) for row in x.split(1)]
    for num in (1, 2, 3, 7) if backend.name == "cpu" else (1,):
        set_num_threads(num)
        got = ops.fused_add_rms_norm_quant(x, torch.zeros_like(x), weight)
        for part in ("q", "scale", "sum"):
            assert torch.equal(getattr(got, part), torch.cat([getattr(row, part) for row in alone]))


@pytest.mark.parametrize("format", [f for f in PackedFormat if f.bits == 4 and f.group_size == 128], ids=lambda f: f.name)
@each_k4
def test_linear_on_int4_blocks(
    backend: testing.Backend, set_num_threads: Callable[[int], None], format: PackedFormat, rows: int, k: int, k4: int
) -> None:
    """The integers are exact: whole numbers as activations, powers of two as weight scales, extremes included."""
    n = 75
    q, scale = torch.randint(16, (n, k), dtype=torch.uint8), 2.0 ** torch.randint(-1, 1, (n, -(-k // 128)))
    q[0], q[1] = 15, 0
    zero = -8 * scale if format.is_symmetric else torch.randint(-8, 9, scale.shape).float()
    weight = ops.pack_weight(q=q, scale=scale, zero=None if format.is_symmetric else zero, format=format)
    x = torch.randint(-7, 8, (rows, k)).float()
    x[:, k4:] = torch.randint(-127, 128, (rows, k - k4))
    x[::2, :k4:128], x[1::2, :k4:128], x[:, k4::128] = 8.0, -8.0, -127.0  # every span's scale is 1 or -1
    x[0, :k4] = 8.0
    x[-1, :k4:2] = -8.0
    x[-1, 1:k4:2] = 7.0
    want = reference.linear(x, reference.dequantise(q, scale, zero, 128))
    for num in (1, 3) if backend.name == "cpu" else (1,):
        set_num_threads(num)
        for dtype in (torch.float32, torch.bfloat16):
            out = testing.Guarded((rows, n), dtype)
            ops.linear(ops.quantise(x, k4=k4), weight, out=out.tensor)
            out.assert_untouched_outside()
            assert torch.equal(out.tensor, want.to(dtype))


@pytest.mark.parametrize("format", [PackedFormat.U4G128S, PackedFormat.U4G128], ids=lambda f: f.name)
def test_int4_rows_do_not_depend_on_others(backend: testing.Backend, format: PackedFormat) -> None:
    n, k, k4 = 40, 1184, 640
    q, scale = torch.randint(16, (n, k), dtype=torch.uint8), torch.rand(n, -(-k // 128))
    weight = ops.pack_weight(q=q, scale=scale, zero=None if format.is_symmetric else -5 * scale, format=format)
    x = torch.randn(70, k)

    def product(rows: torch.Tensor) -> torch.Tensor:
        return ops.linear(ops.quantise(rows, k4=k4), weight, out=torch.empty(rows.size(0), n))

    alone = torch.cat([product(rows) for rows in x.split(7)])
    for m in (9, 17, 33, 70):
        assert torch.equal(product(x[:m]), alone[:m]), m


def test_int4_rows_meet_groups_of_128_on_a_gpu(backend: testing.Backend) -> None:
    weight = ops.pack_weight(q=torch.zeros(32, 128, dtype=torch.uint8), scale=torch.ones(32, 4), format=PackedFormat.U4G32S)
    rows = ops.quantise(torch.zeros(1, 128), k4=128)
    if backend.name == "cpu":
        assert not ops.linear(rows, weight).any()
        return
    with pytest.raises((ValueError, RuntimeError), match=r"format is 2; INT4 activations meet formats 6 and 7"):
        ops.linear(rows, weight)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_span(backend: testing.Backend, bad: float) -> None:
    x = torch.randn(3, 320)
    clean = ops.quantise(x)
    x[1, 130] = bad
    x[2, :] = 0.0
    got = ops.quantise(x)
    assert bool(got.scale[1, 1].isnan())
    assert torch.equal(got.scale[1, [0, 2]], clean.scale[1, [0, 2]]) and torch.equal(got.q[0], clean.q[0])
    assert not bool(got.scale[2].any()) and not bool(got.q[2].any())


def test_opcheck() -> None:
    op = torch.ops.tilestream
    x, out = torch.randn(3, 64), QuantisedRows.empty(3, 64)
    rows = (out.q, out.scale, out.sum)
    torch.library.opcheck(op.quantise.default, (x, *rows))
    torch.library.opcheck(op.rms_norm_quant.default, (x, torch.ones(64), *rows), {"eps": EPS})
    torch.library.opcheck(op.fused_add_rms_norm_quant.default, (x, torch.randn(3, 64), torch.ones(64), *rows), {"eps": EPS})
    for name in ("silu_and_mul_quant", "gelu_tanh_and_mul_quant"):
        torch.library.opcheck(getattr(op, name).default, (torch.randn(3, 128), *rows))
    wide = QuantisedRows.empty(3, 128)
    torch.library.opcheck(op.quantise.default, (torch.randn(3, 128), wide.q, wide.scale, wide.sum), {"hadamard": True})
    torch.library.opcheck(op.hadamard.default, (torch.randn(3, 128), torch.empty(3, 128)))
    weight = ops.pack_weight(q=torch.zeros(33, 64, dtype=torch.uint8), scale=torch.ones(33, 2), format=PackedFormat.U4G32S)
    sizes = {"n": 33, "format": int(PackedFormat.U4G32S)}
    torch.library.opcheck(op.linear_quant.default, (*rows, weight.data, torch.randn(33), torch.empty(3, 33)), sizes)


BAD = {
    "k": ({"x": torch.zeros(3, 40)}, ValueError, "the rows to quantise have 40 elements; allowed: multiples of 32"),
    "x dtype": ({"x": torch.zeros(3, 64).double()}, TypeError, "x has dtype Double; supported: Float, Half, BFloat16"),
    "q dtype": ({"q": torch.zeros(3, 64)}, TypeError, "q has dtype Float; supported: Char"),
    "q rows": ({"q": torch.zeros(2, 64, dtype=torch.int8)}, ValueError, r"q has shape \[2, 64\]; dimension 0 must be 3 \(rows\)"),
    "scale": (
        {"scale": torch.zeros(3, 2)},
        ValueError,
        r"scale has shape \[3, 2\]; dimension 1 must be 1 \(k / 128, rounded up\)",
    ),
    "sum": (
        {"sum": torch.zeros(3, 1, dtype=torch.int32)},
        ValueError,
        r"sum has shape \[3, 1\]; dimension 1 must be 2 \(k / 32\)",
    ),
    "strides": ({"q": torch.zeros(3, 96, dtype=torch.int8)[:, :64]}, ValueError, "q has strides .* must be contiguous"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    change, error, message = BAD[name]
    room = QuantisedRows.empty(3, 64)
    arguments = {"x": torch.zeros(3, 64), "q": room.q, "scale": room.scale, "sum": room.sum} | change
    with pytest.raises(error, match=message):
        torch.ops.tilestream.quantise(*arguments.values())


def test_int8_rows_need_a_quantised_weight() -> None:
    weight = ops.pack_weight(torch.zeros(32, 64), format=PackedFormat.FLOAT32)
    with pytest.raises(ValueError, match="format is 0; quantised activations need a group-quantised weight, 2 to 8"):
        ops.linear(QuantisedRows.empty(3, 64), weight)
