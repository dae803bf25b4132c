"""Builds the emulator with g++ alone, and loads it. `python -m tests.simt.build` builds only.

What did not change is not compiled again: with nothing to do this takes a tenth of a second.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


@functools.cache
def build(target: str, *, asan: bool = False) -> Path:
    """The shared library of `target` (simt_ops or simt_kernels), compiled if it is not up to date.

    asan: with AddressSanitizer instead of the race shadow; libasan has to be preloaded to load it.
    Raises RuntimeError with the compiler's output when it does not compile.
    """
    folder = ROOT / "build" / ("simt-asan" if asan else "simt")
    tools = Path(sys.executable).parent  # the virtual environment's cmake and ninja, whether or not it is activated
    cmake, ninja = (shutil.which(tool, path=str(tools)) or shutil.which(tool) for tool in ("cmake", "ninja"))
    if cmake is None or ninja is None:
        raise RuntimeError("the emulator needs cmake and ninja: pip install cmake ninja")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:  # one builds, the test runner's other processes wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "build.ninja").exists():
            _run([cmake, "-S", str(HERE), "-B", str(folder), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}",
                  f"-DTILESTREAM_SIMT_ASAN={'ON' if asan else 'OFF'}"])  # fmt: skip
        _run([ninja, "-C", str(folder), target])
    return folder / f"{target}.so"


def _run(command: list[str]) -> None:
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stdout[-6000:]}")


@functools.cache
def ops() -> ctypes.CDLL:
    """The package's CUDA kernels on the emulator, known to tilestream._C as the SIMD level `simt`."""
    from tilestream._native import _C

    library = build("simt_ops")
    _C.load_simt(str(library))
    loaded = ctypes.CDLL(str(library))
    loaded.tilestream_simt_set_seed.argtypes = [ctypes.c_ulonglong]
    loaded.tilestream_simt_set_arch.argtypes = [ctypes.c_int]
    return loaded


if __name__ == "__main__":
    print(build("simt_ops"))
    print(build("simt_kernels"))
