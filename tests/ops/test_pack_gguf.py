"""pack_gguf against the gguf package's own dequantisation, for every block type that is read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, quants
from gguf import GGMLQuantizationType as Type

from tilestream import ops, testing
from tilestream.ops import PackedFormat

NATIVE = {
    Type.F32: PackedFormat.FLOAT32,
    Type.F16: PackedFormat.BFLOAT16,
    Type.BF16: PackedFormat.BFLOAT16,
    Type.Q4_0: PackedFormat.U4G32S,
    Type.Q4_1: PackedFormat.U4G32,
    Type.Q8_0: PackedFormat.U8G32S,
    Type.Q4_K: PackedFormat.U4G32,
    Type.Q5_K: PackedFormat.U8G32,
    Type.Q6_K: PackedFormat.U8G32S,
}
each_type = pytest.mark.parametrize("gguf_type", list(NATIVE), ids=lambda t: t.name)
BLOCKS = {  # weights and bytes of a block
    Type.Q4_0: (32, 18), Type.Q4_1: (32, 20), Type.Q8_0: (32, 34), Type.Q4_K: (256, 144), Type.Q5_K: (256, 176),
    Type.Q6_K: (256, 210),
}
# Where the float16 scales of a block stand.
SCALE_BYTES = {Type.Q4_0: [0], Type.Q4_1: [0, 2], Type.Q8_0: [0], Type.Q4_K: [0, 2], Type.Q5_K: [0, 2], Type.Q6_K: [208]}


def random_rows(n: int, k: int, gguf_type: Type) -> torch.Tensor:
    """Rows of random blocks with sane scales: every bit pattern of the quantised part is a valid one."""
    values = np.random.default_rng(n * k).standard_normal((n, k), dtype=np.float32)
    if gguf_type not in SCALE_BYTES:
        return torch.from_numpy(quants.quantize(values, gguf_type).view(np.uint8).reshape(n, -1))
    block, num_bytes = BLOCKS[gguf_type]
    rows = torch.randint(256, (n, k // block, num_bytes), dtype=torch.uint8)
    for begin in SCALE_BYTES[gguf_type]:
        scales = (torch.randn(n, k // block) * 0.01).half()
        rows[:, :, begin : begin + 2] = scales.unsqueeze(-1).view(torch.uint8)
    return rows.flatten(1)


def dequantised(rows: torch.Tensor, gguf_type: Type) -> torch.Tensor:
    if gguf_type in (Type.F32, Type.F16):
        return rows.view(torch.float32 if gguf_type == Type.F32 else torch.float16).double()
    return torch.from_numpy(quants.dequantize(rows.numpy(), gguf_type)).double()


def unpack(packed: ops.PackedWeight) -> torch.Tensor:
    return ops.embedding(torch.arange(packed.n), packed).double()


def allowed_loss(rows: torch.Tensor, gguf_type: Type, want: torch.Tensor) -> torch.Tensor:
    """What the packed form may lose per value: float32 arithmetic, and more for the K types (by their groups).

    Q4_K, Q5_K: scale and minimum become float16 (2^-11 relative; 2^-25 below its normal numbers).
    Q6_K: two scales become one of 8 bits, which loses half a step of 32 / 127 of the larger scale.
    """
    arithmetic = (want.abs() + 1e-30) * 4 * testing.unit_roundoff(torch.float32)
    if gguf_type not in (Type.Q4_K, Type.Q5_K, Type.Q6_K):
        return arithmetic
    blocks = rows.numpy().reshape(-1, BLOCKS[gguf_type][1])
    if gguf_type == Type.Q6_K:
        scales = np.abs(blocks[:, 192:208].view(np.int8).astype(np.float64)) * np.abs(blocks[:, 208:210].view(np.float16))
        largest = scales.reshape(-1, 8, 2).max(2)
        loss = largest * (32 / 127 / 2 + 32 * 2.0**-11) + 128 * 2.0**-25
    else:
        scales, minima = (x.astype(np.float64) for x in quants.Q4_K.get_scale_min(blocks[:, 4:16]))
        scales, minima = scales * np.abs(blocks[:, 0:2].view(np.float16)), minima * np.abs(blocks[:, 2:4].view(np.float16))
        levels = 15 if gguf_type == Type.Q4_K else 31
        loss = 1.001 * 2.0**-11 * (levels * scales + minima) + (levels + 1) * 2.0**-25
    return torch.from_numpy(loss).reshape(len(rows), -1).repeat_interleave(32, 1) + arithmetic


@each_type
@pytest.mark.parametrize("n", [1, 32, 45])
def test_native_format(backend: testing.Backend, n: int, gguf_type: Type) -> None:
    rows = random_rows(n, 512, gguf_type)
    want = dequantised(rows, gguf_type)
    got = unpack(ops.pack_gguf(rows, int(gguf_type), 512, format=NATIVE[gguf_type]))
    if gguf_type == Type.F16:
        assert torch.equal(got, want.bfloat16().double())
        return
    err = (got - want).abs()
    bound = allowed_loss(rows, gguf_type, want)
    assert bool((err <= bound).all()), f"error {float((err - bound).max()):.3e} above the bound, largest value {want.abs().max()}"


@each_type
def test_dequantising_formats(backend: testing.Backend, gguf_type: Type) -> None:
    rows = random_rows(40, 512, gguf_type)
    want = dequantised(rows, gguf_type)
    exact = unpack(ops.pack_gguf(rows, int(gguf_type), 512, format=PackedFormat.FLOAT32))
    testing.assert_within(exact, want, 4 * testing.unit_roundoff(torch.float32) * float(want.abs().max()))
    rounded = unpack(ops.pack_gguf(rows, int(gguf_type), 512, format=PackedFormat.BFLOAT16))
    testing.assert_within(rounded, want, 1.01 * testing.unit_roundoff(torch.bfloat16) * float(want.abs().max()))


@each_type
def test_every_simd_level(simd_level: str, gguf_type: Type) -> None:
    test_native_format(testing.backends()[0], 33, gguf_type)


@each_type
@pytest.mark.parametrize(("begin", "k"), [(32, 256), (224, 32), (96, 416)])
def test_features_within_blocks(backend: testing.Backend, gguf_type: Type, begin: int, k: int) -> None:
    """As a rank has them."""
    rows = random_rows(40, 512, gguf_type)
    block, block_bytes = GGML_QUANT_SIZES[gguf_type]
    first, last = begin // block, -(-(begin + k) // block)
    some = rows[:, first * block_bytes : last * block_bytes].contiguous()
    for format in (NATIVE[gguf_type], PackedFormat.FLOAT32, PackedFormat.BFLOAT16):
        got = unpack(ops.pack_gguf(some, int(gguf_type), k, format=format, skip=begin % block))
        assert torch.equal(got, unpack(ops.pack_gguf(rows, int(gguf_type), 512, format=format))[:, begin : begin + k])


def test_panels_of_one_weight(backend: testing.Backend) -> None:
    """q, k and v packed into one weight are what each is alone."""
    parts = [random_rows(n, 64, Type.Q4_0) for n in (64, 32, 32)]
    packed = ops.PackedWeight.empty(128, 64, PackedFormat.U4G32S)
    begin = 0
    for rows in parts:
        torch.ops.tilestream.pack_gguf(rows, 2, packed.data, n=len(rows), k=64, panel_begin=begin // 32, format=2)
        begin += len(rows)
    assert torch.equal(unpack(packed), torch.cat([dequantised(rows, Type.Q4_0) for rows in parts]).float().double())


def test_opcheck() -> None:
    packed = ops.PackedWeight.empty(32, 64, PackedFormat.U4G32S)
    torch.library.opcheck(torch.ops.tilestream.pack_gguf.default, (random_rows(32, 64, Type.Q4_0), 2, packed.data),
                          {"n": 32, "k": 64, "panel_begin": 0, "format": 2})


@pytest.mark.parametrize(
    ("gguf_type", "k", "num_bytes", "format", "message"),
    [
        (7, 64, 44, PackedFormat.FLOAT32, "gguf_type is 7; supported: F32"),
        (2, 48, 36, PackedFormat.FLOAT32, "k is 48; this GGUF type needs a multiple of 32"),
        (2, 64, 35, PackedFormat.U4G32S, r"rows has shape \[32, 35\]; dimension 1 must be 36"),
        (2, 64, 36, PackedFormat.U8G32S, "format is 4; this GGUF type packs to 2, 0, 1, 9 or 10"),
    ],
)
def test_bad_input(gguf_type: int, k: int, num_bytes: int, format: PackedFormat, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.pack_gguf(torch.zeros(32, num_bytes, dtype=torch.uint8), gguf_type, k, format=format)


@pytest.mark.parametrize("skip", [-32, 16, 256])
def test_bad_skip(skip: int) -> None:
    with pytest.raises(ValueError, match=f"skip is {skip}; this GGUF type needs a multiple of 32 from 0 to 224"):
        ops.pack_gguf(random_rows(32, 256, Type.Q4_K), int(Type.Q4_K), 64, format=PackedFormat.U4G32, skip=skip)


def test_panels_that_do_not_fit() -> None:
    packed = ops.PackedWeight.empty(32, 64, PackedFormat.U4G32S)
    with pytest.raises(ValueError, match=r"packed has \d+ bytes; panels 1 to 1 of \d+ bytes do not fit"):
        torch.ops.tilestream.pack_gguf(random_rows(32, 64, Type.Q4_0), 2, packed.data, n=32, k=64, panel_begin=1, format=2)
