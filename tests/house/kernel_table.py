"""What ptxas reported of each CUDA kernel, as the table of docs/kernel_registers.md.

`python -m tests.house.kernel_table` writes the table after a build for all targets.
"""

from __future__ import annotations

import re
import subprocess
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "kernel_registers.md"
TABLE_RELEASE = "13.0"  # of nvcc, to whose choices the table belongs

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90a")

_HEADER = """# Registers of the CUDA kernels

What the compiler (nvcc {release}) reports for each kernel and target. No kernel spills, and none of those for tensor cores
keeps anything in local memory (stack); `tests/house/test_nvcc.py` holds the build to that and to this table. Shared memory is
given at launch: each kernel's header comment has its budget. Files named `*_sm90*` are for Hopper alone; where their warps
divide the registers anew (`setmaxnreg`), the table has what each thread starts with. Written by
`python -m tests.house.kernel_table`.

| file | kernel | registers: sm_80 | sm_86 | sm_89 | sm_90a | stack bytes |
|---|---|---|---|---|---|---|
"""


@dataclass
class Kernel:
    """One instantiation: its file's stem, its name with template arguments, and by target what it takes."""

    file: str
    name: str
    registers: dict[str, int] = field(default_factory=dict)
    stack_bytes: dict[str, int] = field(default_factory=dict)
    spill_bytes: dict[str, int] = field(default_factory=dict)


def targets_of(file: str) -> set[str]:
    """What CMakeLists.txt compiles the file of this stem for."""
    return {"sm_90a"} if "_sm90" in file else set(TARGETS)


def objects(suffix: str = "") -> dict[str, Path]:
    """By the stem of its kernel file: each object file of the last build in this checkout, or what lies beside it."""
    build = ROOT / "build" / f"{sysconfig.get_config_var('SOABI')}-torch-{torch.__version__}"
    found = build.glob(f"CMakeFiles/cuda_*kernels.dir/csrc/cuda/*.cu.o{suffix}")
    return {path.name.partition(".")[0]: path for path in sorted(found, key=lambda path: path.name)}


def read_reports() -> list[Kernel]:
    """Every kernel of that build (csrc/cuda/report_ptxas.py)."""
    kernels: dict[tuple[str, str], Kernel] = {}
    for file, report in objects(".ptxas").items():
        entry = None
        for line in report.read_text().splitlines():
            if match := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
                entry = kernels.setdefault((file, match[1]), Kernel(file, match[1]))
                target = match[2]
            elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
                entry.stack_bytes[target], entry.spill_bytes[target] = int(match[1]), int(match[2]) + int(match[3])
            elif match := re.search(r"Used (\d+) registers", line):
                entry.registers[target] = int(match[1])
    for kernel, name in zip(kernels.values(), demangled([kernel.name for kernel in kernels.values()]), strict=True):
        kernel.name = name
    return sorted(kernels.values(), key=lambda kernel: (kernel.file, kernel.name))


def demangled(names: list[str]) -> list[str]:
    """Names as people write them, without namespaces and parameters."""
    result = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    short = []
    for name in result.stdout.splitlines():
        name = name.removeprefix("void ").replace("(anonymous namespace)::", "").replace("tilestream::", "")
        short.append(name[: _end_of_name(name)].replace("cuda::", ""))
    return short


def _end_of_name(text: str) -> int:
    """Where the parameter list begins: the first parenthesis outside template arguments."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return i
    return len(text)


def render(kernels: list[Kernel]) -> str:
    """The whole document."""
    rows = []
    for k in kernels:
        registers = " | ".join(str(k.registers.get(target, "")) for target in TARGETS)
        rows.append(f"| {k.file} | `{k.name}` | {registers} | {max(k.stack_bytes.values())} |\n")
    return _HEADER.format(release=TABLE_RELEASE) + "".join(rows)


def nvcc_release() -> str | None:
    """"13.0", or None where there is no nvcc."""
    try:
        told = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    except OSError:
        return None
    return re.search(r"release (\d+\.\d+)", told)[1]


if __name__ == "__main__":
    TABLE.write_text(render(read_reports()))
    print(f"wrote {TABLE.relative_to(ROOT)}")
