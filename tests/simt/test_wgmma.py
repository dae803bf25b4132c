"""Each form of wgmma against a @ b, with tiles laid out in shared memory by a formula of its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.simt.test_simt import kernels

DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn, "s8": torch.int8}
# <element>_<n>_<a><b>: k K-major in shared memory, m MN-major, r in registers
FORMS = ["f16_64_kk", "f16_128_km", "bf16_96_mk", "bf16_256_mm", "e4m3_32_kk", "s8_16_kk", "f16_8_rk", "bf16_192_rm", "bf16_176_rk",
         "e4m3_112_rk", "e4m3_160_rk", "s8_80_rk"]  # fmt: skip


def as_bytes(matrix: torch.Tensor, dtype: torch.dtype) -> np.ndarray:
    """[rows, columns, bytes of an element]"""
    return matrix.to(dtype).contiguous().view(torch.uint8).reshape(*matrix.shape, -1).numpy()


def lay_out(image: np.ndarray, start: int, matrix: np.ndarray, row_bytes: int, major_mn: bool) -> tuple[int, int, int]:
    """Writes [mn, k] to shared memory as TMA with this swizzle would; (stride, leading, start) of its descriptor.

    A box is 8 or more rows of `row_bytes`. K-major: boxes of all mn, side by side along k, of which the product reads
    32 bytes. MN-major: boxes of all k, side by side along mn.
    """
    tile = matrix.transpose(1, 0, 2) if major_mn else matrix
    rows = np.ascontiguousarray(tile).reshape(tile.shape[0], -1)
    inside = 32 if not major_mn and row_bytes > 32 else 0  # begins in the second step along k
    for row, line in enumerate(rows):
        for column, byte in enumerate(line):
            box, within = divmod(column + inside, row_bytes)
            at = start + box * len(rows) * row_bytes + row * row_bytes + within
            chunk = at // 16 % 8 ^ (at // 128 % 8 & row_bytes // 16 - 1)
            image[at // 128 * 128 + chunk * 16 + at % 16] = byte
    eight_rows, box_bytes = 8 * row_bytes, len(rows) * row_bytes
    return (box_bytes, eight_rows, start) if major_mn and row_bytes == 16 else (eight_rows, box_bytes, start + inside)


def fragments(a: np.ndarray) -> np.ndarray:
    """Registers of the 128 threads: those of four mma.sync, of 16 rows each."""
    rows = np.ascontiguousarray(a).reshape(64, -1).view(np.uint32).reshape(4, 2, 8, 2, 4)  # warp, i, g, half of k, t
    return np.ascontiguousarray(rows.transpose(0, 2, 4, 3, 1)).reshape(512)


def fits(form: str, row_bytes: int) -> bool:
    _, n, layout = form.split("_")
    return layout[1] == "k" or int(n) * 2 % row_bytes == 0


def prepare(form: str, row_bytes: int, accumulate: bool, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """What wgmma.cu reads: a [64, k] and b [n, k] laid out as the form wants them."""
    element, _, layout = form.split("_")
    dtype = DTYPES[element]
    image = np.full(4 * 12288, 0xFF, np.uint8)
    layout_a = (0, 0, 0) if layout[0] == "r" else lay_out(image, 1024, as_bytes(a, dtype), row_bytes, layout[0] == "m")
    layout_b = lay_out(image, 16384, as_bytes(b, dtype), row_bytes, layout[1] == "m")
    data = torch.zeros(32768)
    words = data.numpy().view(np.uint32)
    words[:8] = [row_bytes.bit_length() - 5, *layout_a, *layout_b, accumulate]
    words[64 : 64 + 12288] = image.view(np.uint32)
    words[12800:13312] = fragments(as_bytes(a, dtype))
    return data


def integers(form: str) -> tuple[torch.Tensor, torch.Tensor]:
    """a and b whose products sum exactly in any order."""
    element, n, _ = form.split("_")
    rng, limit = np.random.default_rng(0), 100 if element == "s8" else 8
    num_k = 16 if element in ("f16", "bf16") else 32
    a, b = (torch.from_numpy(rng.integers(-limit, limit + 1, (rows, num_k))).float() for rows in (64, int(n)))
    return a, b


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("form", "row_bytes"), [(f, r) for f in FORMS for r in (16, 32, 64, 128) if fits(f, r)])
def test_wgmma(form: str, row_bytes: int, seed: int) -> None:
    n, accumulate = int(form.split("_")[1]), seed != 1
    a, b = integers(form)
    data = prepare(form, row_bytes, accumulate, a, b)
    assert kernels().simt_run(f"wgmma_{form}".encode(), seed, data.data_ptr()).decode() == ""
    columns, rows = torch.arange(n), torch.arange(64)[:, None]
    register = columns // 8 * 4 + rows // 8 % 2 * 2 + columns % 2
    want = a @ b.T + (register % 7 if accumulate else 0)
    assert torch.equal(data[16384 : 16384 + 64 * n].reshape(64, n), want)


@pytest.mark.parametrize("seed", range(6))
def test_pipeline(seed: int) -> None:
    """TMA, mbarriers, setmaxnreg, wgmma, stmatrix and a tensor store in one kernel."""
    rng = np.random.default_rng(seed)
    a, b = (torch.from_numpy(rng.integers(-2, 3, (rows, 256))).to(torch.bfloat16) for rows in (128, 64))
    data = torch.zeros(28672)
    data[:24576] = torch.cat([a, b]).view(torch.float32).flatten()
    assert kernels().simt_run(b"gemm", seed, data.data_ptr()).decode() == ""
    assert torch.equal(data[24576:].view(torch.bfloat16).reshape(128, 64), (a.float() @ b.float().T).to(torch.bfloat16))
