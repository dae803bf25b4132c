"""Where nvcc is: every kernel and every PTX wrapper compiles for every target, and no kernel spills registers."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = sorted((ROOT / "csrc/cuda").glob("*.cu"))
# The emulator's own test kernels use every wrapper; clusters and bulk copies need sm_90.
WRAPPERS = sorted(path for path in (ROOT / "tests/simt/kernels").glob("*.cu") if not path.stem.startswith("face"))
REAL = ("80", "86", "89", "90a")

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on this machine")


def compile_for(source: Path, targets: list[str], output: Path) -> str:
    """What the compiler reports; fails the test when it does not compile."""
    command = ["nvcc", "--threads", "0", "-std=c++20", "-O3", "-Xptxas", "-v", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/include'}"]
    command += [flag for target in targets for flag in ("-gencode", target)] + ["-c", str(source), "-o", str(output)]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert result.returncode == 0, result.stdout[-4000:]
    return result.stdout


@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.stem)
def test_kernels_compile_for_every_target_without_spills(source: Path, tmp_path: Path) -> None:
    targets = [f"arch=compute_{arch},code=sm_{arch}" for arch in REAL] + ["arch=compute_90,code=compute_90"]
    report = compile_for(source, targets, tmp_path / "kernel.o")
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill stores", report)]
    assert spills and max(spills) == 0, [line for line in report.splitlines() if "spill" in line]


@pytest.mark.parametrize("source", WRAPPERS, ids=lambda path: path.stem)
def test_wrappers_compile(source: Path, tmp_path: Path) -> None:
    compile_for(source, ["arch=compute_90a,code=sm_90a"], tmp_path / "kernel.o")
