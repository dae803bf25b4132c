"""Which kernel multiplies by a row-major weight: by thresholds on the number of rows, for each (n, k).

The choice of FlashDecoding++ (section 5) between a GEMV on CUDA cores, a flat GEMM on tensor cores and cuBLAS.
`linear_thresholds.json` holds what was measured, by the device's name: `python -m bench.tune_linear --write`.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import torch

TABLE = Path(__file__).parent / "linear_thresholds.json"


class LinearKernel(StrEnum):
    """How to multiply by a row-major weight."""

    GEMV = "gemv"  # csrc/cuda/common/linear_gemv.cuh
    FLAT = "flat"  # csrc/cuda/common/linear_rows.cuh
    CUBLAS = "cublas"  # torch.mm


@dataclass(frozen=True, slots=True)
class Thresholds:
    """GEMV for up to `gemv_rows` rows, the flat GEMM for up to `flat_rows`, cuBLAS above."""

    gemv_rows: int
    flat_rows: int

    def kernel(self, num_rows: int) -> LinearKernel:
        if num_rows <= self.gemv_rows:
            return LinearKernel.GEMV
        return LinearKernel.FLAT if num_rows <= self.flat_rows else LinearKernel.CUBLAS


# Where nothing was measured, an estimate from bytes and operations, the same for every (n, k). The GEMV issues about
# 16 + 25 m instructions for each KB of weights, of which an H200's SM reads one in 50 cycles and issues 200: up to 4 rows it
# is bound by the weights with room to spare. The flat GEMM reads the weights once for 64 rows, at 64 operations a byte, far
# below the 206 where an H200's tensor cores begin to bind; above, it reads them once more, and cuBLAS does not.
ESTIMATE = Thresholds(gemv_rows=4, flat_rows=64)


def measured(table: Path = TABLE) -> dict[str, dict[str, Thresholds]]:
    """The table: device name -> "<n>x<k>" -> thresholds."""
    devices = json.loads(table.read_text())
    return {device: {shape: Thresholds(**row) for shape, row in rows.items()} for device, rows in devices.items()}


@functools.cache
def _thresholds(device: torch.device, n: int, k: int) -> Thresholds:
    if device.type != "cuda":
        return ESTIMATE
    return measured().get(torch.cuda.get_device_name(device), {}).get(f"{n}x{k}", ESTIMATE)


def kernel_for(device: torch.device, num_rows: int, n: int, k: int) -> LinearKernel:
    """The kernel for [num_rows, k] times a row-major [n, k] on `device`."""
    return _thresholds(device, n, k).kernel(num_rows)
