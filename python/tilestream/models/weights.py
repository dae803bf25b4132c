"""Checkpoint tensors -> packed weights, checked against the shapes that the configuration implies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields

import torch
from gguf import GGMLQuantizationType

from tilestream.layers.linear import Linear, StackedLinear
from tilestream.models.checkpoint import Checkpoint, QuantisedTensor, RawTensor
from tilestream.models.errors import ModelLoadError
from tilestream.models.fmpq_checkpoint import FmpqCheckpoint
from tilestream.models.hf_checkpoint import HfCheckpoint
from tilestream.ops.append_kv import KeyRounding
from tilestream.ops.linear import PackedFormat, PackedWeight, interleave_gate_up, pack_weight
from tilestream.ops.memory import Arena
from tilestream.placement import CPU, Placement

Progress = Callable[[int, int], None]  # bytes done, bytes in all

DTYPES = ("auto", "float32", "bfloat16")
ACT_BITS = ("auto", "4", "8", "16")
# The packed format that keeps a GGUF type's own integers and scales (csrc/include/tilestream/linear.h).
_OWN_FORMATS = {
    GGMLQuantizationType.F32: PackedFormat.FLOAT32,
    GGMLQuantizationType.F16: PackedFormat.BFLOAT16,
    GGMLQuantizationType.BF16: PackedFormat.BFLOAT16,
    GGMLQuantizationType.Q4_0: PackedFormat.U4G32S,
    GGMLQuantizationType.Q4_1: PackedFormat.U4G32,
    GGMLQuantizationType.Q8_0: PackedFormat.U8G32S,
    GGMLQuantizationType.Q4_K: PackedFormat.U4G32,
    GGMLQuantizationType.Q5_K: PackedFormat.U8G32,
    GGMLQuantizationType.Q6_K: PackedFormat.U8G32S,
}
_PANEL_COLUMNS = 32  # kPanelColumns of linear.h: where one tensor of a shared weight may follow another


class WeightLoader:
    """Reads each tensor once and packs it.

    Args:
        checkpoint: where tensors come from.
        dtype: "auto" keeps each tensor's own format, but for a Hugging Face checkpoint's floats, which become bfloat16;
            "float32" and "bfloat16" dequantise to that type.
        progress: called with (bytes done, bytes in all), or None.
        total_bytes: size of the checkpoint, for `progress`.
        placement: where the model runs.
        act_bits: one of ACT_BITS, as load_model has it.
    Attributes:
        packed_bytes: of all weight matrices so far.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: str,
        progress: Progress | None,
        total_bytes: int,
        placement: Placement = CPU,
        act_bits: str = "auto",
    ) -> None:
        self.checkpoint, self._progress, self._total_bytes = checkpoint, progress, total_bytes
        self.placement = placement
        self._format = {"float32": PackedFormat.FLOAT32, "bfloat16": PackedFormat.BFLOAT16}.get(dtype)
        self._arena = Arena() if placement.device.type == "cpu" else None
        self._int4 = act_bits == "4" or (act_bits == "auto" and placement.has_int4)
        self._act_bits = 16 if act_bits == "16" else 8
        self._used: set[str] = set()
        self.packed_bytes = 0
        self._done_bytes = 0

    def has(self, name: str) -> bool:
        return self.checkpoint.has_tensor(name)

    def vector(self, name: str, size: int) -> torch.Tensor:
        """A float32 vector of `size` elements."""
        values = self.checkpoint.vector(name)
        if values.numel() != size:
            raise ModelLoadError(
                f"{self.checkpoint.path}: tensor {name} has {values.numel()} elements; expected {size}"
            )
        self._used.add(name)
        return values.to(self.placement.device)

    def linear(
        self, name: str, n: int, k: int, *, rows: range | None = None, columns: range | None = None
    ) -> Linear:
        """The weight `<name>.weight` [n, k] with its optional `<name>.bias`; or the part of it that a rank has.

        Ranks that have columns each give a part of one sum, so only that with the first ones has the bias.
        """
        raw, bias = self._raw(name, n, k, rows or range(n), columns or range(k)), self._bias(name, n, rows or range(n))
        return self._pack([raw], [None if columns and columns.start > 0 else bias])

    def stacked(
        self, names: Sequence[str], sizes: Sequence[int], k: int, *, rows: Sequence[range] | None = None
    ) -> Linear | StackedLinear:
        """Weights of one input, or the rows of them that a rank has, side by side in one packed weight where formats and
        sizes allow it.

        Neighbours share a weight when they pack to the same format and each fills whole panels; otherwise (a
        mixed quantisation such as Q4_K_M, where v has more bits than q and k) they stay separate parts.
        """
        rows = rows or [range(n) for n in sizes]
        raws = [self._raw(name, n, k, part, range(k)) for name, n, part in zip(names, sizes, rows, strict=True)]
        biases = [self._bias(name, n, part) for name, n, part in zip(names, sizes, rows, strict=True)]
        return self._stack(raws, biases)

    def gated(
        self, names: Sequence[str], n: int, k: int, activation: str, *, rows: range | None = None
    ) -> Linear | StackedLinear:
        """Gate and up, or a rank's rows of them, in one packed weight that gates by itself; as `stacked` has them where they
        lie in different ways."""
        rows = rows or range(n)
        gate, up = (self._raw(name, n, k, rows, range(k)) for name in names)
        biases = [self._bias(name, n, rows) for name in names]
        if _kind(gate) != _kind(up):
            return self._stack([gate, up], biases)
        if any(bias is not None for bias in biases):
            zeros = torch.zeros(len(rows), device=self.placement.device)
            biases = [interleave_gate_up(*(zeros if bias is None else bias for bias in biases))]
        return self._pack([gate.interleaved(up)], biases[:1], gate=activation)

    def _stack(
        self, raws: Sequence[RawTensor | QuantisedTensor], biases: Sequence[torch.Tensor | None]
    ) -> Linear | StackedLinear:
        groups: list[list[int]] = []
        for i, raw in enumerate(raws):
            joins = (
                groups
                and self._packed_format(raw) == self._packed_format(raws[i - 1])
                and _group(raw) == _group(raws[i - 1])
                and raw.num_rows % _PANEL_COLUMNS == 0
                and all(raws[j].num_rows % _PANEL_COLUMNS == 0 for j in groups[-1])
            )
            if joins:
                groups[-1].append(i)
            else:
                groups.append([i])
        parts = [self._pack([raws[i] for i in group], [biases[i] for i in group]) for group in groups]
        return parts[0] if len(parts) == 1 else StackedLinear(parts)

    def key_rounding(self, name: str, num_kv_heads: int, head_dim: int, *, heads: range) -> KeyRounding | None:
        """How these heads of what the projection `name` gives are rounded to 4 bits, where the checkpoint says."""
        if not isinstance(self.checkpoint, FmpqCheckpoint):
            return None
        rounding = self.checkpoint.key_rounding(name, num_kv_heads, head_dim)
        if rounding is None:
            return None
        parts = [field.name for field in fields(rounding)]
        self._used.update(f"{name}.{part}" for part in parts)
        return KeyRounding(*(getattr(rounding, part)[heads.start : heads.stop].to(self.placement.device) for part in parts))

    def _packed_format(self, raw: RawTensor | QuantisedTensor) -> PackedFormat:
        if isinstance(raw, QuantisedTensor):
            own = raw.packed_format
        else:
            own = PackedFormat.BFLOAT16 if isinstance(self.checkpoint, HfCheckpoint) else _OWN_FORMATS[raw.type]
        format = own if self._format is None else self._format
        # A GPU's activations are bfloat16, and such weights are best left as cuBLAS takes them too.
        as_rows = self.placement.dtype == torch.bfloat16 and raw.num_columns % 8 == 0
        return PackedFormat.ROWS_BFLOAT16 if format == PackedFormat.BFLOAT16 and as_rows else format

    def _raw(self, name: str, n: int, k: int, rows: range, columns: range) -> RawTensor | QuantisedTensor:
        raw = self.checkpoint.tensor(name + ".weight")
        if (raw.num_rows, raw.num_columns) != (n, k):
            raise ModelLoadError(
                f"{self.checkpoint.path}: tensor {name}.weight has shape [{raw.num_rows}, {raw.num_columns}]; "
                f"expected [{n}, {k}]"
            )
        self._used.add(name + ".weight")
        self._advance(raw.num_bytes)
        if len(columns) < k and (columns.start % raw.block or columns.stop % raw.block):
            if self._format is None:
                raise ModelLoadError(
                    f"{self.checkpoint.path}: this rank's part of tensor {name}.weight is columns {columns.start} to "
                    f"{columns.stop}, which cuts through its blocks of {raw.block}; use fewer ranks, or dtype bfloat16"
                )
            raw, rows = _as_floats(raw.part(rows, range(k))), range(len(rows))
        return raw if len(rows) == n and len(columns) == k else raw.part(rows, columns)

    @property
    def down_hadamard(self) -> bool:
        """Whether what the MLPs' `down` reads is to be multiplied by Hadamard matrices."""
        return isinstance(self.checkpoint, FmpqCheckpoint) and self.checkpoint.down_hadamard

    def _bias(self, name: str, n: int, rows: range) -> torch.Tensor | None:
        name += ".bias"
        return self.vector(name, n)[rows.start : rows.stop] if self.has(name) else None

    def _pack(
        self, raws: Sequence[RawTensor | QuantisedTensor], biases: Sequence[torch.Tensor | None], gate: str | None = None
    ) -> Linear:
        """One packed weight of tensors that share a format; all but a lone one fill whole panels."""
        format = self._packed_format(raws[0])
        n, k = sum(raw.num_rows for raw in raws), raws[0].num_columns
        packed = PackedWeight.empty(n, k, format, arena=self._arena)
        if isinstance(raws[0], QuantisedTensor):
            _pack_quantised(raws, packed)
        else:
            row = 0
            for raw in raws:
                torch.ops.tilestream.pack_gguf(
                    raw.rows, int(raw.type), packed.data, n=raw.num_rows, k=k, panel_begin=row // _PANEL_COLUMNS,
                    format=int(format), skip=raw.skip,
                )
                row += raw.num_rows
        self.packed_bytes += packed.data.numel()
        # A GPU's tensor cores multiply INT4 by weights in groups of 128 alone (load_model says so).
        int4 = self._int4 and (format.group_size == 128 or self.placement.device.type == "cpu")
        k4 = raws[0].k4 if isinstance(raws[0], QuantisedTensor) and format.is_quantised and int4 else 0
        act_bits = self._act_bits if format.is_quantised else 8
        bias = None
        if any(part is not None for part in biases):
            device = self.placement.device
            zeros = (torch.zeros(raw.num_rows, device=device) for raw in raws)
            bias = torch.cat([zero if part is None else part for part, zero in zip(biases, zeros, strict=True)])
        return Linear(packed.to(self.placement.device), bias, self.placement.linear_kernel, k4=k4, act_bits=act_bits, gate=gate)

    def _advance(self, num_bytes: int) -> None:
        self._done_bytes += num_bytes
        if self._progress is not None:
            self._progress(min(self._done_bytes, self._total_bytes), self._total_bytes)

    def check_all_used(self) -> None:
        """Raises ModelLoadError if a layer has tensors that the decoder did not take: its output would be wrong."""
        unused = sorted(
            name for name in self.checkpoint.tensor_names
            if name.startswith("blk.") and name not in self._used and not name.endswith("rotary_emb.inv_freq")
        )
        if unused:
            raise ModelLoadError(
                f"{self.checkpoint.path}: {len(unused)} tensors belong to no known part of this model family: "
                f"{', '.join(unused[:5])}"
            )


def _as_floats(raw: RawTensor | QuantisedTensor) -> RawTensor:
    return RawTensor(GGMLQuantizationType.F32, raw.values.view(torch.uint8), raw.num_columns)


def _kind(raw: RawTensor | QuantisedTensor) -> tuple:
    """What tensors have in common whose rows can alternate in one."""
    return (raw.type,) if isinstance(raw, RawTensor) else (raw.packed_format, raw.group, raw.k4)


def _group(raw: RawTensor | QuantisedTensor) -> int:
    return raw.group if isinstance(raw, QuantisedTensor) else 0


def _pack_quantised(parts: Sequence[QuantisedTensor], packed: PackedWeight) -> None:
    """Packs weights of one input, one below the other, that share a group and a format."""
    if not packed.format.is_quantised:
        pack_weight(torch.cat([part.values for part in parts]), out=packed)
        return
    first = parts[0]
    unit = packed.format.group_size
    pack_weight(
        q=torch.cat([part.q for part in parts]),
        scale=torch.cat([part.scale for part in parts]),
        zero=None if first.zero is None else torch.cat([part.zero for part in parts]),
        group=-(-first.group // unit) * unit,
        out=packed,
    )
