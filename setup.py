"""Builds tilestream._C with CMake against the torch installed in this environment.

torch is found in the environment's site-packages without importing it, so that pip's isolated build works
too. Where nvcc is found, the CUDA kernels are built too, whichever torch this is. Variables: MAX_JOBS (parallel
compile jobs, default the CPU count), TORCH_CUDA_ARCH_LIST (as other extensions of torch; default: 80 to 90a, and PTX).
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 11)


def find_torch() -> tuple[Path, str]:
    """Directory and version of the installed torch; exits with what to do when there is none, or an old one."""
    for key in ("platlib", "purelib"):
        directory = Path(sysconfig.get_path(key)) / "torch"
        if (directory / "version.py").exists():
            break
    else:
        sys.exit(f"tilestream: no torch in {directory.parent}; install torch >= 2.11 there first, then tilestream")
    version = re.search(r"__version__ = '([^']+)'", (directory / "version.py").read_text()).group(1)
    if tuple(int(n) for n in version.split(".")[:2]) < OLDEST_TORCH:
        sys.exit(f"tilestream: torch {version} in {directory.parent} is too old; 2.11 or newer is needed")
    return directory, version


def say(line: str) -> None:
    """One line for the person who installs. pip hides a build's output, so the terminal gets it too."""
    print(line, flush=True)
    try:
        with open("/dev/tty", "w") as terminal:
            terminal.write(line + "\n")
    except OSError:
        pass


class WriteBuildInfo(build_py):
    """Says in a plain module what the native part is made for: it must be readable when that part does not load."""

    def run(self) -> None:
        info = f'"""Written by setup.py: what this build was made for."""\n\nTORCH_VERSION = "{find_torch()[1]}"\n'
        (ROOT / "python" / "tilestream" / "_build_info.py").write_text(info)
        super().run()


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        torch_dir, torch_version = find_torch()
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = ROOT / "build" / f"{sysconfig.get_config_var('SOABI')}-torch-{torch_version}"
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        what = (
            "CPU and CUDA"
            if shutil.which("nvcc")
            else "CPU only (no nvcc on PATH: install the CUDA toolkit for the CUDA kernels)"
        )
        say(f"tilestream: building for {what} against torch {torch_version}, {jobs} jobs")
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build),
            f"-DTILESTREAM_TORCH_DIR={torch_dir}", f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
        ]  # fmt: skip
        # Named each time: an earlier build's cache may point into pip's isolated environment, which is gone by now.
        if ninja := shutil.which("ninja"):
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        target.mkdir(parents=True, exist_ok=True)
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "-j", jobs], check=True)


setup(ext_modules=[Extension("tilestream._C", sources=[])], cmdclass={"build_py": WriteBuildInfo, "build_ext": CMakeBuild})
