"""Where nvcc is: every kernel compiles for every target, none spills, and the table of their registers is up to date."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.house import kernel_table
from tilestream._native import _C

ROOT = Path(__file__).parents[2]
# The emulator's own test kernels use every PTX wrapper; most need sm_90a.
WRAPPERS = sorted(path for path in (ROOT / "tests/simt/kernels").glob("*.cu") if not path.stem.startswith("face"))
ALL_TARGETS = "80-real 86-real 89-real 90a-real 90-virtual"

built_here = pytest.mark.skipif(_C.cuda_archs != ALL_TARGETS, reason=f"built for: {_C.cuda_archs or 'no GPU'}")


@pytest.fixture(scope="module")
def kernels() -> list[kernel_table.Kernel]:
    return kernel_table.read_reports()


@built_here
def test_every_kernel_file_was_reported_for_every_target(kernels: list[kernel_table.Kernel]) -> None:
    assert set(kernel_table.objects(".ptxas")) == {path.stem for path in (ROOT / "csrc/cuda").glob("*.cu")}
    for kernel in kernels:
        assert set(kernel.registers) == kernel_table.targets_of(kernel.file), kernel.name


@built_here
def test_no_kernel_spills(kernels: list[kernel_table.Kernel]) -> None:
    assert [] == [(kernel.name, kernel.spill_bytes) for kernel in kernels if any(kernel.spill_bytes.values())]


@built_here
def test_no_wgmma_is_held_up() -> None:
    """Where ptxas finds accumulators in use too early, it waits after each wgmma, and says so."""
    told = [line for report in kernel_table.objects(".ptxas").values() for line in report.read_text().splitlines()]
    assert [] == [line for line in told if "instructions are serialized" in line or "warpgroup.wait is injected" in line]


@built_here
def test_the_table_is_up_to_date(kernels: list[kernel_table.Kernel]) -> None:
    """`python -m tests.house.kernel_table` writes it."""
    if (version := kernel_table.nvcc_release()) != kernel_table.TABLE_RELEASE:
        pytest.skip(f"the table is of nvcc {kernel_table.TABLE_RELEASE}; this is {version}")
    assert kernel_table.TABLE.read_text() == kernel_table.render(kernels)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on this machine")
@pytest.mark.parametrize("source", WRAPPERS, ids=lambda path: path.stem)
def test_wrappers_compile(source: Path, tmp_path: Path) -> None:
    include = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/include'}"]
    command = ["nvcc", "-std=c++20", "-O3", *include, "-gencode", "arch=compute_90a,code=sm_90a", "-c", str(source)]
    result = subprocess.run([*command, "-o", str(tmp_path / "kernel.o")], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
