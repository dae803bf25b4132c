"""The emulator against a GPU: what one recorded, and one that is here. fidelity.py says how."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from tests.simt import fidelity

NAMES = list(fidelity.cases())


@pytest.mark.parametrize("name", NAMES)
def test_emulator_gives_the_recorded_bits(name: str) -> None:
    if not fidelity.RECORD.exists():
        pytest.skip(fidelity.HOW_TO_RECORD)
    case = fidelity.cases()[name]
    with np.load(fidelity.RECORD) as recorded:
        assert fidelity.difference(case, fidelity.summary(case, fidelity.on_emulator(case, 2)), recorded[name]) == ""


@pytest.mark.parametrize("name", NAMES)
def test_gpu_gives_the_emulator_s_bits(name: str) -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0) or shutil.which("nvcc") is None:
        pytest.skip("needs nvcc and a GPU of compute capability 9.0")
    case = fidelity.cases()[name]
    got, want = (fidelity.summary(case, output) for output in (fidelity.on_gpu(case), fidelity.on_emulator(case, 2)))
    assert fidelity.difference(case, got, want) == ""


@pytest.mark.parametrize("name", NAMES)
def test_no_schedule_changes_a_bit(name: str) -> None:
    case = fidelity.cases()[name]
    outputs = [fidelity.on_emulator(case, seed) for seed in range(3)]
    assert np.array_equal(outputs[0], outputs[1]) and np.array_equal(outputs[0], outputs[2])


@pytest.mark.parametrize("name", ["prmt", "mma_f16_general"])
def test_a_wrong_bit_is_found(name: str) -> None:
    case = fidelity.cases()[name]
    output = fidelity.on_emulator(case, 0)
    wrong = output.copy()
    wrong[40] ^= 0x00800000
    assert fidelity.difference(case, fidelity.summary(case, output), fidelity.summary(case, output)) == ""
    assert fidelity.difference(case, fidelity.summary(case, wrong), fidelity.summary(case, output)) != ""
