"""A gated MLP on quantised rows: the gate in the linear of gate and up, against an op of its own

From the norm's integers to floats. Weights are cycled as in bench_linear.py. The two ops write gate and up side by side; the
activation reads both and writes integers. With the gate in the linear, half as much is written, as floats, and quantised on
the way into the last linear.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bench.bench_linear import CYCLED_BYTES, random_weight
from bench.harness import Report, interleave
from bench.roofs import Work
from tilestream import ops
from tilestream.layers.linear import Linear
from tilestream.layers.mlp import GatedMlp
from tilestream.layers.scratch import CPU_MLP_ROWS
from tilestream.ops import PackedFormat, PackedWeight, QuantisedRows

SHAPES = {"SmolLM2-135M": (576, 1536), "Llama 3 8B": (4096, 14336)}  # hidden, intermediate


def buffers(m: int, hidden: int, inner: int) -> SimpleNamespace:
    """What of a Scratch an MLP uses."""
    rows = -(-m // -(-m // CPU_MLP_ROWS))
    x = torch.empty(m, hidden)
    return SimpleNamespace(
        x=x, branch=(x, None), mlp_rows=rows, gate_up=torch.empty(rows, 2 * inner), act=torch.empty(rows, inner),
        act_int8=QuantisedRows.empty(rows, inner),
    )  # fmt: skip


def clone(weight: PackedWeight) -> PackedWeight:
    return replace(weight, data=weight.data.clone())


@pytest.mark.parametrize("m", [1, 8, 64, 512])
@pytest.mark.parametrize("format", [PackedFormat.U4G32S, PackedFormat.U4G128S], ids=lambda f: f.name)
@pytest.mark.parametrize("model", SHAPES)
def test_gated_mlp(model: str, format: PackedFormat, m: int, report: Report) -> None:
    torch.manual_seed(0)
    hidden, inner = SHAPES[model]
    gate_up, down = random_weight(2 * inner, hidden, format), random_weight(hidden, inner, format)
    moved = gate_up.data.numel() + down.data.numel()
    x, buf = ops.quantise(torch.randn(m, hidden)), buffers(m, hidden, inner)
    num_copies = -(-CYCLED_BYTES // moved) if m <= 8 else 1
    pairs = [(gate_up, down)] + [(clone(gate_up), clone(down)) for _ in range(num_copies - 1)]
    # One memory for both: where large pages lie makes a tenth of the time.
    turns = itertools.cycle([[GatedMlp(Linear(a, gate=gate), Linear(b), "silu") for gate in ("silu", None)] for a, b in pairs])
    candidates = {"ours": lambda: next(turns)[0](x, buf), "two ops": lambda: next(turns)[1](x, buf)}
    work = Work(moved + x.q.nbytes + buf.x.nbytes, 6 * m * hidden * inner, "int8", working_set=CYCLED_BYTES if m <= 8 else moved)
    report.add(f"gated MLP {format.name}", f"{model}, m={m}", interleave(candidates, rounds=25), work=work)
