"""Measures how many rows a row-major weight is multiplied by fastest with each kernel: `python -m bench.tune_linear --write`.

Needs a GPU. Per (n, k) and number of rows, kernels take turns on weights that come from memory (cuda/timing.py), and medians
count. --write puts the thresholds into linear_thresholds.json under the device's name, where `ops.linear` looks them up, and
leaves other devices and shapes alone.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics

import torch

from bench.cuda.timing import interleave, num_sets
from bench.harness import seconds_text
from tilestream import ops
from tilestream.ops import LinearKernel, PackedFormat, PackedWeight
from tilestream.ops.linear_choice import TABLE, Thresholds

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
# Llama 3 8B and its lm_head, Llama 3.2 1B, Llama 2 7B.
SHAPES = (
    "6144x4096", "4096x4096", "28672x4096", "4096x14336", "128256x4096", "3072x2048", "2048x2048", "16384x2048", "2048x8192",
    "12288x4096", "22016x4096", "4096x11008",
)  # fmt: skip

Times = dict[int, dict[LinearKernel, float]]  # seconds of a call, by number of rows


def best_thresholds(times: Times) -> Thresholds:
    """Those that lose least against always taking the fastest kernel, as a product of ratios; of equals, the lowest."""

    def loss(thresholds: Thresholds) -> float:
        return sum(math.log(row[thresholds.kernel(m)] / min(row.values())) for m, row in times.items())

    limits = (0, *sorted(times))
    return min((Thresholds(gemv, flat) for gemv in limits for flat in limits if flat >= gemv), key=loss)


def check(x: torch.Tensor, weight: PackedWeight) -> None:
    expected = x.float() @ weight.matrix.float().t()
    for kernel in LinearKernel:
        error = (ops.linear(x, weight, kernel=kernel).float() - expected).norm() / expected.norm()
        assert error <= 0.01, (kernel, error)


def measure(n: int, k: int) -> Times:
    weights = []
    for _ in range(num_sets(2 * n * k)):
        values = torch.randn(n, k, dtype=torch.bfloat16, device="cuda")
        weights.append(PackedWeight(values.view(torch.uint8).flatten(), n, k, PackedFormat.ROWS_BFLOAT16))
    times: Times = {}
    for m in ROWS:
        x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
        out = x.new_empty(m, n)
        check(x, weights[0])
        candidates = {
            kernel: lambda i, kernel=kernel: ops.linear(x, weights[i], out=out, kernel=kernel) for kernel in LinearKernel
        }
        times[m] = {kernel: statistics.median(values) for kernel, values in interleave(candidates, len(weights)).items()}
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="NxK")
    parser.add_argument("--write", action="store_true", help=f"keep the thresholds in {TABLE.name}")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("tune_linear measures a GPU, and torch sees none")
    table = json.loads(TABLE.read_text())
    device = table.setdefault(torch.cuda.get_device_name(), {})
    for shape in arguments.shapes:
        n, k = (int(size) for size in shape.split("x"))
        times = measure(n, k)
        chosen = best_thresholds(times)
        print(f"{shape}: gemv up to {chosen.gemv_rows} rows, flat up to {chosen.flat_rows}")
        for m, row in times.items():
            print(f"  m={m}: " + ", ".join(f"{kernel} {seconds_text(seconds)}" for kernel, seconds in row.items()))
        device[shape] = {"gemv_rows": chosen.gemv_rows, "flat_rows": chosen.flat_rows}
    if arguments.write:
        TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
