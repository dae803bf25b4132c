"""Where a model runs, and what its tensors are like there."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from tilestream._native import _C


@dataclass(frozen=True, slots=True)
class Placement:
    """A device and the forms its kernels want.

    Args:
        device: of weights, activations and the KV cache.
        dtype: of activations.
        blocked_kv: pages are in the CPU kernels' own order (csrc/include/tilestream/types.h).
    """

    device: torch.device
    dtype: torch.dtype
    blocked_kv: bool

    @staticmethod
    def of(device: str) -> Placement:
        """The placement for "cpu", "cuda" or "cuda:<index>": float32 activations on the CPU, bfloat16 on a GPU.

        Raises:
            ValueError: no such device here, or no kernels for it in this build; says which and what is there.
        """
        if device == "cpu":
            return CPU
        match = re.fullmatch(r"cuda(?::(\d+))?", device)
        if match is None:
            raise ValueError(f"device is {device!r}; allowed: cpu, cuda, cuda:<index>")
        if not _C.cuda_archs:
            raise ValueError(
                f"device is {device!r}, but this build has no CUDA kernels: nvcc was not found when it was made"
            )
        index, num_devices = int(match[1] or 0), torch.cuda.device_count()
        if index >= num_devices:
            raise ValueError(
                f"device is {device!r}, but torch {torch.__version__} sees {num_devices} GPUs here; allowed: cpu"
                + "".join(f", cuda:{i}" for i in range(num_devices))
            )
        return Placement(torch.device("cuda", index), torch.bfloat16, blocked_kv=False)


CPU = Placement(torch.device("cpu"), torch.float32, blocked_kv=True)
