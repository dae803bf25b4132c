"""Rows and columns of a weight, read alone, are those of the whole one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import save_file
from tilestream.layers.embedding import Embedding
from tilestream.layers.linear import Linear
from tilestream.models import load_model
from tilestream.models.checkpoint import QuantisedTensor, RawTensor
from tilestream.models.errors import ModelLoadError
from tilestream.models.fmpq_checkpoint import FmpqCheckpoint
from tilestream.models.weights import WeightLoader
from tilestream.ops import PackedFormat

from tests.models.test_hf_quantised import Stored, loader_of, named
from tests.models.test_weights import K, N, _blocks

ROWS, HALVES = range(32, 67), [range(0, 256), range(256, K)]


class Held:
    """A checkpoint of one tensor, w."""

    path = Path("model.gguf")

    def __init__(self, tensor: RawTensor | QuantisedTensor, bias: torch.Tensor | None = None) -> None:
        self._tensor, self._bias, self.tensor_names = tensor, bias, ["w.weight"]

    def has_tensor(self, name: str) -> bool:
        return name == "w.weight" or (name == "w.bias" and self._bias is not None)

    def tensor(self, name: str) -> RawTensor | QuantisedTensor:
        return self._tensor

    def vector(self, name: str) -> torch.Tensor:
        return self._bias


def values_of(linear: Linear) -> torch.Tensor:
    values = torch.empty(linear.n, linear.k)
    Embedding(linear.weight)(torch.arange(linear.n), values)
    return values


def part(tensor: RawTensor | QuantisedTensor, dtype: str = "auto", **cut: range) -> Linear:
    return WeightLoader(Held(tensor), dtype, None, 0, act_bits="4").linear("w", tensor.num_rows, tensor.num_columns, **cut)


def quantised(group: int, bits: int, *, with_zero: bool = True, k4: int = 0) -> QuantisedTensor:
    draw = torch.Generator().manual_seed(group)
    num_groups = -(-K // group)
    scale = (torch.rand(N, num_groups, generator=draw) + 0.5).half().float()
    zero = torch.randn(N, num_groups, generator=draw).half().float() if with_zero else None
    return QuantisedTensor(torch.randint(2**bits, (N, K), generator=draw, dtype=torch.uint8), scale, zero, group, bits, k4)


@pytest.mark.parametrize(
    "kind", [Type.F32, Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q8_0, Type.Q4_K, Type.Q6_K], ids=lambda kind: kind.name
)
def test_gguf_blocks(kind: Type) -> None:
    tensor = RawTensor(kind, torch.from_numpy(_blocks(kind)).view(torch.uint8).view(N, -1), K)
    whole = values_of(part(tensor))
    assert torch.equal(values_of(part(tensor, rows=ROWS)), whole[32:67])
    for columns in HALVES:
        assert torch.equal(values_of(part(tensor, columns=columns)), whole[:, columns.start : columns.stop])
    assert torch.equal(values_of(part(tensor, rows=ROWS, columns=HALVES[1])), whole[32:67, 256:])
    for columns in (range(0, 160), range(160, 480), range(480, K)):  # within a K-quant's blocks
        assert torch.equal(values_of(part(tensor, rows=ROWS, columns=columns)), whole[32:67, columns.start : columns.stop])
        assert torch.equal(tensor.part(ROWS, columns).values, tensor.values[32:67, columns.start : columns.stop])
    again = tensor.part(ROWS, range(96, 480)).part(range(3), range(192, 320))
    assert torch.equal(again.values, tensor.values[32:35, 288:416])


@pytest.mark.parametrize(
    ("group", "bits", "with_zero", "cut", "format"),
    [
        (128, 4, True, 256, PackedFormat.U4G128),
        (128, 4, True, 192, PackedFormat.U4G32),  # the cut falls inside a group
        (128, 4, False, 384, PackedFormat.U4G128S),
        (64, 4, True, 160, PackedFormat.U4G32),
        (32, 8, False, 96, PackedFormat.U8G32S),
        (K, 8, False, 160, PackedFormat.U8G128S),  # one group
        (K, 4, True, 128, PackedFormat.U4G128),
    ],
)
def test_quantised_tensors(group: int, bits: int, with_zero: bool, cut: int, format: PackedFormat) -> None:
    tensor = quantised(group, bits, with_zero=with_zero)
    whole = values_of(part(tensor))
    parts = [part(tensor, columns=range(0, cut)), part(tensor, columns=range(cut, K))]
    assert parts[1].weight.format == format
    assert torch.equal(torch.cat([values_of(part) for part in parts], 1), whole)
    assert torch.equal(values_of(part(tensor, rows=ROWS)), whole[32:67])
    plain = [values_of(part(tensor, "float32", rows=ROWS, columns=columns)) for columns in (range(0, cut), range(cut, K))]
    assert torch.equal(torch.cat(plain, 1), tensor.values[32:67])


@pytest.mark.parametrize(
    ("columns", "k4"), [((0, 512), 384), ((0, 192), 128), ((192, 512), 128), ((384, 512), 0), ((256, 512), 128)]
)
def test_channels_for_int4_activations(columns: tuple[int, int], k4: int) -> None:
    assert part(quantised(128, 4, k4=384), columns=range(*columns)).k4 == k4


@pytest.mark.parametrize("kind", [Type.Q4_K, Type.Q8_0], ids=lambda kind: kind.name)
def test_a_cut_through_blocks(kind: Type) -> None:
    tensor = RawTensor(kind, torch.from_numpy(_blocks(kind)), K)
    with pytest.raises(
        ModelLoadError,
        match=rf"part of tensor w.weight is columns 144 to 512, which cuts through its blocks of {tensor.block}; "
        "use fewer ranks, or dtype bfloat16",
    ):
        part(tensor, columns=range(144, K))
    want = torch.from_numpy(gguf.quants.dequantize(_blocks(kind), kind))[32:67, 144:]
    assert torch.equal(values_of(part(tensor, "bfloat16", rows=ROWS, columns=range(144, K))), want.bfloat16().float())


def test_biases_come_once() -> None:
    tensor = RawTensor(Type.F32, torch.randn(N, K).view(torch.uint8), K)
    bias = torch.randn(N)
    loader = WeightLoader(Held(tensor, bias), "auto", None, 0)
    assert torch.equal(loader.linear("w", N, K, columns=HALVES[0]).bias, bias)
    assert loader.linear("w", N, K, columns=HALVES[1]).bias is None
    assert torch.equal(loader.linear("w", N, K, rows=ROWS).bias, bias[32:67])
    rows = [range(0, 32), range(32, 64)]
    stacked = loader.stacked(["w", "w"], [N, N], K, rows=rows)
    assert torch.equal(stacked.bias, bias[:64])
    assert torch.equal(values_of(stacked), tensor.values[:64])
    gated = loader.gated(["w", "w"], N, K, "silu", rows=ROWS)
    assert torch.equal(gated.bias, bias[32:67].repeat_interleave(2))
    values = torch.empty(2 * gated.n, K)
    Embedding(gated.weight)(torch.arange(2 * gated.n), values)
    assert torch.equal(values, tensor.values[32:67].repeat_interleave(2, 0))


@pytest.mark.parametrize(("bits", "with_zero"), [(4, True), (4, False), (8, False)])
def test_gate_and_up_of_a_rank(bits: int, with_zero: bool) -> None:
    """Their integers, scales and zeros in turn."""
    tensor = quantised(64, bits, with_zero=with_zero)
    gated = WeightLoader(Held(tensor), "auto", None, 0).gated(["w", "w"], N, K, "gelu_tanh", rows=ROWS)
    assert (gated.gate, gated.n) == ("gelu_tanh", len(ROWS))
    values = torch.empty(2 * gated.n, K)
    Embedding(gated.weight)(torch.arange(2 * gated.n), values)
    assert torch.equal(values, values_of(part(tensor))[32:67].repeat_interleave(2, 0))


def test_roundings_of_keys_are_cut_by_heads(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(3)
    stored = {
        "offset": torch.randn(4, 16, generator=draw),
        "order": torch.stack([torch.randperm(16, generator=draw) for _ in range(4)]).int(),
        "feedback": torch.randn(4, 16, 16, generator=draw).half().triu(1),
    }
    save_file({f"blk.0.attn_k.{part}": tensor for part, tensor in stored.items()}, tmp_path / "model.safetensors")
    loader = WeightLoader(FmpqCheckpoint(tmp_path, {"version": 1, "group_size": 32}), "auto", None, 0)
    with pytest.raises(ModelLoadError, match="3 tensors belong to no known part"):
        loader.check_all_used()
    rounding = loader.key_rounding("blk.0.attn_k", 4, 16, heads=range(1, 3))
    assert torch.equal(rounding.offset, stored["offset"][1:3])
    assert torch.equal(rounding.order, stored["order"][1:3])
    assert torch.equal(rounding.feedback, stored["feedback"][1:3].float())
    loader.check_all_used()
    assert loader.key_rounding("blk.1.attn_k", 4, 16, heads=range(1, 3)) is None


def test_a_model_for_too_many_ranks() -> None:
    with pytest.raises(ModelLoadError, match=r"Q4_1.gguf: rank 0 of 10: this model, of 9 query heads, runs on 1 to 8 ranks"):
        load_model("smollm2-135m-instruct", connect=lambda config: SimpleNamespace(rank=0, world_size=10))


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize("group", [48, 96, 128, 160, 256, 576])
def test_groups_that_do_not_divide_the_columns(group: int, dtype: str, shuffled: bool, tmp_path: Path) -> None:
    """A GPTQ weight of 576 columns: the last group is short, cuts fall inside groups, or columns of a group lie anywhere."""
    config = {"quant_method": "gptq", "bits": 4, "group_size": group}
    loader = loader_of(tmp_path, config, named(Stored(64, 576, group, config, shuffled=shuffled)), dtype)
    whole = values_of(loader.linear("blk.0.ffn_down", 64, 576))
    for bounds in ((0, 192, 576), (0, 128, 320, 576), (0, 288, 576)):
        columns = [range(*bounds[i : i + 2]) for i in range(len(bounds) - 1)]
        parts = [values_of(loader.linear("blk.0.ffn_down", 64, 576, columns=part)) for part in columns]
        assert torch.equal(torch.cat(parts, 1), whole)
    assert torch.equal(values_of(loader.linear("blk.0.ffn_down", 64, 576, rows=range(32, 64))), whole[32:])


def test_progress_is_of_the_checkpoint() -> None:
    """Whatever part of it a rank takes."""
    tensor, steps = RawTensor(Type.F32, torch.randn(N, K).view(torch.uint8), K), []
    loader = WeightLoader(Held(tensor), "auto", lambda done, total: steps.append((done, total)), 8 * N * K)
    loader.linear("w", N, K, rows=ROWS)
    loader.linear("w", N, K, columns=HALVES[0])
    assert steps == [(4 * N * K, 8 * N * K), (8 * N * K, 8 * N * K)]
