"""Tensor copies of each rank against numpy: boxes inside, across and outside the tensor's edges, every swizzle, multicast."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.simt.test_simt import kernels

# element bytes, swizzle (bytes of a row; 16 is none), sizes, box, corner; innermost dimension first
BOXES = [
    (2, 16, (40,), (24,), (8,)),
    (2, 128, (96, 20), (64, 16), (32, 8)),
    (2, 64, (64, 9), (32, 16), (-8, -3)),
    (1, 32, (48, 7, 5), (32, 4, 3), (20, 5, -1)),
    (4, 128, (40, 6, 5), (32, 8, 2), (4, 0, 4)),
    (2, 128, (64, 4, 3, 5), (64, 2, 2, 3), (0, 3, 1, -2)),
    (1, 16, (32, 3, 2, 4, 3), (16, 2, 2, 2, 3), (24, 2, 0, 3, 0)),
    (4, 16, (8, 3, 3), (4, 2, 2), (100, 0, 0)),
]


def prepare(case: tuple, ranks: int) -> tuple[torch.Tensor, np.ndarray, np.ndarray, np.ndarray]:
    """data; of each element of the box: its place in the tensor (in elements) or -1, its byte in shared memory."""
    element_bytes, row_bytes, sizes, box, corner = case
    strides = [element_bytes]
    for size in sizes[:-1]:
        strides.append(-(-strides[-1] * size // 16) * 16 + 16)
    data = torch.zeros(16384 + 4 * 2048)
    words = data.numpy().view(np.int32)
    rng = np.random.default_rng(0)
    words[64:] = rng.integers(-(2**31), 2**31, len(words) - 64)
    words[:4] = [len(sizes), element_bytes, row_bytes.bit_length() - 5, ranks]
    for at, values in zip((4, 9, 14, 19), (sizes, strides, box, corner), strict=True):
        words[at : at + len(values)] = values
    index = np.indices(box[::-1])[::-1].reshape(len(box), -1) + np.array(corner)[:, None]
    inside = np.all((index >= 0) & (index < np.array(sizes)[:, None]), axis=0)
    place = np.where(inside, (index * (np.array(strides) // element_bytes)[:, None]).sum(0), -1)
    plain = np.arange(len(place)) * element_bytes
    chunk = plain // 16 % 8 ^ (plain // 128 % 8 & row_bytes // 16 - 1)
    return data, place, plain // 128 * 128 + chunk * 16 + plain % 16, words


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ranks", [0b0001, 0b1011])
@pytest.mark.parametrize("case", BOXES, ids=str)
def test_load(case: tuple, ranks: int, seed: int) -> None:
    data, place, byte, words = prepare(case, ranks)
    dtype = f"u{case[0]}"
    tensor = words[64:16384].view(dtype).copy()
    assert kernels().simt_run(f"tensor_load_{len(case[2])}d".encode(), seed, data.data_ptr()).decode() == ""
    for rank in range(4):
        if ranks >> rank & 1:
            got = words[16384 + 2048 * rank :].view(dtype)[byte // case[0]]
            assert np.array_equal(got, np.where(place < 0, 0, tensor[place]))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", BOXES, ids=str)
def test_store(case: tuple, seed: int) -> None:
    data, place, byte, words = prepare(case, 1)
    dtype = f"u{case[0]}"
    want = words[64:16384].view(dtype).copy()
    source = words[16384:].view(dtype)[byte // case[0]]
    want[place[place >= 0]] = source[place >= 0]
    assert kernels().simt_run(f"tensor_store_{len(case[2])}d".encode(), seed, data.data_ptr()).decode() == ""
    assert np.array_equal(words[64:16384].view(dtype), want)


@pytest.mark.parametrize(
    ("change", "report"),
    [
        ({1: 3}, "element_bytes is 3"),
        ({10: 40}, "stride_bytes is 40; allowed: multiples of 16"),
        ({15: 300}, "box is 300; allowed: 1 to 256"),
        ({14: 20}, "innermost dimension is 40; allowed: multiples of 16"),
        ({14: 32}, "innermost dimension is 64; allowed: the bytes of the swizzle"),
        ({5: 0}, "size is 0"),
    ],
)
def test_maps_that_the_hardware_refuses(change: dict[int, int], report: str) -> None:
    data, *_, words = prepare(BOXES[1], 1)
    for at, value in change.items():
        words[at] = value
    assert report in kernels().simt_run(b"tensor_load_2d", 0, data.data_ptr()).decode()
