"""The backends of this build, as tests and benches run over them."""

from __future__ import annotations

import dataclasses

import torch

from tilestream._native import _C


@dataclasses.dataclass(frozen=True)
class Backend:
    """A backend, the device of its tensors, and for the emulator the seed of its schedule and what GPU it says it is."""

    name: str
    device: torch.device
    seed: int | None = None
    arch: int = 80  # compute capability: 90 is Hopper's

    def __str__(self) -> str:
        if self.seed is None:
            return self.name
        return f"{self.name}-{self.seed}" if self.arch == 80 else f"{self.name}{self.arch}-{self.seed}"


def backends() -> list[Backend]:
    """What this build and this machine can run."""
    found = [Backend("cpu", torch.device("cpu"))]
    if torch.cuda.is_available() and _C.cuda_archs:
        major, minor = torch.cuda.get_device_capability(0)
        found.append(Backend("cuda", torch.device("cuda", 0), arch=10 * major + minor))
    return found


def simd_levels() -> list[str]:
    """SIMD levels of the CPU backend that this machine runs, weakest first."""
    return _C.simd_levels()
