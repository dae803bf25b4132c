"""Checkpoints of GPTQ, AWQ and compressed-tensors: their integers, as their own tools store them, and whole models of them."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tilestream import LLM, SamplingParams
from tilestream.layers.embedding import Embedding
from tilestream.layers.linear import Linear
from tilestream.models import load_model
from tilestream.models.errors import ModelLoadError
from tilestream.models.hf_checkpoint import HfCheckpoint
from tilestream.models.hf_quantised import quantisation_of
from tilestream.models.weights import WeightLoader
from tilestream.ops import PackedFormat
from tilestream.quantize.run import quantize

from tests.models.helpers import PagedRunner

AWQ = {"quant_method": "awq", "bits": 4, "version": "gemm"}


def words(fields: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Consecutive fields of `dim` in int32 words, the first in the lowest bits."""
    parts = fields.long().unflatten(dim, (-1, 32 // bits)).unbind(dim + 1)
    packed = sum(part << bits * i for i, part in enumerate(parts))
    return torch.where(packed >= 2**31, packed - 2**32, packed).int()


def compressed(format: str, bits: int, symmetric: bool) -> dict:
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": {"weights": weights}}}


def with_group(config: dict, group: int | None) -> dict:
    """`config`, which says what its groups are."""
    if config["quant_method"] != "compressed-tensors":
        return config | {"group_size": group}
    weights = config["config_groups"]["group_0"]["weights"] | {"group_size": group, "strategy": "group" if group else "channel"}
    return config | {"config_groups": {"group_0": {"weights": weights}}}


class Stored:
    """A random quantised weight [n, k], and its tensors as the tool of `config` writes them.

    With `shuffled`, columns of one group lie anywhere, as GPTQ's desc_act has them. `values`: float64.
    """

    def __init__(self, n: int, k: int, group: int, config: dict, seed: int = 0, *, shuffled: bool = False) -> None:
        draw = torch.Generator().manual_seed(seed)
        method, num_groups = config["quant_method"], -(-k // group)
        bits = config["bits"] if method != "compressed-tensors" else config["config_groups"]["group_0"]["weights"]["num_bits"]
        symmetric = method == "compressed-tensors" and config["config_groups"]["group_0"]["weights"]["symmetric"]
        self.q = torch.randint(2**bits, (n, k), generator=draw)
        self.zeros = torch.randint(2**bits, (n, num_groups), generator=draw)
        if symmetric:
            self.zeros.fill_(2 ** (bits - 1))
        self.scale = ((0.5 + torch.rand(n, num_groups, generator=draw)) / 2**bits / k**0.5).half()
        of_column = (torch.randperm(k, generator=draw) if shuffled else torch.arange(k)) // group
        self.values = (self.q - self.zeros[:, of_column]) * self.scale.double()[:, of_column]
        zeros, scales = self.zeros, self.scale
        if method == "gptq":
            later = 0 if config.get("checkpoint_format") == "gptq_v2" else 1
            self.tensors = {
                "qweight": words(self.q.T, bits, 0),
                "qzeros": words((zeros.T - later) % 2**bits, bits, 1),
                "scales": scales.T,
                "g_idx": of_column.int(),
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


def loader_of(path: Path, config: dict, tensors: dict[str, torch.Tensor], dtype: str = "auto") -> WeightLoader:
    """Reads a checkpoint that is saved at `path` for it."""
    save_file({"model.embed_tokens.weight": torch.zeros(2, 32)} | {name: t.contiguous() for name, t in tensors.items()},
              path / "model.safetensors")

    class Shape:
        family = "llama"

    return WeightLoader(HfCheckpoint(path, Shape, quantisation_of(config, "config.json")), dtype, None, 0)


def named(stored: Stored, module: str = "model.layers.0.mlp.down_proj") -> dict[str, torch.Tensor]:
    return {f"{module}.{kind}": tensor for kind, tensor in stored.tensors.items()}


def values_of(linear: Linear) -> torch.Tensor:
    values = torch.empty(linear.weight.n, linear.k)
    Embedding(linear.weight)(torch.arange(linear.weight.n), values)
    return values


# config, group (None: one), format
CASES = [
    ({"quant_method": "gptq", "bits": 4}, 128, PackedFormat.U4G128),
    ({"quant_method": "gptq", "bits": 4}, 256, PackedFormat.U4G128),
    ({"quant_method": "gptq", "bits": 4}, 160, PackedFormat.U4G32),
    ({"quant_method": "gptq", "bits": 4}, -1, PackedFormat.U4G128),
    ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}, 32, PackedFormat.U4G32),
    ({"quant_method": "gptq", "bits": 8}, 64, PackedFormat.U8G32),
    ({"quant_method": "gptq", "bits": 4}, 48, PackedFormat.BFLOAT16),
    (AWQ, 128, PackedFormat.U4G128),
    (AWQ, 64, PackedFormat.U4G32),
    (compressed("pack-quantized", 4, True), 128, PackedFormat.U4G128S),
    (compressed("pack-quantized", 4, True), 32, PackedFormat.U4G32S),
    (compressed("pack-quantized", 4, True), 16, PackedFormat.BFLOAT16),
    (compressed("pack-quantized", 4, False), 128, PackedFormat.U4G128),
    (compressed("pack-quantized", 8, True), None, PackedFormat.U8G128S),
    (compressed("int-quantized", 8, True), None, PackedFormat.U8G128S),
    (compressed("int-quantized", 8, False), None, PackedFormat.U8G32),
]


@pytest.mark.parametrize(
    ("config", "group", "format"), CASES, ids=lambda v: v.get("format", v["quant_method"]) if isinstance(v, dict) else None
)
@pytest.mark.parametrize("k", [384, 576])
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_weights(config: dict, group: int | None, format: PackedFormat, k: int, dtype: str, tmp_path: Path) -> None:
    n, config = 64, with_group(config, group)
    parts = [Stored(n, k, group if group and group > 0 else k, config, seed) for seed in (0, 1)]
    tensors = named(parts[0], "model.layers.0.mlp.gate_proj") | named(parts[1], "model.layers.0.mlp.up_proj")
    loader = loader_of(tmp_path, config, tensors, dtype)
    linear = loader.stacked(["blk.0.ffn_gate", "blk.0.ffn_up"], [n, n], k)
    assert linear.weight.format == (format if dtype == "auto" else PackedFormat.FLOAT32)
    loader.check_all_used()
    got, want = values_of(linear), torch.cat([part.values for part in parts])
    # A zero is stored as float16: an error of its last bit. bfloat16 has 8 bits.
    most_zero = max(float((part.zeros * part.scale.double()).max()) for part in parts)
    bound = 2.0**-8 * want.abs() if linear.weight.format == PackedFormat.BFLOAT16 else torch.tensor(2.0**-11 * most_zero)
    assert bool(((got - want).abs() <= bound + 1e-6 * want.abs().max()).all())
    gated = loader.gated(["blk.0.ffn_gate", "blk.0.ffn_up"], n, k, "silu")
    assert (gated.gate, gated.n, gated.weight.format) == ("silu", n, linear.weight.format)
    in_turn = values_of(gated)
    assert torch.equal(torch.cat([in_turn[::2], in_turn[1::2]]), got)


@pytest.mark.parametrize(
    ("method", "group", "key"),
    [("gptq", 192, None), ("gptq", 256, "group_size"), ("awq", 128, None), ("awq", 192, "q_group_size")],
)
@pytest.mark.parametrize("k", [384, 576])
def test_where_the_group_is_said(method: str, group: int, key: str | None, k: int, tmp_path: Path) -> None:
    """In g_idx, by an older name, or nowhere: then it is a power of two."""
    config = {"quant_method": method, "bits": 4} | ({} if key is None else {key: group})
    stored = Stored(64, k, group, config)
    got = values_of(loader_of(tmp_path, config, named(stored), "float32").linear("blk.0.ffn_down", 64, k))
    assert torch.equal(got, stored.values.float())


@pytest.mark.parametrize(
    ("config", "group", "message"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 64}, 128, "there are 5 groups of 576 columns, and group_size is 64"),
        (AWQ | {"group_size": -1}, 128, "there are 5 groups of 576 columns, and group_size is -1"),
        (AWQ, 96, "there are 6 groups of 576 columns, and the config has no group_size, and no power of two fits"),
    ],
)
def test_groups_that_do_not_fit(config: dict, group: int, message: str, tmp_path: Path) -> None:
    loader = loader_of(tmp_path, config, named(Stored(64, 576, group, config)))
    with pytest.raises(ModelLoadError, match=rf"the tensors of blk\.0\.ffn_down do not fit each other: {message}"):
        loader.linear("blk.0.ffn_down", 64, 576)


@pytest.mark.parametrize("key", ["group_size", "q_group_size"])
@pytest.mark.parametrize("group", [0, -2, True, "128", 64.5])
def test_bad_groups(key: str, group: object) -> None:
    with pytest.raises(ModelLoadError, match=f"config.json: {key} is {group!r}; it must be a positive integer, or -1 for one"):
        quantisation_of(AWQ | {key: group}, "config.json")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("k", [384, 576])
def test_groups_of_scattered_columns(bits: int, k: int, tmp_path: Path) -> None:
    """GPTQ with desc_act: floats, whole or cut anywhere."""
    config = {"quant_method": "gptq", "bits": bits, "group_size": 128, "desc_act": True}
    stored = Stored(64, k, 128, config, shuffled=True)
    for dtype, format in (("auto", PackedFormat.BFLOAT16), ("float32", PackedFormat.FLOAT32)):
        loader = loader_of(tmp_path, config, named(stored), dtype)
        linear = loader.linear("blk.0.ffn_down", 64, k)
        want = stored.values.bfloat16().float() if dtype == "auto" else stored.values.float()
        assert linear.weight.format == format
        assert torch.equal(values_of(linear), want)
        for columns in (range(0, 140), range(140, k)):
            part = loader.linear("blk.0.ffn_down", 64, k, rows=range(32, 64), columns=columns)
            assert torch.equal(values_of(part), want[32:, columns.start : columns.stop])
        assert loader.checkpoint.as_floats == {"blk.0.ffn_down.weight"}


def test_whole_groups_in_another_order(tmp_path: Path) -> None:
    config = {"quant_method": "gptq", "bits": 4, "group_size": 64}
    stored = Stored(32, 384, 64, config)
    stored.tensors["g_idx"] = stored.tensors["g_idx"].flip(0)
    loader = loader_of(tmp_path, config, named(stored))
    linear = loader.linear("blk.0.ffn_down", 32, 384)
    assert linear.weight.format == PackedFormat.U4G32 and not loader.checkpoint.as_floats
    groups = 5 - torch.arange(384) // 64
    want = (stored.q - stored.zeros[:, groups]) * stored.scale.double()[:, groups]
    assert float((values_of(linear) - want).abs().max()) <= 2.0**-11 * float((stored.zeros * stored.scale.double()).max())


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (torch.arange(384) // 128 + 1, r"g_idx is \[384\] with 1 to 3; it must be \[384\] with 0 to 2"),
        (torch.arange(384) // 128 - 1, r"g_idx is \[384\] with -1 to 1; it must be \[384\] with 0 to 2"),
        (torch.arange(383) // 128, r"g_idx is \[383\] with 0 to 2; it must be \[384\] with 0 to 2"),
        (torch.arange(0), r"g_idx is \[0\]; it must be \[384\] with 0 to 2"),
    ],
)
@pytest.mark.parametrize("said", [{}, {"group_size": 128}])
def test_bad_orders(order: torch.Tensor, message: str, said: dict, tmp_path: Path) -> None:
    config = {"quant_method": "gptq", "bits": 4} | said
    stored = Stored(32, 384, 128, config)
    stored.tensors["g_idx"] = order.int()
    with pytest.raises(ModelLoadError, match=f"the tensors of blk.0.ffn_down do not fit each other: {message}"):
        loader_of(tmp_path, config, named(stored)).linear("blk.0.ffn_down", 32, 384)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": None}, r"the tensor blk\.0\.ffn_down\.scales \(in GGUF naming\) is missing"),
        ({"scales": torch.ones(2, 32)}, r"codes are \[32, 384\], scales torch.float32 \[32, 2\], zeros \[32, 3\]; scales"),
        ({"scales": torch.ones(3, 32).int()}, r"scales torch.int32 \[32, 3\], zeros \[32, 3\]; scales must be floats"),
        ({"qzeros": torch.zeros(3, 3).int()}, r"zeros \[24, 3\]; .*scales and zeros alike, \[32, groups\]"),
    ],
)
def test_tensors_that_do_not_fit(change: dict, message: str, tmp_path: Path) -> None:
    config = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    stored = Stored(32, 384, 128, config)
    stored.tensors = {kind: t for kind, t in (stored.tensors | change).items() if t is not None}
    with pytest.raises(ModelLoadError, match=message):
        loader_of(tmp_path, config, named(stored)).linear("blk.0.ffn_down", 32, 384)


def quantise_layers(
    path: Path, config: dict, group: int, *, lm_head: bool = False, shuffled: bool = False
) -> dict[str, torch.Tensor]:
    """Puts quantised weights into the linear layers of a saved model; returns the weights that these stand for."""
    tensors, values = load_file(path / "model.safetensors"), {}
    kinds = ("_proj.weight", "lm_head.weight") if lm_head else "_proj.weight"
    for name in [name for name in tensors if name.endswith(kinds)]:
        stored = Stored(*tensors[name].shape, group, config, seed=len(values), shuffled=shuffled)
        values[name] = (4 * stored.values).float()
        stored.tensors.update({kind: 4 * t for kind, t in stored.tensors.items() if "scale" in kind})
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


def logits(path: Path, dtype: str) -> torch.Tensor:
    return PagedRunner(load_model(path, dtype=dtype).model).step({0: list(range(2, 30))})


@pytest.mark.parametrize(
    ("config", "shuffled"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 64, "lm_head": True}, False),
        ({"quant_method": "gptq", "bits": 4, "group_size": 64, "lm_head": True, "desc_act": True}, True),
        (with_group(compressed("pack-quantized", 4, True), 64), False),
        (with_group(compressed("pack-quantized", 4, False), 64), False),
        (with_group(compressed("int-quantized", 8, True), 64), False),
    ],
    ids=["gptq", "desc_act", "packed", "packed-zeros", "int8"],
)
def test_output_projection(
    hf_model: Callable, config: dict, shuffled: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Quantised too, it is read; weights that became floats are said once."""
    quantised, plain = tmp_path / "quantised", tmp_path / "plain"
    for folder in (quantised, plain):
        shutil.copytree(hf_model("llama-untied")[1], folder)
    values = quantise_layers(quantised, config, 64, lm_head=True, shuffled=shuffled)
    save_file(load_file(plain / "model.safetensors") | values, plain / "model.safetensors")
    with caplog.at_level(logging.WARNING, "tilestream"):
        torch.testing.assert_close(logits(quantised, "float32"), logits(plain, "float32"))
        assert not caplog.records
        loaded = load_model(quantised)
    assert loaded.model.lm_head.weight.format.is_quantised == (not shuffled)
    assert bool(logits(quantised, "auto").isfinite().all())
    said = [record.getMessage() for record in caplog.records[:1]]
    assert len(said) == (1 if shuffled else 0)
    if shuffled:
        assert f"{quantised}: {len(values)} quantised weights run as bfloat16" in said[0]
        assert said[0].endswith("one is blk.0.attn_k.weight")
        torch.testing.assert_close(logits(quantised, "auto"), logits(plain, "bfloat16"))


@pytest.mark.parametrize("file", ["model.safetensors", "gptq_model-4bit-64g.safetensors"])
@pytest.mark.parametrize(
    ("name", "config", "said"),
    [
        ("quantize_config.json", {"quant_method": "gptq", "bits": 4}, {"bits": 4, "group_size": 64, "desc_act": False}),
        ("quant_config.json", AWQ, {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}),
    ],
)
def test_old_directories(hf_model: Callable, name: str, config: dict, said: dict, file: str, tmp_path: Path) -> None:
    """What their tools wrote beside a config.json that says nothing."""
    new, old = tmp_path / "new", tmp_path / "old"
    shutil.copytree(hf_model("llama")[1], new)
    quantise_layers(new, config | {"group_size": 64}, 64)
    shutil.copytree(new, old)
    fields = json.loads((old / "config.json").read_text())
    del fields["quantization_config"]
    (old / "config.json").write_text(json.dumps(fields))
    (old / name).write_text(json.dumps(said))
    (old / "model.safetensors").rename(old / file)
    assert torch.equal(logits(old, "float32"), logits(new, "float32"))
    with pytest.raises(ModelLoadError, match="quantised already"):
        quantize(str(old), "text", tmp_path / "out")
    (old / name).write_text(json.dumps(said | {"bits": 3, "w_bit": 3}))
    with pytest.raises(ModelLoadError, match=f"{name}: bits is 3; supported: 4"):
        load_model(old)
    (old / name).write_text("[]")
    with pytest.raises(ModelLoadError, match=f"{name}: quantization_config is list; it must be an object"):
        load_model(old)
