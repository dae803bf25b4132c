"""Linear layers on packed weights, bfloat16 activations, against torch and oneDNN

Weights are cycled through 128 MB (more than any cache here) for up to 8 rows, and warm above. Ours includes quantising
the activations; oneDNN int8 gets them quantised, per tensor and not per group of 32: less work and less accuracy.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from bench.harness import Report, interleave
from bench.roofs import Work
from tilestream import ops
from tilestream.ops import PackedFormat, PackedWeight

CYCLED_BYTES = 128 << 20
SHAPES = [(4096, 4096), (1536, 576)]
LLAMA_3_8B = [(6144, 4096), (28672, 4096), (4096, 14336)]  # q, k, v; gate and up; down: groups of 128, beside those of 32
# For each weight format the peers worth comparing with, our other formats among them.
PEERS = {
    PackedFormat.U4G32S: ("int4pack", "onednn_int8", "bf16"),
    PackedFormat.U4G32: ("int4pack", "onednn_int8", "bf16"),
    PackedFormat.U4G128S: ("U4G32S", "int4pack", "onednn_int8", "bf16"),
    PackedFormat.U4G128: ("U4G32", "int4pack", "onednn_int8", "bf16"),
    PackedFormat.U8G32S: ("onednn_int8", "int_mm", "bf16"),
    PackedFormat.U8G128S: ("U8G32S", "onednn_int8", "bf16"),
    PackedFormat.BFLOAT16: ("bf16",),
    PackedFormat.FLOAT32: ("fp32",),
}


def random_weight(n: int, k: int, format: PackedFormat) -> PackedWeight:
    if format in (PackedFormat.FLOAT32, PackedFormat.BFLOAT16):
        return ops.pack_weight(torch.randn(n, k), format=format)
    levels = 2**format.bits
    q = torch.randint(0, levels, (n, k), dtype=torch.uint8)
    scale = torch.rand(n, -(-k // format.group_size)) / levels
    return ops.pack_weight(q=q, scale=scale, zero=None if format.is_symmetric else scale * -levels / 2, format=format)


def ours(x: torch.Tensor, weight: PackedWeight, act_bits: int = 8) -> Callable[[], object]:
    out = x.new_empty(x.size(0), weight.n)
    clone = lambda: PackedWeight(weight.data.clone(), weight.n, weight.k, weight.format)  # noqa: E731
    run = lambda w: ops.linear(x, w, out=out, act_bits=act_bits)  # noqa: E731
    return cycled(run, clone, weight.data.numel(), x.size(0))


def cycled(run: Callable[[object], object], make: Callable[[], object], weight_bytes: int, m: int) -> Callable[[], object]:
    """run(weight) on the next of enough equal weights that none is still in a cache."""
    num = -(-CYCLED_BYTES // weight_bytes) if m <= 8 else 1
    first = make()
    weights = itertools.cycle([first] + [first.clone() if isinstance(first, torch.Tensor) else make() for _ in range(num - 1)])
    return lambda: run(next(weights))


def peer(name: str, x: torch.Tensor, n: int) -> Callable[[], object]:
    m, k = x.shape
    if name in PackedFormat.__members__:
        return ours(x, random_weight(n, k, PackedFormat[name]))
    if name == "bf16":
        return cycled(lambda w: torch.nn.functional.linear(x, w), lambda: torch.randn(n, k).bfloat16(), 2 * n * k, m)
    if name == "fp32":
        x32 = x.float()
        return cycled(lambda w: torch.nn.functional.linear(x32, w), lambda: torch.randn(n, k), 4 * n * k, m)
    if name == "int4pack":
        pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu
        scales = torch.rand(k // 32, n, 2).bfloat16()
        make = lambda: pack(torch.randint(0, 16, (n, k), dtype=torch.int32), 1)  # noqa: E731
        return cycled(lambda w: torch.ops.aten._weight_int4pack_mm_for_cpu(x, w, 32, scales), make, n * k // 2, m)
    int8 = lambda: torch.randint(-127, 128, (n, k), dtype=torch.int8)  # noqa: E731
    if name == "int_mm":
        x8 = torch.randint(-127, 128, (m, k), dtype=torch.int8)
        return cycled(lambda w: torch._int_mm(x8, w.t()), int8, n * k, m)
    x8, scale, zero = torch.randint(0, 256, (m, k), dtype=torch.uint8), torch.rand(n), torch.zeros(n, dtype=torch.int64)
    multiply = torch.ops.onednn.qlinear_pointwise
    return cycled(
        lambda w: multiply(x8, 0.1, 128, w, scale, zero, None, 1.0, 0, torch.bfloat16, "none", [], ""),
        lambda: torch.ops.onednn.qlinear_prepack(int8(), [m, k]), n * k, m,
    )  # fmt: skip


def check(x: torch.Tensor, weight: PackedWeight) -> None:
    dense = ops.embedding(torch.arange(weight.n), weight)
    expected = x.float() @ dense.t()
    error = (ops.linear(x, weight).float() - expected).norm() / expected.norm()
    assert error <= 0.02, error


CASES = [(f, n, k) for f in PEERS for n, k in SHAPES + (LLAMA_3_8B if f.group_size == 128 else [])]


@pytest.mark.parametrize("m", [1, 8, 64, 512])
@pytest.mark.parametrize("format, n, k", CASES, ids=lambda v: v.name if isinstance(v, PackedFormat) else str(v))
def test_linear(format: PackedFormat, m: int, n: int, k: int, report: Report) -> None:
    torch.manual_seed(0)
    x = torch.randn(m, k, dtype=torch.float32 if format == PackedFormat.FLOAT32 else torch.bfloat16)
    weight = random_weight(n, k, format)
    check(x, weight)
    candidates = {"ours": ours(x, weight)} | {name: peer(name, x, n) for name in PEERS[format]}
    arithmetic = {PackedFormat.BFLOAT16: "bf16", PackedFormat.FLOAT32: "fp32"}.get(format, "int8")
    report.add(f"linear {format.name}", f"m={m} n={n} k={k}", interleave(candidates, rounds=12), work=work(x, weight, arithmetic))


@pytest.mark.parametrize("m", [1, 64])
@pytest.mark.parametrize("format", [PackedFormat.U4G128S, PackedFormat.U8G128S], ids=lambda f: f.name)
def test_weight_only(format: PackedFormat, m: int, report: Report) -> None:
    """bfloat16 that meets the dequantised weight, against bfloat16 that is quantised."""
    torch.manual_seed(0)
    n, k = SHAPES[0]
    x, weight = torch.randn(m, k, dtype=torch.bfloat16), random_weight(n, k, format)
    candidates = {"ours": ours(x, weight, 16), "act_bits=8": ours(x, weight), "bf16": peer("bf16", x, n)}
    report.add(
        f"linear {format.name}, act_bits=16",
        f"m={m} n={n} k={k}",
        interleave(candidates, rounds=12),
        work=work(x, weight, "bf16"),
    )


def work(x: torch.Tensor, weight: PackedWeight, arithmetic: str) -> Work:
    m = x.size(0)
    moved = weight.data.numel() + x.nbytes + m * weight.n * x.element_size()
    return Work(moved, 2 * m * weight.n * weight.k, arithmetic, working_set=CYCLED_BYTES if m <= 8 else moved)
