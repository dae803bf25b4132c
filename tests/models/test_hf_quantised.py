"""Checkpoints of GPTQ, AWQ and compressed-tensors: their integers, as their own tools store them, and whole models of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tilestream import LLM, SamplingParams
from tilestream.layers.embedding import Embedding
from tilestream.models.errors import ModelLoadError
from tilestream.models.hf_checkpoint import HfCheckpoint
from tilestream.models.hf_quantised import quantisation_of
from tilestream.models.weights import WeightLoader
from tilestream.ops import PackedFormat

AWQ = {"quant_method": "awq", "bits": 4, "version": "gemm"}


def words(fields: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Consecutive fields of `dim` in int32 words, the first in the lowest bits."""
    parts = fields.long().unflatten(dim, (-1, 32 // bits)).unbind(dim + 1)
    packed = sum(part << bits * i for i, part in enumerate(parts))
    return torch.where(packed >= 2**31, packed - 2**32, packed).int()


def compressed(format: str, bits: int, symmetric: bool) -> dict:
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": {"weights": weights}}}


class Stored:
    """A random quantised weight [n, k], and its tensors as the tool of `config` writes them."""

    def __init__(self, n: int, k: int, group: int, config: dict, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        method, num_groups = config["quant_method"], -(-k // group)
        bits = config["bits"] if method != "compressed-tensors" else config["config_groups"]["group_0"]["weights"]["num_bits"]
        symmetric = method == "compressed-tensors" and config["config_groups"]["group_0"]["weights"]["symmetric"]
        self.q = torch.randint(2**bits, (n, k), generator=draw)
        self.zeros = torch.randint(2**bits, (n, num_groups), generator=draw)
        if symmetric:
            self.zeros.fill_(2 ** (bits - 1))
        self.scale = ((0.5 + torch.rand(n, num_groups, generator=draw)) / 2**bits / k**0.5).half()
        self.values = (self.q - self.zeros.repeat_interleave(group, 1)[:, :k]) * self.scale.float().repeat_interleave(group, 1)[
            :, :k
        ]
        zeros, scales = self.zeros, self.scale
        if method == "gptq":
            later = 0 if config.get("checkpoint_format") == "gptq_v2" else 1
            self.tensors = {
                "qweight": words(self.q.T, bits, 0),
                "qzeros": words((zeros.T - later) % 2**bits, bits, 1),
                "scales": scales.T,
                "g_idx": (torch.arange(k) // group).int(),
            }
        elif method == "awq":
            order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
            shuffled = [t.T.unflatten(1, (-1, 8))[..., order].flatten(1) for t in (self.q, zeros)]
            self.tensors = {"qweight": words(shuffled[0], 4, 1), "qzeros": words(shuffled[1], 4, 1), "scales": scales.T}
        elif config["format"] == "pack-quantized":
            self.tensors = {"weight_packed": words(self.q, bits, 1), "weight_scale": scales, "weight_shape": torch.tensor([n, k])}
            if not symmetric:
                self.tensors["weight_zero_point"] = words(zeros, bits, 0)
        else:
            self.tensors = {"weight": (self.q - 128).to(torch.int8), "weight_scale": scales}
            if not symmetric:
                self.tensors["weight_zero_point"] = (zeros - 128).to(torch.int8)


CASES = [
    ({"quant_method": "gptq", "bits": 4}, 128, PackedFormat.U4G128),
    ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}, 32, PackedFormat.U4G32),
    ({"quant_method": "gptq", "bits": 8}, 64, PackedFormat.U8G32),
    (AWQ, 128, PackedFormat.U4G128),
    (AWQ, 64, PackedFormat.U4G32),
    (compressed("pack-quantized", 4, True), 128, PackedFormat.U4G128S),
    (compressed("pack-quantized", 4, True), 32, PackedFormat.U4G32S),
    (compressed("pack-quantized", 4, False), 128, PackedFormat.U4G128),
    (compressed("pack-quantized", 8, True), 384, PackedFormat.U8G128S),
    (compressed("int-quantized", 8, True), 384, PackedFormat.U8G128S),
    (compressed("int-quantized", 8, False), 384, PackedFormat.U8G32),
]


@pytest.mark.parametrize(
    ("config", "group", "format"), CASES, ids=lambda v: v.get("format", v["quant_method"]) if isinstance(v, dict) else None
)
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_weights(config: dict, group: int, format: PackedFormat, dtype: str, tmp_path: Path) -> None:
    n, k = 64, 384
    parts = [Stored(n, k, group, config, seed) for seed in (0, 1)]
    tensors = {"model.embed_tokens.weight": torch.zeros(2, k)}
    for name, part in zip(("gate_proj", "up_proj"), parts, strict=True):
        tensors |= {f"model.layers.0.mlp.{name}.{kind}": t.contiguous() for kind, t in part.tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")

    class Shape:
        family = "llama"

    loader = WeightLoader(HfCheckpoint(tmp_path, Shape, quantisation_of(config, "config.json")), dtype, None, 0)
    linear = loader.stacked(["blk.0.ffn_gate", "blk.0.ffn_up"], [n, n], k)
    assert linear.weight.format == (format if dtype == "auto" else PackedFormat.FLOAT32)
    loader.check_all_used()
    got = torch.empty(2 * n, k)
    Embedding(linear.weight)(torch.arange(2 * n), got)
    want = torch.cat([part.values for part in parts])
    # A zero is stored as float16: an error of its last bit.
    most_zero = max(float((part.zeros * part.scale.float()).max()) for part in parts)
    assert float((got - want).abs().max()) <= 2.0**-11 * most_zero + 1e-6 * float(want.abs().max())
    gated = loader.gated(["blk.0.ffn_gate", "blk.0.ffn_up"], n, k, "silu")
    assert (gated.gate, gated.n, gated.weight.format) == ("silu", n, linear.weight.format)
    in_turn = torch.empty(2 * n, k)
    Embedding(gated.weight)(torch.arange(2 * n), in_turn)
    assert torch.equal(torch.cat([in_turn[::2], in_turn[1::2]]), got)


def quantise_layers(path: Path, config: dict, group: int) -> dict[str, torch.Tensor]:
    """Puts quantised weights into the linear layers of a saved model; returns the weights that these stand for."""
    tensors, values = load_file(path / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        stored = Stored(*tensors[name].shape, group, config, seed=len(values))
        values[name] = 5 * stored.values
        stored.tensors.update({kind: 5 * t for kind, t in stored.tensors.items() if "scale" in kind})
        del tensors[name]
        tensors |= {name.removesuffix("weight") + kind: t.contiguous() for kind, t in stored.tensors.items()}
    save_file(tensors, path / "model.safetensors")
    fields = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(fields | {"quantization_config": config}))
    return values


@pytest.mark.parametrize(("config", "group"), [(AWQ, 64), (compressed("int-quantized", 8, True), 512)], ids=["awq", "w8a8"])
def test_models_run(hf_model: Callable, config: dict, group: int, tmp_path: Path) -> None:
    """Dequantised on the way in, the model gives the tokens of the model with those weights; as it is, it runs."""
    quantised, plain = tmp_path / "quantised", tmp_path / "plain"
    for folder in (quantised, plain):
        shutil.copytree(hf_model("llama")[1], folder)
    values = quantise_layers(quantised, config, group)
    save_file(load_file(plain / "model.safetensors") | values, plain / "model.safetensors")
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    want = LLM(plain, dtype="float32").generate("Hello", params)[0].token_ids
    assert LLM(quantised, dtype="float32").generate("Hello", params)[0].token_ids == want
    assert len(LLM(quantised).generate("Hello", params)[0].token_ids) == 8


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "exl2"}, "quantization_config has quant_method 'exl2'; supported: gptq, awq, compressed-tensors"),
        ({"quant_method": "gptq", "bits": 3}, "bits is 3; supported: 4, 8"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version is 'gemv'; supported: gemm"),
        (
            {"quant_method": "compressed-tensors", "format": "float-quantized"},
            "format is 'float-quantized'; supported: pack-quantized, int-quantized",
        ),
        ({"quant_method": "compressed-tensors", "format": "int-quantized"}, "config_groups has 0 groups; supported: one"),
        ([], "quantization_config is list; it must be an object"),
    ],
)
def test_bad_configs(config: dict, message: str) -> None:
    with pytest.raises(ModelLoadError, match=f"config.json: {message}"):
        quantisation_of(config, "config.json")


def test_channels_in_another_order(tmp_path: Path) -> None:
    config = {"quant_method": "gptq", "bits": 4}
    stored = Stored(32, 128, 32, config)
    stored.tensors["g_idx"] = stored.tensors["g_idx"].flip(0)
    with pytest.raises(ModelLoadError, match="channels in another order"):
        quantisation_of(config, "config.json").unpack(stored.tensors)
