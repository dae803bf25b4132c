"""Rounding of weights: GPTQ against rounding to nearest, and what must come out exactly."""

from __future__ import annotations

import pytest
import torch
from tilestream.quantize.gptq import gptq, nearest, squared_output


def _hessian(k: int, num_rows: int = 400) -> torch.Tensor:
    rows = torch.randn(num_rows, k) @ torch.randn(k, k) * torch.rand(k).exp()
    return rows.t() @ rows


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("k", [64, 192])
def test_gptq_errs_less_than_nearest(group: int, k: int) -> None:
    torch.manual_seed(k + group)
    weight, hessian = torch.randn(48, k), _hessian(k)
    both = gptq(weight, hessian, group), nearest(weight, group)
    errors = [squared_output(weight - codes.dequantise(), hessian) for codes in both]
    assert errors[0] < 0.6 * errors[1]


@pytest.mark.parametrize("group", [32, 128])
def test_an_identity_hessian_leaves_nothing_to_make_up_for(group: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 192)
    codes = gptq(weight, torch.eye(192), group)
    scale, zero = (t.float().repeat_interleave(group, 1)[:, :192] for t in (codes.scale, codes.zero))
    assert torch.equal(codes.q, ((weight - zero) / scale).round().clamp(0, 15).to(torch.uint8))
    assert (weight - codes.dequantise()).square().sum() <= (weight - nearest(weight, group).dequantise()).square().sum()


def test_weights_that_are_codes_already_stay_what_they_are() -> None:
    torch.manual_seed(1)
    q = torch.randint(0, 16, (8, 96))
    q.view(8, 3, 32)[:, :, :2] = torch.tensor([0, 15])  # as a file's quantiser leaves it: both ends are met
    scale, zero = (torch.rand(8, 3) + 0.5).half(), torch.randn(8, 3).half()
    weight = q * scale.float().repeat_interleave(32, 1) + zero.float().repeat_interleave(32, 1)
    for codes in (nearest(weight, 32), gptq(weight, _hessian(96), 32)):
        assert torch.equal(codes.q, q.to(torch.uint8))
        assert torch.equal(codes.scale, scale)
        assert torch.equal(codes.zero, zero)


def test_codes_of_q4_0_stay_what_they_are() -> None:
    """Their steps meet 0, and the value of largest magnitude is -8 of them; few groups have a 15."""
    torch.manual_seed(2)
    q = torch.randint(3, 14, (8, 96))
    q.view(8, 3, 32)[:, :, 7] = 0
    scale = (torch.rand(8, 3) + 0.5).mul(torch.tensor([1, -1, 1])).half()
    weight = (q - 8) * scale.float().repeat_interleave(32, 1)
    codes = gptq(weight, _hessian(96), 32)
    assert torch.equal(codes.dequantise(), weight)
    assert torch.equal(codes.scale, scale)


def test_constant_groups_and_channels_that_are_never_read() -> None:
    weight = torch.full((4, 64), 0.25)
    hessian = torch.zeros(64, 64)
    hessian[0, 0] = 1.0
    for codes in (nearest(weight, 32), gptq(weight, hessian, 32), gptq(weight, torch.zeros(64, 64), 32)):
        assert torch.equal(codes.dequantise(), weight)
