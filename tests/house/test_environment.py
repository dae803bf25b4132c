"""A setting that is not allowed is an error at import, with its value and what is allowed; never a silent default."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = "import tilestream.ops; from tilestream._native import _C; print(_C.num_threads())"


def run(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False, env=os.environ | environment)


@pytest.mark.parametrize("value", ["0", "257", "two", "4x", ""])
def test_bad_number_of_threads(value: str) -> None:
    result = run(TILESTREAM_NUM_THREADS=value)
    assert result.returncode == 1
    assert f"ValueError: TILESTREAM_NUM_THREADS is '{value}'; allowed: 1 to 256" in result.stderr


@pytest.mark.parametrize("value", ["2", "no"])
def test_bad_pinning(value: str) -> None:
    result = run(TILESTREAM_PIN_THREADS=value)
    assert result.returncode == 1
    assert f"ValueError: TILESTREAM_PIN_THREADS is '{value}'; allowed: 0 to 1" in result.stderr


def test_good_values() -> None:
    result = run(TILESTREAM_NUM_THREADS="256", TILESTREAM_PIN_THREADS="0")
    assert result.stdout.strip() == "256", result.stderr
