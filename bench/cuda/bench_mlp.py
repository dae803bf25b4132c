"""Llama 3 8B's MLP branch on a GPU: gate and residual in the linears' epilogues, against ops of their own

From the residual stream to the residual stream, norm included; bfloat16 activations. Weights come from memory. On integer weights
the epilogue writes floats, so that down begins with a launch that quantises its rows; the activation's own op writes integers.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from bench.cuda.timing import DEVICE, check, interleave, num_sets
from bench.cuda.weights import DISTINCT_ROWS, random_weight
from bench.harness import Report
from bench.roofs import Work
from tilestream import ops
from tilestream.layers.linear import Linear
from tilestream.layers.mlp import GatedMlp
from tilestream.layers.norm import RmsNorm
from tilestream.ops import PackedFormat, PackedWeight, QuantisedRows

HIDDEN, INTERMEDIATE = 4096, 14336
FORMATS = [PackedFormat.U4G32S, PackedFormat.U4G128S, PackedFormat.ROWS_BFLOAT16]


class Branch:
    """residual += mlp(norm(residual)) with some of a model's weights. Random rows serve as gate and up in either order."""

    def __init__(self, m: int, gate_up: PackedWeight, down: PackedWeight, *, epilogues: bool) -> None:
        self.norm = RmsNorm(torch.ones(HIDDEN, device=DEVICE), 1e-5, has_sum=epilogues)
        self.mlp = GatedMlp(Linear(gate_up, gate="silu" if epilogues else None), Linear(down), "silu")
        empty = lambda *shape: torch.zeros(shape, dtype=torch.bfloat16, device=DEVICE)  # noqa: E731
        x, residual = empty(m, HIDDEN), torch.randn(m, HIDDEN, device=DEVICE).bfloat16()
        is_quantised = gate_up.format.is_quantised
        self.int8 = QuantisedRows.empty(m, HIDDEN, device=DEVICE) if is_quantised else None
        self.buf = SimpleNamespace(
            x=x, residual=residual, branch=(residual, residual) if epilogues else (x, None), mlp_rows=m,
            gate_up=empty(m, 2 * INTERMEDIATE), act=empty(m, INTERMEDIATE),
            act_int8=QuantisedRows.empty(m, INTERMEDIATE, device=DEVICE) if is_quantised else None,
        )  # fmt: skip

    def run(self) -> None:
        self.mlp(self.norm.add(self.buf.x, self.buf.residual, self.int8), self.buf)

    def check(self, gate_up_rows: torch.Tensor, down_rows: torch.Tensor) -> None:
        """Against torch, with the values that the weights' rows repeat."""
        self.buf.x.zero_()
        before = self.buf.residual.float()
        self.run()
        rows = ops.rms_norm(before, self.norm.weight, eps=1e-5) @ gate_up_rows.t()
        inner = rows.repeat(1, 2 * INTERMEDIATE // DISTINCT_ROWS)
        gate, up = (inner[:, ::2], inner[:, 1::2]) if self.norm.has_sum else inner.chunk(2, 1)
        want = (torch.nn.functional.silu(gate) * up @ down_rows.t()).repeat(1, HIDDEN // DISTINCT_ROWS)
        got = self.buf.residual.float() - before if self.norm.has_sum else self.buf.x.float()
        check(got, want, 0.06)  # int8 rows, twice


@pytest.mark.parametrize("m", [1, 16, 64, 512, 2048])
@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_mlp_branch(format: PackedFormat, m: int, report: Report) -> None:
    (gate_up, gate_up_rows), (down, down_rows) = (
        random_weight(n, k, format, DEVICE) for n, k in ((2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE))
    )
    weight_bytes = gate_up.data.nbytes + down.data.nbytes
    sets = num_sets(weight_bytes)
    candidates = {}
    for name, epilogues in (("ours", True), ("ops of their own", False)):
        Branch(m, gate_up, down, epilogues=epilogues).check(gate_up_rows, down_rows)
        branches = [
            Branch(m, *(PackedWeight(w.data.clone(), w.n, w.k, w.format) for w in (gate_up, down)), epilogues=epilogues)
            for _ in range(sets)
        ]
        candidates[name] = lambda i, branches=branches: branches[i].run()
    arithmetic = "int8" if format.is_quantised else "bf16"
    work = Work(weight_bytes + 2 * m * HIDDEN * 2, 6 * m * HIDDEN * INTERMEDIATE, arithmetic, memory="copy")
    report.add(f"MLP branch {format.name}", f"m={m}", interleave(candidates, sets), work=work)
