"""A build that does not fit says so in words, never as an undefined symbol."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ | environment)


FAKE_INFO = """
import sys, types
sys.modules["tilestream._build_info"] = {info}
import tilestream.ops
"""


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ("types.SimpleNamespace(TORCH_VERSION='2.0.1')", "tilestream was built for torch 2.0.1, and this is torch"),
        ("None", "tilestream's native part is not built: run `pip install .`"),
    ],
)
def test_wrong_build(info: str, message: str) -> None:
    result = run(FAKE_INFO.format(info=info))
    assert result.returncode == 1
    assert message in result.stderr and "undefined symbol" not in result.stderr


def test_unknown_simd_level() -> None:
    result = run("import tilestream.ops; from tilestream._native import _C; _C.simd_level()", TILESTREAM_SIMD="sse9")
    assert result.returncode != 0
    assert "SIMD level 'sse9' is not one of those this CPU runs: portable" in result.stderr


@pytest.mark.parametrize("level", ["portable", "avx2", "avx512", "avx512_vnni"])
def test_forced_simd_level(level: str) -> None:
    from tilestream._native import _C

    if level not in _C.simd_levels():
        pytest.skip(f"this CPU has no {level}")
    result = run("import tilestream.ops; from tilestream._native import _C; print(_C.simd_level())", TILESTREAM_SIMD=level)
    assert result.stdout.strip() == level
