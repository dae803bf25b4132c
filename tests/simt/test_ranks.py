"""Several ranks on the emulator: peer pointers, multimem, and a lost signal."""

from __future__ import annotations

import re

import pytest
import torch

from tests.simt.test_simt import kernels


def run(name: str, seed: int, num_ranks: int) -> tuple[str, torch.Tensor]:
    data = torch.full((num_ranks, 1024), float("nan"))
    data[:, 512:514] = 0  # signals
    return kernels().simt_run_ranks(name.encode(), seed, data.data_ptr(), num_ranks).decode(), data


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_ranks", [2, 4, 8])
@pytest.mark.parametrize("name", ["peers", "multimem"])
def test_sum_over_ranks(name: str, num_ranks: int, seed: int) -> None:
    report, data = run(name, seed, num_ranks)
    assert report == ""
    want = sum(1000.0 * rank + torch.arange(256) for rank in range(num_ranks))
    assert torch.equal(data[:, 256:512], want.expand(num_ranks, 256))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_lost_signal_is_a_deadlock_of_all_ranks(num_ranks: int, seed: int) -> None:
    report, _ = run("lost_signal", seed, num_ranks)
    for rank in range(num_ranks):
        assert re.search(
            rf"deadlock, .*, in the launch of ranks.cu.* by rank {rank}\n(.*\n)*?.*ld.acquire.sys at ranks.cu", report
        )
