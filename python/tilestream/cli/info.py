"""`tilestream info`: what was built, and what this machine can do."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Annotated, Any

import typer

EPILOG = """[bold]Examples[/]

tilestream info
tilestream info --json

# what the kernels do on a smaller CPU
TILESTREAM_SIMD=avx2 tilestream info"""


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs and bug reports.")] = False,
) -> None:
    """Show versions, the SIMD level in use, threads, CUDA, and the ops."""
    facts = _facts()
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        table.add_row(name.replace("_", " "), ", ".join(value) if isinstance(value, list) else str(value))
    Console().print(table, highlight=False)


def _facts() -> dict[str, Any]:
    import tilestream
    import torch
    from tilestream import _C
    from tilestream._build_info import TORCH_VERSION

    names = torch._C._dispatch_get_all_op_names()
    return {
        "version": tilestream.__version__,
        "torch_built_for": TORCH_VERSION,
        "torch_running": torch.__version__,
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "simd_level": _C.simd_level(),
        "simd_levels_of_cpu": list(_C.simd_levels()),
        "num_threads": _C.num_threads(),
        "cuda_kernels": _C.cuda_archs or "not built",
        "cuda_devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or "none",
        "ops": sorted({name.removeprefix("tilestream::") for name in names if name.startswith("tilestream::")}),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
