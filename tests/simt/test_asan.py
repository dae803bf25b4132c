"""The emulator built with AddressSanitizer: an access out of a global buffer is reported with the kernel's stack."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.simt import build

# A buffer of 4,096 floats from malloc, which the sanitizer surrounds with red zones.
PROGRAM = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
library.simt_run.restype = ctypes.c_char_p
library.simt_run.argtypes = [ctypes.c_char_p, ctypes.c_ulonglong, ctypes.c_void_p]
libc = ctypes.CDLL(None)
libc.calloc.restype = ctypes.c_void_p
data = libc.calloc(4096, 4)
print("report:", library.simt_run(sys.argv[2].encode(), int(sys.argv[3]), data).decode())
"""


@pytest.fixture(scope="module")
def libasan() -> str:
    path = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout.strip()
    if not os.path.isabs(path):
        pytest.skip("g++ has no libasan here")
    return path


def run(libasan: str, name: str, seed: int) -> subprocess.CompletedProcess:
    environment = os.environ | {"LD_PRELOAD": libasan, "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, "-c", PROGRAM, str(build.build("simt_kernels", asan=True)), name, str(seed)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_out_of_bounds_is_reported_with_a_stack(libasan: str) -> None:
    result = run(libasan, "global_out_of_bounds", 2)
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr and "wrong.cu" in result.stderr


@pytest.mark.parametrize("name", ["barrier", "bulk_pipeline", "cluster"])
def test_right_kernels_pass(libasan: str, name: str) -> None:
    result = run(libasan, name, 2)
    assert (result.returncode, result.stdout) == (0, "report: \n"), result.stderr
