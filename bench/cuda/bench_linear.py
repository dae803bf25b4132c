"""Linear layers on a GPU, Llama 3 8B's shapes, bfloat16 in and out, against torch

Row-major bfloat16 weights by each of our kernels (tune_linear.py times more rows); 4 and 8 bits with rows that are int8
already, as the norm and the activation before them leave them. Weights come from memory. `_int_mm` gives bare int32 sums,
without scales, and takes more than 16 rows. Weights in groups of 128 (W4Ax) have Llama 3 70B's shapes too, rows all of int8
and mostly of int4, and `_scaled_mm` on e4m3 with one scale a tensor as one more peer.
"""

from __future__ import annotations

import pytest
import torch

from bench.cuda.timing import DEVICE, Run, check, interleave, num_sets, working
from bench.cuda.weights import DISTINCT_ROWS, random_weight
from bench.harness import Report
from bench.roofs import Work
from tilestream import ops
from tilestream.ops import LinearKernel, PackedFormat, PackedWeight

SHAPES = {
    "qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336), "lm_head": (128256, 4096),
}  # fmt: skip
W4AX_SHAPES = {f"8B {name}": shape for name, shape in SHAPES.items() if name != "lm_head"} | {
    "70B qkv": (10240, 8192), "70B o": (8192, 8192), "70B gate_up": (57344, 8192), "70B down": (8192, 28672),
}  # fmt: skip
W4AX_ROWS = (1, 8, 16, 32, 64, 128, 2048, 8192)
ROWS_ROW_MAJOR = (1, 16, 64)  # above, they go to cuBLAS
ROWS = {PackedFormat.U4G32S: (1, 4, 16, 64, 512, 2048), PackedFormat.U8G32S: (1, 64, 2048)}
QUANTISED = [(format, m) for format, rows in ROWS.items() for m in rows]


def clones(weight: PackedWeight, num: int) -> list[PackedWeight]:
    return [weight] + [PackedWeight(weight.data.clone(), weight.n, weight.k, weight.format) for _ in range(num - 1)]


def product_with_torch(x: torch.Tensor, values: torch.Tensor, n: int, sets: int) -> Run:
    """bfloat16, by cuBLAS, of a weight whose rows repeat `values`."""
    dense = values.bfloat16().repeat(n // DISTINCT_ROWS, 1)
    copies = [dense] + [dense.clone() for _ in range(sets - 1)]
    out = x.new_empty(len(x), n)
    return lambda i: torch.mm(x, copies[i % sets].t(), out=out)


def int_product_with_torch(x: torch.Tensor, n: int, sets: int) -> Run:
    m, k = x.shape
    x_int8 = torch.randint(-127, 128, (m, k), dtype=torch.int8, device=DEVICE)
    copies = torch.randint(-127, 128, (sets, n, k), dtype=torch.int8, device=DEVICE)
    return lambda i: torch._int_mm(x_int8, copies[i % sets].t())


def fp8_product_with_torch(x: torch.Tensor, n: int, sets: int) -> Run:
    m, k = x.shape
    x_fp8, one = x.to(torch.float8_e4m3fn), torch.ones((), device=DEVICE)
    copies = [torch.randn(n, k, device=DEVICE).to(torch.float8_e4m3fn) for _ in range(sets)]
    return lambda i: torch._scaled_mm(x_fp8, copies[i % sets].t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


def expected(x: torch.Tensor, values: torch.Tensor, n: int) -> torch.Tensor:
    return (x.float() @ values.t()).repeat(1, n // DISTINCT_ROWS)


@pytest.mark.parametrize("m", ROWS_ROW_MAJOR)
@pytest.mark.parametrize("shape", SHAPES)
def test_row_major(shape: str, m: int, report: Report) -> None:
    n, k = SHAPES[shape]
    x = torch.randn(m, k, dtype=torch.bfloat16, device=DEVICE)
    weight, values = random_weight(n, k, PackedFormat.ROWS_BFLOAT16, DEVICE)
    out, want = x.new_empty(m, n), expected(x, values, n)
    for kernel in LinearKernel:
        check(ops.linear(x, weight, out=out, kernel=kernel), want, 0.01)
    work = Work(weight.data.nbytes + x.nbytes + out.nbytes, 2 * m * n * k, "bf16", memory="copy")
    sets = num_sets(work.num_bytes)
    weights = clones(weight, sets)
    candidates: dict[str, Run] = {"ours": lambda i: ops.linear(x, weights[i], out=out)}  # the choice
    for kernel in (LinearKernel.GEMV, LinearKernel.FLAT):
        candidates[kernel] = lambda i, kernel=kernel: ops.linear(x, weights[i], out=out, kernel=kernel)
    candidates["torch.mm"] = lambda i: torch.mm(x, weights[i].matrix.t(), out=out)
    report.add("linear ROWS_BFLOAT16", f"{shape}, m={m} n={n} k={k}", interleave(candidates, sets), work=work)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("format", "m"), QUANTISED, ids=lambda value: getattr(value, "name", value))
def test_quantised(format: PackedFormat, m: int, shape: str, report: Report) -> None:
    n, k = SHAPES[shape]
    x = torch.randn(m, k, dtype=torch.bfloat16, device=DEVICE)
    rows = ops.quantise(x)
    weight, values = random_weight(n, k, format, DEVICE)
    out = x.new_empty(m, n)
    check(ops.linear(rows, weight, out=out), expected(x, values, n), 0.03)  # of which the int8 rows make 0.01
    num_bytes = weight.data.nbytes + rows.q.nbytes + rows.scale.nbytes + rows.sum.nbytes + out.nbytes
    work = Work(num_bytes, 2 * m * n * k, "int8", memory="copy")
    sets = num_sets(num_bytes)
    weights = clones(weight, sets)
    peers = {"torch.mm bf16": product_with_torch(x, values, n, num_sets(2 * n * k))}
    if m > 16:
        peers["torch._int_mm"] = int_product_with_torch(x, n, num_sets(n * k))
    candidates = {"ours": lambda i: ops.linear(rows, weights[i], out=out)} | working(peers)
    report.add(f"linear {format.name}", f"{shape}, m={m} n={n} k={k}", interleave(candidates, sets), work=work)


@pytest.mark.parametrize("shape", W4AX_SHAPES)
@pytest.mark.parametrize("m", W4AX_ROWS)
def test_w4ax(m: int, shape: str, report: Report) -> None:
    n, k = W4AX_SHAPES[shape]
    x = torch.randn(m, k, dtype=torch.bfloat16, device=DEVICE)
    k4 = k * 7 // 8 // 128 * 128
    rows, mixed = ops.quantise(x), ops.quantise(x, k4=k4)
    weight, values = random_weight(n, k, PackedFormat.U4G128S, DEVICE)
    out, want = x.new_empty(m, n), expected(x, values, n)
    check(ops.linear(rows, weight, out=out), want, 0.03)
    check(ops.linear(mixed, weight, out=out), want, 0.3)  # of which the int4 rows make most
    num_bytes = weight.data.nbytes + rows.q.nbytes + rows.scale.nbytes + out.nbytes
    work = Work(num_bytes, 2 * m * n * k, "int8", memory="copy")
    sets = num_sets(num_bytes)
    weights = clones(weight, sets)
    peers = {"torch.mm bf16": product_with_torch(x, values, n, num_sets(2 * n * k)),
             "torch._scaled_mm fp8": fp8_product_with_torch(x, n, num_sets(n * k))}  # fmt: skip
    if m > 16:
        peers["torch._int_mm"] = int_product_with_torch(x, n, num_sets(n * k))
    candidates: dict[str, Run] = {"ours": lambda i: ops.linear(rows, weights[i], out=out)}
    candidates[f"ours, {k4} of k int4"] = lambda i: ops.linear(mixed, weights[i], out=out)
    report.add("linear U4G128S", f"{shape}, m={m} n={n} k={k}", interleave(candidates | working(peers), sets), work=work)
