"""merge_states against float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilestream import ops, testing
from tilestream.reference.merge_states import merge_states as reference

pytestmark = pytest.mark.simt
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def plain(v: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    weight = torch.softmax(lse, 1).nan_to_num(0.0).to(v.dtype)
    return (weight.unsqueeze(-1) * v.nan_to_num(0.0)).sum(1)


def check(v: torch.Tensor, lse: torch.Tensor) -> None:
    want, want_lse = reference(v, lse)
    num_tokens, _, num_heads, head_dim = v.shape
    out, out_memory = testing.guarded_contiguous((num_tokens, num_heads, head_dim), v.dtype)
    out_lse, lse_memory = testing.guarded_contiguous((num_tokens, num_heads), torch.float32)
    torch.ops.tilestream.merge_states(v, lse, out, out_lse)
    testing.assert_as_good_as_plain(out, want, plain(v, lse), "out")
    testing.assert_as_good_as_plain(out_lse, want_lse, torch.logsumexp(lse, 1), "lse")
    testing.assert_margins(out_memory)
    testing.assert_margins(lse_memory)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 64, 80, 96, 128, 256])
@pytest.mark.parametrize(("num_tokens", "num_states", "num_heads"), [(0, 2, 4), (1, 1, 1), (3, 2, 9), (5, 7, 3), (2, 64, 8)])
def test_against_float64(
    backend: testing.Backend, num_tokens: int, num_states: int, num_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    v = torch.randn(num_tokens, num_states, num_heads, head_dim).to(dtype)
    check(v, 5 * torch.randn(num_tokens, num_states, num_heads))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_simd_level(simd_level: str, dtype: torch.dtype) -> None:
    lse = 5 * torch.randn(4, 3, 5)
    lse[0, 1], lse[1] = -math.inf, -math.inf
    check(torch.randn(4, 3, 5, 72).to(dtype), lse)


def test_empty_states_weigh_nothing_whatever_they_hold(backend: testing.Backend) -> None:
    v, lse = torch.randn(3, 3, 2, 64), torch.randn(3, 3, 2)
    v[0, 1], lse[0, 1] = math.nan, -math.inf
    v[1], lse[1] = math.nan, -math.inf  # every state of token 1
    v[2, 0], lse[2, 0] = math.inf, -math.inf
    check(v, lse)
    out, out_lse = ops.merge_states(v, lse)
    assert torch.equal(out[1], torch.zeros(2, 64)) and bool((out_lse[1] == -math.inf).all())
    again, again_lse = ops.merge_states(torch.stack([out, out], 1), torch.stack([out_lse, out_lse], 1))
    assert torch.equal(again[1], torch.zeros(2, 64)) and bool((again_lse[1] == -math.inf).all())


def test_large_and_far_apart_lse(backend: testing.Backend) -> None:
    v = torch.randn(1, 3, 4, 64)
    lse = torch.tensor([[1e4, -1e4, 9999.0], [-1e4, -1e4, -1e4], [500.0, 500.0, 500.0], [0.0, 88.0, 120.0]]).T.unsqueeze(0)
    check(v, lse.contiguous())


@settings(max_examples=40)
@given(st.integers(1, 9), st.integers(0, 8), st.integers(0, 2**31 - 1))
def test_merging_in_two_steps_is_merging_at_once(num_states: int, cut: int, seed: int) -> None:
    torch.manual_seed(seed)
    cut = min(cut, num_states)
    v, lse = torch.randn(2, num_states, 3, 64), 3 * torch.randn(2, num_states, 3)
    lse[torch.rand(lse.shape) < 0.2] = -math.inf
    at_once, at_once_lse = ops.merge_states(v, lse)
    halves = [ops.merge_states(v[:, part].contiguous(), lse[:, part].contiguous())
              for part in (slice(0, cut), slice(cut, None)) if len(range(num_states)[part])]
    twice, twice_lse = ops.merge_states(torch.stack([h[0] for h in halves], 1), torch.stack([h[1] for h in halves], 1))
    testing.assert_within(twice, at_once, 4e-6)
    testing.assert_within(twice_lse, at_once_lse, 4e-6)


def test_threads_do_not_matter(backend: testing.Backend, set_num_threads) -> None:
    v, lse = torch.randn(65, 4, 9, 64).bfloat16(), torch.randn(65, 4, 9)
    want = ops.merge_states(v, lse)
    for num in (1, 2, 3, 7):
        set_num_threads(num)
        assert all(torch.equal(a, b) for a, b in zip(ops.merge_states(v, lse), want, strict=True))


def test_opcheck() -> None:
    v, lse = torch.randn(2, 3, 4, 64), torch.randn(2, 3, 4)
    torch.library.opcheck(torch.ops.tilestream.merge_states.default, (v, lse, torch.empty(2, 4, 64), torch.empty(2, 4)))


@pytest.mark.parametrize(
    ("v", "lse", "error", "message"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), ValueError, r"v has 3 dimensions \[2, 3, 4\]; it needs 4"),
        (torch.zeros(2, 3, 4, 8), torch.zeros(2, 4, 3), ValueError, r"lse has shape \[2, 4, 3\]; dimension 1 must be 3"),
        (torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 4).half(), TypeError, "lse has dtype Half; supported: Float"),
        (torch.zeros(2, 3, 4, 8).double(), torch.zeros(2, 3, 4), TypeError, "v has dtype Double; supported"),
        (torch.zeros(3, 2, 4, 8).transpose(0, 1), torch.zeros(2, 3, 4), ValueError, "v has strides .* must be contiguous"),
    ],
)
def test_bad_input(v: torch.Tensor, lse: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        torch.ops.tilestream.merge_states(v, lse, torch.zeros(2, 4, 8), torch.zeros(2, 4))
