"""The choice of INT4 blocks reaches its share, front to back, least harm first."""

from __future__ import annotations

import pytest
import torch
from tilestream.quantize.rounding import round_kv, round_rows
from tilestream.quantize.select import Input, block_harm, choose_k4, int4_share
from tilestream.reference.append_kv import quantise_rows
from tilestream.reference.linear import dequantise_rows, quantise


def _inputs(num_layers: int = 6) -> dict:
    torch.manual_seed(3)
    shapes = {"qkv": (576, 960), "o": (576, 576), "gate_up": (576, 3072), "down": (1536, 576)}
    return {
        (i, name): Input(k, n, torch.rand(k // 128).sort().values)
        for i in range(num_layers) for name, (k, n) in shapes.items()
    }  # fmt: skip


@pytest.mark.parametrize("share", [0.0, 0.3, 0.84])
def test_the_share_is_reached_and_not_by_more_than_a_block(share: float) -> None:
    inputs = _inputs()
    k4 = choose_k4(inputs, share)
    total = sum(i.k * i.n for i in inputs.values())
    assert share <= int4_share(inputs, k4) <= share + 128 * 3072 / total
    assert all(k % 128 == 0 and k <= inputs[key].k for key, k in k4.items())


def test_a_half_block_at_the_end_stays_int8() -> None:
    inputs = _inputs(1)
    assert choose_k4(inputs, 1.0) == {(0, "qkv"): 512, (0, "o"): 512, (0, "gate_up"): 512, (0, "down"): 1536}


def test_the_harmless_go_first() -> None:
    inputs = {(0, "o"): Input(256, 64, torch.tensor([0.5, 0.6])), (1, "o"): Input(256, 64, torch.tensor([0.1, 0.7]))}
    assert choose_k4(inputs, 0.25) == {(0, "o"): 0, (1, "o"): 128}
    assert choose_k4(inputs, 0.6) == {(0, "o"): 256, (1, "o"): 128}


def test_outliers_are_harm() -> None:
    torch.manual_seed(4)
    rows = torch.randn(50, 256)
    rows[:, 130] *= 40
    harm = block_harm(rows, torch.ones(50, 256))
    assert harm[1] > 10 * harm[0] > 0


def test_errors_that_the_loss_does_not_see_are_no_harm() -> None:
    torch.manual_seed(4)
    rows, gradient = torch.randn(50, 256), torch.ones(50, 256)
    gradient[:25, :128] = 2
    gradient[:, 128:] = 0
    harm = block_harm(rows, gradient)
    assert harm[1] == 0
    parts = block_harm(rows[:25], torch.ones(25, 256)), block_harm(rows[25:], torch.ones(25, 256))
    assert torch.allclose(harm[0], 4 * parts[0][0] + parts[1][0])


def test_rounding_is_the_kernels(k4: int = 128) -> None:
    torch.manual_seed(5)
    rows, heads = torch.randn(20, 192), torch.randn(2, 3, 5, 64)
    rows[3] = 0.0
    assert torch.allclose(round_rows(rows, k4).double(), dequantise_rows(*quantise(rows, k4)), atol=1e-6)
    assert torch.allclose(round_kv(heads, 4).double(), quantise_rows(heads, 4).dequantise(), atol=1e-5)
