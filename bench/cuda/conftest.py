"""The benches here run on a GPU, and say why not where they cannot."""

from __future__ import annotations

import gc

import pytest
import torch

from bench.cuda import timing
from bench.roofs import Machine
from tilestream.placement import Placement


@pytest.fixture(autouse=True, scope="session")
def _gpu() -> None:
    try:
        Placement.of("cuda")
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def machine(_gpu: None) -> Machine:
    return timing.this_gpu()


@pytest.fixture(autouse=True)
def _own_memory():
    """No case leaves graphs or cached blocks to the next."""
    torch.manual_seed(0)
    yield
    gc.collect()
    torch.cuda.empty_cache()
