"""GGUF files of every architecture: logits against transformers on the same dequantised weights."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from tilestream.models import load_model

from .conftest import build_hf_model
from .gguf_files import quantise_model, write_model
from .helpers import PagedRunner

BOUND = 1e-3  # issue 2: logits within 1e-3 in fp32


def _mixed(name: str) -> Type:
    """A mixture such as Q4_K_M's: v differs from q and k, up from gate."""
    if "attn_v" in name or "ffn_up" in name:
        return Type.Q8_0
    return Type.Q4_1 if "blk" in name else Type.F16


CASES = {
    "llama": ("llama", "llama", {"rope.freq_base": 10000.0}),
    "llama-biases": ("llama-biases", "llama", {"rope.freq_base": 10000.0, "rope.dimension_count": 64}),
    "mistral": ("mistral", "llama", {"rope.freq_base": 10000.0, "attention.sliding_window": 21}),
    "llama-linear-rope": ("llama-linear-rope", "llama",
                          {"rope.freq_base": 10000.0, "rope.scaling.type": "linear", "rope.scaling.factor": 2.0}),
    "qwen2-yarn": ("qwen2", "qwen2", {"rope.freq_base": 10000.0, "rope.scaling.type": "yarn",
                                      "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64}),
    "qwen3": ("qwen3", "qwen3", {"rope.freq_base": 10000.0}),
    "gemma3": ("gemma3-deep", "gemma3", {"rope.freq_base": 1e6, "rope.scaling.type": "linear",
                                         "rope.scaling.factor": 8.0, "attention.sliding_window": 19}),
}


def _check(model, path, tmp_path) -> None:
    tokens = torch.randint(2, 258, (60,), generator=torch.Generator().manual_seed(7)).tolist()
    with torch.no_grad():
        expected = model(torch.tensor([tokens]), use_cache=False).logits[0]
    runner = PagedRunner(load_model(path, dtype="float32").model)
    got = torch.cat([runner.step({0: tokens[:50]}), *(runner.step({0: [token]}) for token in tokens[50:])])
    assert (got - expected).abs().max() <= BOUND


@pytest.mark.parametrize("kind", [lambda name: Type.F32, lambda name: Type.Q8_0, _mixed], ids=["f32", "q8_0", "mixed"])
@pytest.mark.parametrize("case", CASES)
def test_logits_match_transformers(case, kind, tmp_path):
    hf_name, architecture, fields = CASES[case]
    model = build_hf_model(hf_name)
    path = write_model(tmp_path / "model.gguf", architecture, model, kind=kind, fields=fields)
    quantise_model(architecture, model, kind)
    _check(model, path, tmp_path)


def test_llama3_frequency_factors(tmp_path):
    model = build_hf_model("llama-llama3-rope")
    plain = 5e5 ** (-np.arange(0, 64, 2) / 64)
    factors = (plain / model.model.rotary_emb.inv_freq.double().numpy()).astype(np.float32)
    path = write_model(tmp_path / "model.gguf", "llama", model, fields={"rope.freq_base": 5e5},
                       extra={"rope_freqs.weight": factors})
    _check(model, path, tmp_path)


def test_quantised_weights_stay_quantised(tmp_path):
    model = build_hf_model("llama")
    path = write_model(tmp_path / "model.gguf", "llama", model, kind=lambda name: Type.Q4_0,
                       fields={"rope.freq_base": 10000.0})
    ours = load_model(path).model
    assert {part.weight.format.name for layer in ours.layers
            for part in (layer.attention.qkv, layer.attention.o, layer.mlp.gate_up, layer.mlp.down)} == {"U4G32S"}
    assert ours.lm_head.weight is ours.embedding.weight  # tied: one copy
    quantised = copy.deepcopy(model)
    quantise_model("llama", quantised, lambda name: Type.Q4_0)
    tokens = list(range(2, 42))
    with torch.no_grad():
        expected = quantised(torch.tensor([tokens]), use_cache=False).logits[0]
    got = PagedRunner(ours).step({0: tokens})
    # Only activations are rounded, to 1/127 of a group's largest: a few per cent of the logits' spread.
    assert (got - expected).std() <= 0.05 * expected.std()
