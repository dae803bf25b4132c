"""The basis of keys leaves attention as it is, and 4 bits hold keys better in it."""

from __future__ import annotations

import pytest
import torch
from tilestream.quantize.keys import find_key_basis
from tilestream.quantize.rounding import round_kv


@pytest.mark.parametrize("shared", [False, True])
def test_attention_stays_and_errs_less(shared: bool) -> None:
    torch.manual_seed(6)
    q, k = torch.randn(2, 4, 30, 64), torch.randn(2, 2, 30, 64)
    k[..., 5] *= 8
    k[..., 40] += 12
    k[..., 41] -= 15  # pairs that hardly change from key to key, of either sign
    attention = torch.full((2, 4, 30, 30), 1 / 30)
    basis = find_key_basis(q, k, attention, 64, shared=shared)

    def move(x: torch.Tensor, queries: bool) -> torch.Tensor:  # what turns a projection's rows turns its outputs
        rows = x.permute(1, 3, 0, 2).flatten(2).flatten(0, 1)
        return basis.apply(rows, 64, queries=queries).view(x.size(1), 64, 2, 30).permute(2, 0, 3, 1)

    def logits(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return q @ k.repeat_interleave(2, 1).transpose(2, 3)

    turned_q, turned_k = move(q, True), move(k, False)
    assert torch.allclose(logits(turned_q, turned_k), logits(q, k), atol=1e-3)
    error = (logits(turned_q, round_kv(turned_k, 4)) - logits(q, k)).square().mean()
    assert error < (0.8 if shared else 0.4) * (logits(q, round_kv(k, 4)) - logits(q, k)).square().mean()


@pytest.mark.parametrize("shared", [False, True])
def test_heads_that_were_pruned(shared: bool) -> None:
    torch.manual_seed(7)
    q, k = torch.randn(2, 4, 30, 64), torch.randn(2, 2, 30, 64)
    k[:, 0] = 0
    q[:, 2:] = 0
    basis = find_key_basis(q, k, torch.full((2, 4, 30, 30), 1 / 30), 64, shared=shared)
    assert basis.scale.isfinite().all() and basis.angle.isfinite().all()
