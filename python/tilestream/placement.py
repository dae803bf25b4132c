"""Where a model runs, and what its tensors are like there."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from tilestream._native import _C
from tilestream.ops.linear_choice import LinearKernel


@dataclass(frozen=True, slots=True)
class Placement:
    """A device and the forms its kernels want.

    Args:
        device: of weights, activations and the KV cache.
        dtype: of activations.
        blocked_kv: pages are in the CPU kernels' own order (csrc/include/tilestream/types.h).
        asynchronous: kernels run behind the host. Then a step is launched while the one before runs, and decode steps are
            padded to few sizes, each of which is captured in a graph.
        linear_kernel: the one kernel for row-major weights, where a row's bits must not depend on the batch; None: the
            fastest for each number of rows.
    """

    device: torch.device
    dtype: torch.dtype
    blocked_kv: bool
    asynchronous: bool
    linear_kernel: LinearKernel | None = None

    @property
    def has_int4(self) -> bool:
        """Whether its tensor cores multiply INT4 natively: those of sm_80 to sm_89."""
        return self.device.type == "cuda" and torch.cuda.get_device_capability(self.device)[0] == 8

    @staticmethod
    def of(device: str, *, batch_invariant: bool = False) -> Placement:
        """The placement for "cpu", "cuda" or "cuda:<index>": float32 activations on the CPU, bfloat16 on a GPU.

        Args:
            device: its name.
            batch_invariant: a row's bits must not depend on the batch.
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
        kernel = LinearKernel.FLAT if batch_invariant else None
        return Placement(torch.device("cuda", index), torch.bfloat16, False, asynchronous=True, linear_kernel=kernel)


CPU = Placement(torch.device("cpu"), torch.float32, blocked_kv=True, asynchronous=False)
