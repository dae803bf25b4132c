"""What this machine allows, measured by roofs.cpp beside each timing: a limit is never a data sheet's."""

from __future__ import annotations

import ctypes
import functools
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tilestream._native import _C

_SOURCE = Path(__file__).with_name("roofs.cpp")
_LIBRARY = Path(__file__).parents[1] / "build" / "bench" / "roofs.so"
_MAX_PROBE_BYTES = 256 << 20  # beyond every cache

MEMORY = ("read", "copy")
ARITHMETIC_BITS = {"int8": 8, "bf16": 16, "fp32": 32}


@functools.cache
def _library() -> ctypes.CDLL:
    if not _LIBRARY.exists() or _LIBRARY.stat().st_mtime < _SOURCE.stat().st_mtime:
        _LIBRARY.parent.mkdir(parents=True, exist_ok=True)
        flags = ["-O3", "-march=native", "-std=c++20", "-shared", "-fPIC", "-pthread"]
        subprocess.run(["c++", *flags, "-o", _LIBRARY, _SOURCE], check=True)
    library = ctypes.CDLL(str(_LIBRARY))
    for function, argument in (
        (library.read_rate, ctypes.c_size_t), (library.copy_rate, ctypes.c_size_t), (library.arithmetic_rate, ctypes.c_int)
    ):  # fmt: skip
        function.argtypes, function.restype = [argument, ctypes.c_int], ctypes.c_double
    return library


def memory_rate(kind: str, num_bytes: int) -> float:
    """Bytes per second of all threads reading ("read") or copying ("copy") as many bytes again and again, now."""
    probe = _library().read_rate if kind == "read" else _library().copy_rate
    return probe(min(num_bytes, _MAX_PROBE_BYTES), _C.num_threads())


@functools.cache
def arithmetic_rate(kind: str) -> float:
    """Operations per second of all threads on registers, a multiply and an add counted as two."""
    return _library().arithmetic_rate(ARITHMETIC_BITS[kind], _C.num_threads())


@dataclass(frozen=True)
class Machine:
    """What was measured on, and its rates.

    name: of its folder under bench/results.
    memory, arithmetic: the kinds that it has rates of.
    memory_rate: bytes per second of a kind, with so many bytes in use.
    arithmetic_rate: operations per second of a kind.
    """

    name: str
    description: str
    memory: tuple[str, ...]
    arithmetic: tuple[str, ...]
    memory_rate: Callable[[str, int], float]
    arithmetic_rate: Callable[[str], float]

    def roofs(self) -> dict[str, float]:
        """All of them, memory beyond every cache."""
        memory = {kind: self.memory_rate(kind, _MAX_PROBE_BYTES) for kind in self.memory}
        return memory | {kind: self.arithmetic_rate(kind) for kind in self.arithmetic}


@dataclass(frozen=True)
class Work:
    """What one call has to do at least; its limit is the slower of the memory's and the arithmetic's share.

    num_bytes: touched, once each; for a copy read and written ones together.
    working_set: bytes that the calls cycle through, if not num_bytes: decides which cache could serve them.
    num_ops: a multiply and an add are two; arithmetic: "int8", "bf16" or "fp32".
    """

    num_bytes: int
    num_ops: int = 0
    arithmetic: str = "fp32"
    memory: str = "read"
    working_set: int = 0

    def rate_text(self, seconds: float, kind: str) -> str:
        """The rate of doing this in `seconds`, in the unit that `kind` of limit has."""
        if kind in ARITHMETIC_BITS:
            rate = self.num_ops / seconds
            return f"{rate / 1e12:.1f} Top/s" if rate >= 1e13 else f"{rate / 1e9:.0f} Gop/s"
        return f"{self.num_bytes / seconds / 1e9:.1f} GB/s"

    def limit(self, machine: Machine) -> Limit:
        by_memory = self.num_bytes / machine.memory_rate(self.memory, self.working_set or self.num_bytes)
        by_arithmetic = self.num_ops / machine.arithmetic_rate(self.arithmetic) if self.num_ops else 0.0
        return Limit(by_memory, self.memory) if by_memory >= by_arithmetic else Limit(by_arithmetic, self.arithmetic)


@dataclass(frozen=True)
class Limit:
    seconds: float
    kind: str  # "read", "copy", or the arithmetic
