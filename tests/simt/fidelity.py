"""Each PTX wrapper alone, from one source, on the emulator and on a GPU: the same inputs, the same bits.

    python -m tests.simt.fidelity record    on a GPU of compute capability 9.0: writes tests/data/ptx_fidelity.npz

test_fidelity.py compares the emulator with the record everywhere, and with the GPU where there is one.

Sums of products in floating point are not IEEE's on a tensor core: it aligns the products to the largest, cuts off what hangs
over, and adds in its own order; the emulator adds in double and rounds once. Where the inputs are small integers every order
is exact, so the bits must agree. Cases named `..._general` have other inputs, and a bound in place of equality.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import shutil
import subprocess
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tests.simt import test_tma, test_wgmma
from tests.simt.test_simt import kernels

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "tests/data/ptx_fidelity.npz"
HOW_TO_RECORD = "no outputs of a GPU are recorded: run `python -m tests.simt.fidelity record` on one of compute capability 9.0"
SOURCES = ("ptx.cu", "alone.cu", "wgmma.cu", "tma.cu", "right.cu", "gemm.cu", "gpu.cu")


@dataclass
class Case:
    kernel: str
    data: np.ndarray  # uint32, what the kernel gets
    begin: int  # of what it returns
    end: int
    bound: np.ndarray | None = None  # of the floats' difference; None: every bit is equal


def _words(name: str, num: int = 4096) -> np.ndarray:
    """Any bits, the same ones for ever."""
    return np.random.default_rng(zlib.crc32(name.encode())).integers(0, 2**32, num, dtype=np.uint32)


def _floats(name: str) -> np.ndarray:
    """Floats of every size that fp16, bf16 and e4m3 can tell apart, and beyond."""
    words = _words(name).copy()
    words[1024:] = 0
    exponents = 127 + words[:1024] % 50 - 25
    words[:1024] = (words[:1024] & 0x807FFFFF) | exponents.astype(np.uint32) << 23
    words[:4] = np.array([np.nan, np.inf, -np.inf, -0.0], np.float32).view(np.uint32)
    return words


def _matrices(name: str, depth: int, low: int, high: int, general: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """data of ptx.cu's mma cases, and the sum over |a| |b| of each result."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    a, b = (rng.normal(size=(n, depth)) if general else rng.integers(low, high + 1, (n, depth)) for n in (16, 8))
    data = np.zeros(4096, np.float32)
    data[: 16 * depth], data[1024 : 1024 + 8 * depth] = a.ravel(), b.ravel()
    return data.view(np.uint32), (np.abs(a) @ np.abs(b.T)).ravel()


MMA = {"f16": (16, -8, 8), "bf16": (16, -8, 8), "e4m3": (32, -8, 8), "s8": (32, -128, 127), "u8s8": (32, 0, 127), "s4": (64, -8, 7),
       "u4s4": (64, 0, 7)}  # fmt: skip
# Of a general sum, against sum |a| |b| + |d|: what 24 bits less the carries keep; of e4m3 Hopper keeps 14.
GENERAL = {"f16": 2.0**-20, "bf16": 2.0**-20, "e4m3": 2.0**-11}


@functools.cache
def cases() -> dict[str, Case]:
    all_cases: dict[str, Case] = {}
    for name in ("lop3", "prmt", "cvt_f16x2_e4m3x2", "ldmatrix_x1", "ldmatrix_x2_trans", "stmatrix_x2", "stmatrix_x4_trans", "cp_async_4",
                 "cp_async_8", "cp_async_16", "cp_async_bulk", "atoms", "ld_nc_no_allocate"):  # fmt: skip
        all_cases[name] = Case(name, _words(name), 2048, 2048 + 512)
    for name in ("cvt_bf16x2", "cvt_f16x2", "cvt_e4m3x2"):
        all_cases[name] = Case(name, _floats(name), 2048, 2048 + 256)
    for name in ("round_f16", "round_bf16", "round_e4m3"):
        all_cases[name] = Case(name, _floats(name), 2048, 2048 + 1024)
    for name in ("ldmatrix_x4", "ldmatrix_x2", "ldmatrix_x4_trans", "stmatrix_x4"):
        data = np.zeros(4096, np.float32)
        data[:256] = np.arange(256) * 37 % 256
        all_cases[name] = Case(name, data.view(np.uint32), 2048, 2048 + 256)

    exponents = np.zeros(4096, np.float32)
    exponents[:128] = np.random.default_rng(0).uniform(-130, 20, 128)
    power = np.exp2(exponents[:128].astype(np.float64)).reshape(32, 4)
    bound = np.pad(np.where(power < 2.0**-126, 2.0**-126, power * 2.0**-21), ((0, 0), (0, 4)))  # flushes what is subnormal
    all_cases["ex2_approx"] = Case("ex2_approx", exponents.view(np.uint32), 2048, 2048 + 256, bound.ravel())

    for element, (depth, low, high) in MMA.items():
        data, _ = _matrices(element, depth, low, high)
        all_cases[f"mma_{element}"] = Case(f"mma_{element}", data, 2048, 2048 + 128)
    for element, relative in GENERAL.items():
        data, magnitude = _matrices(element, MMA[element][0], 0, 0, general=True)
        all_cases[f"mma_{element}_general"] = Case(f"mma_{element}", data, 2048, 2048 + 128, relative * (2 * magnitude + 4))

    for form in test_wgmma.FORMS:
        for row_bytes in (16, 32, 64, 128):
            if test_wgmma.fits(form, row_bytes):
                data = test_wgmma.prepare(form, row_bytes, True, *test_wgmma.integers(form)).numpy().view(np.uint32)
                n = int(form.split("_")[1])
                all_cases[f"wgmma_{form}_{row_bytes}"] = Case(f"wgmma_{form}", data, 16384, 16384 + 64 * n)
    for form in ("f16_64_kk", "bf16_96_mk", "e4m3_32_kk"):
        element, n, _ = form.split("_")
        rng = np.random.default_rng(1)
        a, b = (torch.from_numpy(rng.normal(size=(rows, MMA[element][0]))).float() for rows in (64, int(n)))
        data = test_wgmma.prepare(form, 32, True, a, b).numpy().view(np.uint32)
        bound = GENERAL[element] * (2 * (a.abs() @ b.abs().T) + 7).numpy().ravel()
        all_cases[f"wgmma_{form}_general"] = Case(f"wgmma_{form}", data, 16384, 16384 + 64 * int(n), bound)

    for i, box in enumerate(test_tma.BOXES):
        rank = len(box[2])
        for ranks in (0b0001, 0b1011):
            words = test_tma.prepare(box, ranks)[3].view(np.uint32)
            all_cases[f"tensor_load_{i}_{ranks}"] = Case(f"tensor_load_{rank}d", words, 16384, len(words))
        words = test_tma.prepare(box, 1)[3].view(np.uint32)
        all_cases[f"tensor_store_{i}"] = Case(f"tensor_store_{rank}d", words, 64, 16384)

    matrices = np.zeros(28672, np.float32)
    small = np.random.default_rng(2).integers(-2, 3, (192, 256))
    matrices[:24576] = torch.from_numpy(small).to(torch.bfloat16).view(torch.float32).flatten().numpy()
    all_cases["gemm"] = Case("gemm", matrices.view(np.uint32), 24576, 28672)

    flip = np.zeros(4096, np.float32)
    flip[:256] = np.arange(256)
    for name in ("bulk_pipeline", "cp_async_mbarrier", "cluster", "registers", "dependent_launch", "grid_barrier"):
        all_cases[name] = Case(name, flip.view(np.uint32), 2048, 2048 + 256)
    return all_cases


def on_emulator(case: Case, seed: int) -> np.ndarray:
    data = case.data.copy()
    report = kernels().simt_run(case.kernel.encode(), seed, data.ctypes.data).decode()
    if report:
        raise RuntimeError(report)
    return data[case.begin : case.end]


@functools.cache
def gpu_kernels() -> ctypes.CDLL:
    """The same sources by nvcc."""
    if shutil.which("nvcc") is None:
        raise RuntimeError("the fidelity suite needs nvcc to run on a GPU")
    folder = ROOT / "build/fidelity"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "kernels.so"
    command = ["nvcc", "-std=c++20", "-O3", "--threads", "0", "-shared", "-Xcompiler", "-fPIC", f"-I{ROOT / 'csrc'}",
               f"-I{ROOT / 'csrc/include'}", "-gencode", "arch=compute_90a,code=sm_90a", "-o", str(library),
               *(str(ROOT / "tests/simt/kernels" / name) for name in SOURCES)]  # fmt: skip
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode != 0:
        raise RuntimeError(result.stdout[-4000:])
    loaded = ctypes.CDLL(str(library))
    loaded.gpu_run.restype = ctypes.c_char_p
    loaded.gpu_run.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t]
    return loaded


def on_gpu(case: Case) -> np.ndarray:
    data = case.data.copy()
    report = gpu_kernels().gpu_run(case.kernel.encode(), data.ctypes.data, data.size).decode()
    if report:
        raise RuntimeError(report)
    return data[case.begin : case.end]


def summary(case: Case, output: np.ndarray) -> np.ndarray:
    """What is kept of an output: all of it where a bound judges; else its first 32 words and a digest."""
    if case.bound is not None:
        return output
    return np.concatenate([output[:32], np.frombuffer(hashlib.sha256(output.tobytes()).digest(), np.uint32)])


def difference(case: Case, got: np.ndarray, want: np.ndarray) -> str:
    """What is wrong with the summary `got`, or nothing."""
    if case.bound is None:
        wrong = np.flatnonzero(got != want)
        where = (
            f"word {wrong[0]}: {got[wrong[0]]:#010x}, not {want[wrong[0]]:#010x}"
            if len(wrong) and wrong[0] < len(got) - 8
            else "a later word"
        )
        return where if len(wrong) else ""
    errors = np.abs(got.view(np.float32).astype(np.float64) - want.view(np.float32))
    wrong = np.flatnonzero(~(errors <= case.bound))
    return f"word {wrong[0]} is off by {errors[wrong[0]]:.3g}, allowed {case.bound[wrong[0]]:.3g}" if len(wrong) else ""


def record() -> None:
    np.savez_compressed(RECORD, **{name: summary(case, on_gpu(case)) for name, case in cases().items()})
    print(f"{RECORD.relative_to(ROOT)}: {len(cases())} cases, {RECORD.stat().st_size} bytes, from {torch.cuda.get_device_name()}")


if __name__ == "__main__":
    if sys.argv[1:] != ["record"]:
        sys.exit(__doc__)
    record()
