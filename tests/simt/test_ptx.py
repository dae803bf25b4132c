"""Each matrix wrapper of the PTX layer against a formula of its own."""

from __future__ import annotations

import pytest
import torch

from tests.simt.test_simt import kernels


def run(name: str, data: torch.Tensor, seed: int) -> torch.Tensor:
    report = kernels().simt_run(name.encode(), seed, data.data_ptr()).decode()
    assert report == ""
    return data[2048:]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("name", "num", "trans"), [("ldmatrix_x4", 4, False), ("ldmatrix_x2", 2, False), ("ldmatrix_x4_trans", 4, True)]
)
def test_ldmatrix(name: str, num: int, trans: bool, seed: int) -> None:
    data = torch.zeros(4096)
    data[:256] = torch.arange(256)
    matrices = data[:256].reshape(4, 8, 8)[:num].clone()
    got = run(name, data, seed)[: 64 * num].reshape(32, num, 2)
    # lane 4 r + c holds the pair c of row r of each matrix
    want = (matrices.mT if trans else matrices).reshape(num, 32, 2).transpose(0, 1)
    assert torch.equal(got, want)


def test_stmatrix_is_the_reverse_of_ldmatrix() -> None:
    data = torch.zeros(4096)
    matrices = torch.randperm(256).float().reshape(4, 8, 8)
    data[:256] = matrices.reshape(4, 32, 2).transpose(0, 1).flatten()
    assert torch.equal(run("stmatrix_x4", data, 2)[:256].reshape(4, 8, 8), matrices)


# name -> (depth, values of a, values of b)
FLOATS = torch.tensor([-2.0, -1.5, -0.5, 0.0, 0.25, 1.0, 3.0])
MMA = {
    "mma_f16": (16, FLOATS, FLOATS),
    "mma_bf16": (16, FLOATS, FLOATS),
    "mma_e4m3": (32, FLOATS, FLOATS),
    "mma_s8": (32, torch.arange(-128.0, 128), torch.arange(-128.0, 128)),
    "mma_u8s8": (32, torch.arange(0.0, 256), torch.arange(-128.0, 128)),
    "mma_s4": (64, torch.arange(-8.0, 8), torch.arange(-8.0, 8)),
    "mma_u4s4": (64, torch.arange(0.0, 16), torch.arange(-8.0, 8)),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", MMA)
def test_mma(name: str, seed: int) -> None:
    depth, values_a, values_b = MMA[name]
    a = values_a[torch.randint(len(values_a), (16, depth))]
    b = values_b[torch.randint(len(values_b), (8, depth))]
    data = torch.zeros(4096)
    data[: 16 * depth], data[1024 : 1024 + 8 * depth] = a.flatten(), b.flatten()
    assert torch.equal(run(name, data, seed)[:128].reshape(16, 8), a @ b.T)


@pytest.mark.parametrize(
    ("name", "dtype", "largest"),
    [("round_f16", torch.float16, 7e4), ("round_bf16", torch.bfloat16, 3.4e38), ("round_e4m3", torch.float8_e4m3fn, 440.0)],
)
def test_rounding(name: str, dtype: torch.dtype, largest: float) -> None:
    """Every size from subnormal to overflow, ties included, and NaN."""
    values = torch.randn(1024) * torch.exp2(torch.randint(-30, 20, (1024,)).float())
    values[:512] = (values[:512].to(dtype).float() * (1 + torch.finfo(dtype).eps / 2)).clamp(-largest, largest)
    values = values.clamp(-largest, largest)
    values[0] = float("nan")
    data = torch.zeros(4096)
    data[:1024] = values
    assert torch.equal(run(name, data, 2)[1:1024], values.to(dtype).float()[1:])
    assert run(name, data, 2)[0].isnan()


def test_e4m3_by_integers_gives_the_bits_of_the_instructions() -> None:
    """Every code; floats around every code and every tie between two of them, beyond 448, infinite, NaN and negative."""
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (codes[1:] + codes[:-1]) / 2
    values = torch.cat([codes, ties, torch.tensor([460.0, 464.0, 465.0, 1e9, float("inf"), 1e-40, 2.0**-10, 2.0**-11])])
    infinity = torch.tensor(float("inf"))
    values = torch.cat([values, torch.nextafter(values, infinity), torch.nextafter(values, -infinity)])
    values = torch.cat([values, -values, torch.tensor([float("nan")])])
    data = torch.zeros(4096)
    data[: len(values)] = values
    assert len(values) < 2048
    assert torch.equal(run("e4m3_by_integers", data, 0), torch.ones(2048))
