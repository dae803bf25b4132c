"""Gates and residual additions in the linears' epilogues: the bits of a model that has ops of their own for them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gguf import GGMLQuantizationType as Type

from tests.models.conftest import build_hf_model
from tests.models.gguf_files import write_model
from tests.models.helpers import PagedRunner
from tilestream import ops
from tilestream.layers.linear import Linear
from tilestream.layers.mlp import GatedMlp
from tilestream.models import build, load_model
from tilestream.models.llama import LlamaModel
from tilestream.models.weights import WeightLoader
from tilestream.ops import PackedFormat, QuantisedRows

PROMPTS = [list(range(2, 152)), [7, 5, 3]]  # of many rows, and of few


def load_both(path: Path, monkeypatch: pytest.MonkeyPatch, **options: str) -> tuple[LlamaModel, LlamaModel]:
    """With epilogues where it may have them, and without."""
    fused = load_model(path, **options).model
    with monkeypatch.context() as patch:
        patch.setattr(WeightLoader, "gated", lambda self, names, n, k, activation, *, rows=None: self.stacked(
            names, [n, n], k, rows=[rows or range(n)] * 2))  # fmt: skip
        patch.setattr(build, "_branches_add", lambda config, communicator: False)
        return fused, load_model(path, **options).model


def assert_same_bits(fused: LlamaModel, plain: LlamaModel) -> None:
    for prompt in PROMPTS:
        runners = [PagedRunner(model) for model in (fused, plain)]
        for chunk in (prompt, [9]):
            got, want = (runner.step({0: chunk}) for runner in runners)
            assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["llama", "llama-biases", "llama-odd-sizes", "qwen2", "gemma3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_families(name: str, dtype: str, hf_model, monkeypatch: pytest.MonkeyPatch) -> None:
    fused, plain = load_both(hf_model(name)[1], monkeypatch, dtype=dtype)
    gates = {(model.layers[0].mlp.gate_up.gate, model.norm.has_sum) for model in (fused, plain)}
    assert gates == {("gelu_tanh" if name == "gemma3" else "silu", name != "gemma3"), (None, False)}
    assert_same_bits(fused, plain)


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q4_1, Type.Q8_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("act_bits", ["8", "16"])
def test_quantised_weights(kind: Type, act_bits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_model(
        tmp_path / "model.gguf", "llama", build_hf_model("llama"), kind=lambda name: kind, fields={"rope.freq_base": 1e4}
    )
    fused, plain = load_both(path, monkeypatch, act_bits=act_bits)
    assert fused.layers[0].mlp.gate_up.gate == "silu"
    assert_same_bits(fused, plain)


def test_gate_and_up_of_different_types_stay_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_hf_model("llama")
    kind = lambda name: Type.Q8_0 if "up" in name else Type.Q4_0  # noqa: E731
    path = write_model(tmp_path / "model.gguf", "llama", model, kind=kind, fields={"rope.freq_base": 1e4})
    fused, plain = load_both(path, monkeypatch)
    assert [part.weight.format.name for part in fused.layers[0].mlp.gate_up.parts] == ["U4G32S", "U8G32S"]
    assert_same_bits(fused, plain)


@pytest.mark.parametrize("k4", [0, 128])
def test_int4_channels_into_down(k4: int) -> None:
    """Five rows, three at a time."""
    hidden, inner, format = 64, 256, PackedFormat.U4G128S
    gate, up, down = (
        torch.randint(16, shape, dtype=torch.uint8) for shape in ((inner, hidden), (inner, hidden), (hidden, inner))
    )
    x, results = torch.randn(5, hidden), []
    pack = lambda q: ops.pack_weight(q=q, scale=torch.full((q.size(0), -(-q.size(1) // 128)), 2.0**-5), format=format)  # noqa: E731
    for rows, name in ((ops.interleave_gate_up(gate, up), "silu"), (torch.cat([gate, up]), None)):
        mlp = GatedMlp(Linear(pack(rows), gate=name), Linear(pack(down), k4=k4), "silu")
        out = torch.full((5, hidden), float("nan"))
        mlp(
            ops.quantise(x),
            SimpleNamespace(
                branch=(out, None),
                mlp_rows=3,
                gate_up=torch.empty(3, 2 * inner),
                act=torch.empty(3, inner),
                act_int8=QuantisedRows.empty(3, inner),
            ),
        )
        results.append(out)
    assert torch.equal(*results)
