"""What a linear does after its product: gated activation and residual, of every format and every kernel."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.ops.test_linear import (
    DTYPES,
    PANELS,
    QUANTISED,
    Weight,
    each_dtype,
    each_format,
    each_quantised,
    int8_bound,
    unambiguous,
)
from tests.ops.test_linear_rows import each_kernel, weight_of
from tilestream import ops, testing
from tilestream.ops import LinearKernel, PackedFormat, PackedWeight
from tilestream.ops.linear import ACTIVATIONS
from tilestream.reference import linear as reference

pytestmark = pytest.mark.simt(archs=(80, 90))
FLOAT_ERROR = testing.unit_roundoff(torch.float32)
each_gate = pytest.mark.parametrize("gate", list(ACTIVATIONS))
# One row, a warp's, tiles of each size, and row counts and columns that fill none of them. k of one span, several, and a part.
SHAPES = [
    (0, 32, 64),
    (1, 2, 32),
    (1, 34, 96),
    (3, 100, 160),
    (8, 96, 576),
    (9, 130, 96),
    (17, 70, 128),
    (33, 66, 64),
    (65, 40, 32),
    (130, 130, 96),
]


def two_ops(y: torch.Tensor, gate: str) -> torch.Tensor:
    """The gate as an op of its own on alternating columns."""
    return ACTIVATIONS[gate](torch.cat([y[:, ::2], y[:, 1::2]], 1))


def check(
    m: int,
    n: int,
    k: int,
    format: PackedFormat,
    dtype: torch.dtype,
    gate: str | None,
    *,
    in_place: bool = False,
    act_bits: int = 8,
) -> None:
    """Against float64, and where results are float32 against the product and another op."""
    weight, bias = Weight(n, k, format), torch.randn(n) if m % 2 == 1 else None
    values = torch.randn(m, k).to(dtype)
    is_int8 = format in QUANTISED and act_bits == 8
    x = testing.Guarded((m, k), dtype, fill=unambiguous(values) if is_int8 else values).tensor
    num_outputs = n if gate is None else n // 2
    residual = None if gate else testing.Guarded((m, n), dtype, fill=torch.randn(m, n))
    out = residual if in_place else testing.Guarded((m, num_outputs), dtype)
    added = residual.tensor.clone() if residual else None
    arguments = {"gate": gate, "residual": residual.tensor if residual else None}
    ops.linear(x, weight.packed, bias, out=out.tensor, act_bits=act_bits, **arguments)
    out.assert_untouched_outside()
    if residual is not None and not in_place:
        assert torch.equal(residual.tensor, added)

    def finish(y: torch.Tensor) -> torch.Tensor:
        return reference.gated(y, gate) if gate else y + added.double()

    if is_int8:
        y = reference.linear_int8(x, weight.q, weight.scale, weight.zero, weight.group, bias)
        want, error = finish(y), int8_bound(x, weight, y, torch.float32)
        if gate is not None and m > 0:  # neither activation is steeper than 1.13 or larger than its argument
            error = (2.2 * float(y.abs().max()) + error) * error + 8 * FLOAT_ERROR * float(want.abs().max())
        testing.assert_within(
            out.tensor, want, error + 1.01 * testing.unit_roundoff(dtype) * float(want.abs().max()) if m else 0.0
        )
    else:
        # A bfloat16 weight meets bfloat16 activations, whose products are then summed in float32.
        x = x.bfloat16() if format == PackedFormat.BFLOAT16 else x
        want = finish(reference.linear(x, weight.values, bias))
        computed = dtype if act_bits == 16 else torch.float32
        plain = []
        for order in [torch.arange(k)] + [torch.randperm(k) for _ in range(3)]:
            # 64 rows: torch sums one row and many rows in different orders
            rows = torch.cat([x, torch.zeros(64, k, dtype=x.dtype)]).to(computed)[:, order]
            y = (rows @ weight.values.to(computed)[:, order].T)[:m].float() + (0.0 if bias is None else bias)
            plain.append(finish(y).to(dtype))
        testing.assert_as_good_as_plain(out.tensor, want, testing.worst_of(plain, want))
    if dtype == torch.float32:
        y = ops.linear(x.float(), weight.packed, bias, act_bits=act_bits)
        same = two_ops(y, gate) if gate else y + added
        testing.assert_within(out.tensor, same.double(), 4 * FLOAT_ERROR * float(same.abs().max()) if m else 0.0)


def dtype_of(m: int, format: PackedFormat) -> torch.dtype:
    """Each format meets each dtype, and each row count too, but not all of them each other."""
    return DTYPES[(m + format) % 3]


@each_format
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_gates(backend: testing.Backend, m: int, n: int, k: int, format: PackedFormat) -> None:
    check(m, n, k, format, dtype_of(m, format), "gelu_tanh" if k % 64 == 0 else "silu")


@each_format
@pytest.mark.parametrize(("m", "n", "k"), [(m, n + n % 3, k) for m, n, k in SHAPES])  # odd n too
def test_residuals(backend: testing.Backend, m: int, n: int, k: int, format: PackedFormat) -> None:
    check(m, n, k, format, dtype_of(m, format), None, in_place=m % 2 == 0)


@each_quantised
@each_dtype
@pytest.mark.parametrize(("m", "n", "k"), [(1, 34, 96), (9, 130, 1184), (65, 40, 128)])
def test_weight_only(backend: testing.Backend, m: int, n: int, k: int, format: PackedFormat, dtype: torch.dtype) -> None:
    if backend.name != "cpu" and dtype == torch.float32:
        pytest.skip("a GPU has kernels for float16 and bfloat16")
    check(m, n, k, format, dtype, "silu", act_bits=16)
    check(m, n, k, format, dtype, None, in_place=True, act_bits=16)


@each_format
@each_gate
def test_every_simd_level(simd_level: str, format: PackedFormat, gate: str) -> None:
    for m in (1, 4, 40):
        for dtype in DTYPES:
            check(m, 76, 96, format, dtype, gate)
            check(m, 75, 96, format, dtype, None, in_place=True)


@each_format
@each_gate
def test_interleaved_rows_are_the_two_layers(backend: testing.Backend, format: PackedFormat, gate: str) -> None:
    """A weight made of gate and up, with a bias, gives the bits of both layers and the op on a CPU; on a GPU nearly."""
    inner, k = 37, 128
    if format in QUANTISED:
        groups = k // format.group_size
        parts = [torch.randint(QUANTISED[format] + 1, (inner, k), dtype=torch.uint8) for _ in range(2)]
        scales = [torch.rand(inner, groups) / QUANTISED[format] / k**0.5 for _ in range(2)]

        def packed(join: Callable) -> PackedWeight:
            scale = join(*scales)
            zero = None if format.is_symmetric else -scale * QUANTISED[format] / 3
            return ops.pack_weight(q=join(*parts), scale=scale, zero=zero, format=format)
    else:
        parts = [torch.randn(inner, k) / k**0.5 for _ in range(2)]

        def packed(join: Callable) -> PackedWeight:
            return ops.pack_weight(join(*parts), format=format)

    biases = [torch.randn(inner) for _ in range(2)]
    x = torch.randn(5, k)
    got = ops.linear(x, packed(ops.interleave_gate_up), ops.interleave_gate_up(*biases), gate=gate)
    side_by_side = lambda *both: torch.cat(both)  # noqa: E731
    want = ACTIVATIONS[gate](ops.linear(x, packed(side_by_side), side_by_side(*biases)))
    assert torch.equal(got, want) if backend.name == "cpu" else torch.allclose(got, want, rtol=1e-6, atol=1e-7)


def rows_of(x: torch.Tensor, rows: slice, weight: PackedWeight, epilogue: dict[str, object]) -> torch.Tensor:
    residual = epilogue.get("residual")
    return ops.linear(x[rows], weight, **epilogue | ({} if residual is None else {"residual": residual[rows]}))


@each_format
@pytest.mark.parametrize("kind", ["gate", "residual"])
def test_rows_do_not_depend_on_others_or_threads(
    backend: testing.Backend, set_num_threads, format: PackedFormat, kind: str
) -> None:
    n, k, threads = (200, 192, (1, 2, 7)) if backend.name == "cpu" else (40, 1184, (1,))
    weight, x = Weight(n, k, format).packed, torch.randn(70, k).bfloat16()
    epilogue = {"gate": "silu"} if kind == "gate" else {"residual": torch.randn(70, n).bfloat16()}
    step = 1 if backend.name == "cpu" else 8
    alone = torch.cat([rows_of(x, slice(i, i + step), weight, epilogue) for i in range(0, 70, step)])
    for num in threads:
        set_num_threads(num)
        for m in (2, 9, 16, 33, 70):
            assert torch.equal(rows_of(x, slice(0, m), weight, epilogue), alone[:m]), f"{m} rows, {num} threads"


@pytest.mark.parametrize("format", [PackedFormat.U4G32, PackedFormat.U4G128S], ids=lambda f: f.name)
def test_so_many_columns_that_blocks_do_not_divide_k(backend: testing.Backend, format: PackedFormat) -> None:
    """On a GPU most tiles are whole and the last ones divided; all of them end in the same way."""
    check(9, 66 * 128 + 2, 256, format, torch.float32, "silu")
    check(9, 66 * 128 + 1, 256, format, torch.float32, None, in_place=True)


@each_quantised
def test_quantised_rows(backend: testing.Backend, format: PackedFormat) -> None:
    """Integers in, whatever the result's type."""
    weight, x, bias = Weight(66, 128, format).packed, torch.randn(5, 128), torch.randn(66)
    rows, y = ops.quantise(x), ops.linear(x, weight, bias)
    for dtype in DTYPES:
        error = 2 * testing.unit_roundoff(dtype)
        for gate in ACTIVATIONS:
            want = two_ops(y, gate)
            got = ops.linear(rows, weight, bias, gate=gate, out=torch.empty(5, 33, dtype=dtype))
            testing.assert_within(got, want.double(), error * float(want.abs().max()))
        residual = torch.randn(5, 66).to(dtype)
        got = ops.linear(rows, weight, bias, residual=residual)
        assert got.dtype == dtype and got.data_ptr() != residual.data_ptr()
        testing.assert_within(got, y.double() + residual, error * float((y + residual).abs().max()))
    assert ops.linear(rows, weight, gate="silu").dtype == torch.float32


@each_kernel
@pytest.mark.parametrize("format", [PackedFormat.ROWS_BFLOAT16, PackedFormat.ROWS_FLOAT16], ids=lambda f: f.name)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 2, 8), (1, 34, 1096), (3, 130, 32), (9, 66, 72), (65, 40, 4168)])
def test_row_major_weights(backend: testing.Backend, m: int, n: int, k: int, format: PackedFormat, kernel: LinearKernel) -> None:
    if backend.name == "cpu" and kernel != LinearKernel.CUBLAS:  # which is torch's, and runs wherever torch does
        pytest.skip("row-major weights are for GPUs")
    weight, values = weight_of(n, k, format)
    dtype, bias = values.dtype, torch.randn(n) if m % 2 == 1 else None
    x = testing.Guarded((m, k), dtype, fill=torch.randn(m, k)).tensor
    y = reference.linear(x, values.double(), bias)
    plain_y = (x @ values.T).float() + (0.0 if bias is None else bias)
    for gate in ACTIVATIONS:
        out = testing.Guarded((m, n // 2), dtype)
        ops.linear(x, weight, bias, out=out.tensor, kernel=kernel, gate=gate)
        out.assert_untouched_outside()
        testing.assert_as_good_as_plain(out.tensor, reference.gated(y, gate), two_ops(plain_y.to(dtype), gate))
    for in_place in (False, True):
        residual = testing.Guarded((m, n), dtype, fill=torch.randn(m, n))
        out, want = residual if in_place else testing.Guarded((m, n), dtype), y + residual.tensor.double()
        plain = plain_y.to(dtype) + residual.tensor
        ops.linear(x, weight, bias, out=out.tensor, kernel=kernel, residual=residual.tensor)
        out.assert_untouched_outside()
        testing.assert_as_good_as_plain(out.tensor, want, plain)


def test_opcheck() -> None:
    op = torch.ops.tilestream
    for format in PANELS:
        weight, sizes = Weight(34, 64, format).packed, {"n": 34, "format": int(format)}
        x = torch.randn(3, 64)
        torch.library.opcheck(op.linear.default, (x, weight.data, torch.randn(34), torch.empty(3, 17)), sizes | {"gate": "silu"})
        residual = {"residual": torch.randn(3, 34)}
        torch.library.opcheck(op.linear.default, (x, weight.data, None, torch.empty(3, 34)), sizes | residual)
        if format in QUANTISED:
            rows = ops.quantise(x)
            quantised = (rows.q, rows.scale, rows.sum, weight.data, None)
            torch.library.opcheck(op.linear_quant.default, (*quantised, torch.empty(3, 17)), sizes | {"gate": "gelu_tanh"})
            torch.library.opcheck(op.linear_quant.default, (*quantised, torch.empty(3, 34)), sizes | residual)


BAD = {
    "gate": ({"gate": "relu", "out": torch.zeros(2, 20)}, ValueError, "gate is 'relu'; allowed: silu, gelu_tanh, or none"),
    "out of a gate": (
        {"gate": "silu"},
        ValueError,
        r"out has shape \[2, 40\]; dimension 1 must be 20 \(n / 2, for there is a gate\)",
    ),
    "both": (
        {"gate": "silu", "out": torch.zeros(2, 20), "residual": torch.zeros(2, 20)},
        ValueError,
        "gate is 'silu' and a residual is given; allowed: one of them",
    ),
    "residual dtype": ({"residual": torch.zeros(2, 40).half()}, TypeError, "residual has dtype Half; it must be Float as out"),
    "residual shape": (
        {"residual": torch.zeros(1, 40)},
        ValueError,
        r"residual has shape \[1, 40\]; it must be that of out, \[2, 40\]",
    ),
    "residual strides": (
        {"residual": torch.zeros(40, 2).T},
        ValueError,
        "residual has strides .* last dimension must be contiguous",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    change, error, message = BAD[name]
    weight, x = Weight(40, 64, PackedFormat.U4G32).packed, torch.zeros(2, 64)
    arguments = {"out": torch.zeros(2, 40)} | change
    for rows in (x, ops.quantise(x)):
        with pytest.raises(error, match=message):
            ops.linear(rows, weight, **arguments)


def test_refusals() -> None:
    odd = Weight(41, 64, PackedFormat.U4G32).packed
    with pytest.raises(
        ValueError, match="n is 41; with a gate the weight's rows alternate between gate and up, so it must be even"
    ):
        ops.linear(torch.zeros(2, 64), odd, gate="silu")
    shared = torch.zeros(3, 40)
    with pytest.raises(ValueError, match="residual shares a part of out's memory; allowed: all of it in the same order, or none"):
        ops.linear(torch.zeros(2, 64), Weight(40, 64, PackedFormat.U4G32).packed, out=shared[:2], residual=shared[1:])
    with pytest.raises(ValueError, match=r"gate is \[3, 4\] torch.float32, up \[2, 4\] torch.float32; they must be alike"):
        ops.interleave_gate_up(torch.zeros(3, 4), torch.zeros(2, 4))
    rows = ops.pack_weight(torch.zeros(4, 64), format=PackedFormat.ROWS_BFLOAT16)
    x = torch.zeros(2, 64).bfloat16()
    for arguments, message in (
        ({"gate": "relu"}, "gate is 'relu'; allowed: silu, gelu_tanh, or none"),
        ({"gate": "silu", "residual": torch.zeros(2, 2).bfloat16()}, "gate is 'silu' and a residual is given"),
        ({"residual": torch.zeros(4).bfloat16()}, r"residual is \[4\] torch.bfloat16; it must be as out, \[2, 4\]"),
        ({"residual": torch.zeros(2, 4)}, r"residual is \[2, 4\] torch.float32; it must be as out, .* torch.bfloat16"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.linear(x, rows, kernel=LinearKernel.CUBLAS, **arguments)
    with pytest.raises(ValueError, match="n is 3; with a gate"):
        odd_rows = ops.pack_weight(torch.zeros(3, 64), format=PackedFormat.ROWS_BFLOAT16)
        ops.linear(x, odd_rows, kernel=LinearKernel.CUBLAS, gate="silu")
