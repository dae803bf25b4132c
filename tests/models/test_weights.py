"""Every GGUF block type, through the reader and pack_gguf and back through the embedding op."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from tilestream.layers.embedding import Embedding
from tilestream.models.gguf_reader import GgufFile
from tilestream.models.weights import WeightLoader
from tilestream.ops import PackedFormat
from tilestream.placement import Placement

from .gguf_files import finish

N, K = 70, 512  # more than two panels of 32, two super-blocks of 256
HALF_EPS = 2.0**-11  # rounding of a scale to float16


def _blocks(kind: Type) -> np.ndarray:
    """Random blocks with tame scales. The gguf package cannot quantise to K types, so their bytes are drawn."""
    rng = np.random.default_rng(int(kind))
    if kind in (Type.F32, Type.F16, Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q8_0):
        return gguf.quants.quantize(rng.standard_normal((N, K), dtype=np.float32), kind)
    block_bytes = gguf.GGML_QUANT_SIZES[kind][1]
    blocks = rng.integers(0, 256, (N, K // 256, block_bytes), dtype=np.uint8)
    scales = rng.uniform(0.005, 0.01, (N, K // 256, 2)).astype(np.float16)
    if kind == Type.Q6_K:
        blocks[..., 208:210] = scales[..., :1].view(np.uint8)
    else:
        blocks[..., :4] = scales.view(np.uint8)  # d, dmin
    return blocks.reshape(N, -1)


def _bound(kind: Type, blocks: np.ndarray, own_format: bool) -> np.ndarray | float:
    """Greatest error that the packed format may add, for each weight."""
    if not own_format or kind in (Type.F32, Type.Q4_0, Type.Q4_1, Type.Q8_0):
        return 1e-6  # the same integers and scales; only the order of float32 operations may differ
    if kind in (Type.F16, Type.BF16):
        return 4.0 * 2.0**-8  # bfloat16 of values up to 4
    if kind == Type.Q6_K:
        raw = blocks.reshape(N, K // 256, 210)
        d = raw[..., 208:210].copy().view(np.float16).astype(np.float64)
        largest = np.abs(raw[..., 192:208].view(np.int8).astype(np.float64) * d).reshape(N, K // 32, 2).max(-1)
        # 64 levels become 256: half a step of a quarter of the scale, and float16 rounding of it.
        return np.repeat(largest * (0.5 / 4 + 32 * HALF_EPS) * 1.02, 32, axis=1)
    levels = 15 if kind == Type.Q4_K else 31
    return HALF_EPS * 0.01 * 63 * (levels + 1) * 1.01


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q8_0, Type.Q4_K, Type.Q5_K,
                                  Type.Q6_K], ids=lambda kind: kind.name)
def test_round_trip(kind, dtype, tmp_path):
    blocks = _blocks(kind)
    writer = gguf.GGUFWriter(tmp_path / "w.gguf", "llama")
    writer.add_tensor("token_embd.weight", blocks, raw_dtype=kind)
    finish(writer)
    file = GgufFile(tmp_path / "w.gguf")
    linear = WeightLoader(file, dtype, None, 0).linear("token_embd", N, K)
    assert linear.weight.data.data_ptr() % 64 == 0
    got = torch.empty(N, K)
    Embedding(linear.weight)(torch.arange(N), got)
    expected = gguf.quants.dequantize(blocks, kind).astype(np.float64)
    if dtype == "bfloat16":
        expected = torch.from_numpy(expected).float().bfloat16().double().numpy()
    error = np.abs(got.numpy() - expected)
    bound = _bound(kind, blocks, dtype == "auto")
    assert (error <= bound).all(), (error.max(), np.max(bound))


def test_bfloat16_weights_are_row_major_beside_bfloat16_activations(tmp_path):
    blocks = _blocks(Type.BF16)
    writer = gguf.GGUFWriter(tmp_path / "w.gguf", "llama")
    writer.add_tensor("token_embd.weight", blocks, raw_dtype=Type.BF16)
    finish(writer)
    gpu_like = Placement(torch.device("cpu"), torch.bfloat16, blocked_kv=False, asynchronous=True)
    weight = WeightLoader(GgufFile(tmp_path / "w.gguf"), "auto", None, 0, gpu_like).linear("token_embd", N, K).weight
    assert weight.format == PackedFormat.ROWS_BFLOAT16
    assert np.array_equal(weight.matrix.float().numpy(), gguf.quants.dequantize(blocks, Type.BF16))


def test_stacked_weights_equal_separate_ones(tmp_path):
    rng = np.random.default_rng(0)
    sizes = {"a": (64, Type.Q4_1), "b": (32, Type.Q4_1), "c": (48, Type.Q4_1), "d": (32, Type.Q8_0), "e": (32, Type.Q8_0)}
    writer = gguf.GGUFWriter(tmp_path / "w.gguf", "llama")
    for name, (rows, kind) in sizes.items():
        values = rng.standard_normal((rows, 96), dtype=np.float32)
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.add_tensor("b.bias", rng.standard_normal(32, dtype=np.float32))
    finish(writer)
    loader = WeightLoader(GgufFile(tmp_path / "w.gguf"), "auto", None, 0)
    stacked = loader.stacked(list(sizes), [rows for rows, _ in sizes.values()], 96)
    assert [part.n for part in stacked.parts] == [96, 48, 64]
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(1))
    out = torch.full((5, stacked.n), float("nan"))
    stacked(x, out)
    begin = 0
    for name, (rows, _) in sizes.items():
        alone = torch.empty(5, rows)
        loader.linear(name, rows, 96)(x, alone)
        assert torch.equal(out[:, begin : begin + rows], alone)
        begin += rows
