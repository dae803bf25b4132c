"""Weights that `tilestream quantize` wrote: codes of 4 and 8 bits in safetensors (docs/quantize.md has the format)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from tilestream.layers.linear import Linear
from tilestream.models.errors import ModelLoadError
from tilestream.models.weights import Progress
from tilestream.ops.linear import PackedFormat, PackedWeight
from tilestream.ops.memory import Arena
from tilestream.placement import CPU, Placement

QUANT_METHOD = "tilestream"
VERSION = 1
FILE_NAME = "model.safetensors"
GROUP_SIZES = (32, 128)
# Which entry of k4 is a linear's: that of the first of those that read its input.
_INPUT_OF_STEM = {"attn_q": "qkv", "attn_output": "o", "ffn_gate": "gate_up", "ffn_down": "down"}
_FORMATS = {32: PackedFormat.U4G32, 128: PackedFormat.U4G128}
_TABLE_FORMAT, _TABLE_GROUP = PackedFormat.U8G32S, 32
ACT_BITS = ("auto", "4", "8")


def is_quantised(values: Any) -> bool:
    """Whether a parsed config.json is of a directory that `tilestream quantize` wrote."""
    quantisation = values.get("quantization_config") if isinstance(values, Mapping) else None
    return isinstance(quantisation, Mapping) and quantisation.get("quant_method") == QUANT_METHOD


def pack_nibbles(q: torch.Tensor) -> torch.Tensor:
    """[n, k] codes 0..15 -> [n, k / 2] bytes; in 32 codes byte j has code j in its low half, j + 16 in its high one."""
    low, high = q.unflatten(1, (-1, 2, 16)).unbind(2)
    return (low | high << 4).flatten(1)


def unpack_nibbles(data: torch.Tensor) -> torch.Tensor:
    """The inverse of pack_nibbles."""
    groups = data.unflatten(1, (-1, 1, 16))
    return torch.cat([groups & 15, groups >> 4], 2).flatten(1)


def uses_int4(act_bits: str, placement: Placement) -> bool:
    """Whether INT4 blocks run as such: "auto" says so where tensor cores multiply INT4, sm_80 to sm_89.

    Raises:
        ValueError: act_bits is not one of ACT_BITS.
    """
    if act_bits not in ACT_BITS:
        raise ValueError(f"act_bits is {act_bits!r}; allowed: {', '.join(ACT_BITS)}")
    if act_bits != "auto":
        return act_bits == "4"
    return placement.device.type == "cuda" and torch.cuda.get_device_capability(placement.device)[0] == 8


class QuantisedWeights:
    """Reads and packs tensors as build_model asks for them; stands where WeightLoader does.

    Args:
        path: the directory.
        values: its parsed config.json.
        act_bits: one of ACT_BITS.
        progress: called with (bytes done, bytes in all), or None.
        placement: where the model runs.
    Raises:
        ModelLoadError: a missing, damaged or foreign file.
    """

    def __init__(
        self, path: Path, values: Mapping[str, Any], act_bits: str, progress: Progress | None, placement: Placement = CPU
    ) -> None:
        self.placement, self._path, self._progress = placement, path / FILE_NAME, progress
        quantisation = values["quantization_config"]
        if quantisation.get("version") != VERSION or quantisation.get("group_size") not in GROUP_SIZES:
            raise ModelLoadError(
                f"{path / 'config.json'}: quantization_config has version {quantisation.get('version')!r} and group_size "
                f"{quantisation.get('group_size')!r}; this build reads version {VERSION} and groups of {GROUP_SIZES}"
            )
        self._group, self._k4 = quantisation["group_size"], quantisation.get("k4")
        self._int4 = uses_int4(act_bits, placement)
        self._arena = Arena() if placement.device.type == "cpu" else None
        try:
            self._file = safe_open(self._path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ModelLoadError(f"{self._path}: not a readable safetensors file: {error}") from error
        self._names, self._used = set(self._file.keys()), set()
        self._done_bytes, self._total_bytes = 0, self._path.stat().st_size

    def has(self, name: str) -> bool:
        return name in self._names

    def vector(self, name: str, size: int) -> torch.Tensor:
        """A float32 vector of `size` elements."""
        return self._read(name, (size,), torch.float32).to(self.placement.device)

    def linear(self, name: str, n: int, k: int) -> Linear:
        """The weight of codes `<name>.codes` [n, k], with its optional `<name>.bias`."""
        return self.stacked([name], [n], k)

    def stacked(self, names: Sequence[str], sizes: Sequence[int], k: int) -> Linear:
        """Weights of one input, side by side in one packed weight."""
        table = not names[0].startswith("blk.")
        group = _TABLE_GROUP if table else self._group
        parts = [self._codes(name, n, k, group, table) for name, n in zip(names, sizes, strict=True)]
        q, scale, zero = (None if None in column else torch.cat(column) for column in zip(*parts, strict=True))
        packed = PackedWeight.empty(len(q), k, _TABLE_FORMAT if table else _FORMATS[group], arena=self._arena)
        torch.ops.tilestream.pack_weight(
            None, q, scale, zero, group, packed.data, n=packed.n, k=k, format=int(packed.format)
        )
        bias = None
        if any(self.has(name + ".bias") for name in names):
            bias = torch.cat([
                self.vector(name + ".bias", n) if self.has(name + ".bias") else torch.zeros(n, device=self.placement.device)
                for name, n in zip(names, sizes, strict=True)
            ])  # fmt: skip
        k4 = 0 if table or not self._int4 else self._k4_of(names[0], k)
        return Linear(packed.to(self.placement.device), bias, self.placement.linear_kernel, k4=k4)

    def _codes(
        self, name: str, n: int, k: int, group: int, table: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        width, groups = k if table else k // 2, -(-k // group)
        data = self._read(name + ".codes", (n, width), torch.uint8)
        scale = self._read(name + ".scale", (n, groups), torch.float16).float()
        if table:
            return data, scale, None
        return unpack_nibbles(data), scale, self._read(name + ".zero", (n, groups), torch.float16).float()

    def _k4_of(self, name: str, k: int) -> int:
        _, layer, stem = name.split(".")
        try:
            k4 = self._k4[int(layer)][_INPUT_OF_STEM[stem]]
        except (TypeError, KeyError, IndexError) as error:
            raise ModelLoadError(f"{self._path.parent / 'config.json'}: quantization_config has no k4 for {name}") from error
        if not isinstance(k4, int) or not 0 <= k4 <= k or k4 % 128:
            raise ModelLoadError(
                f"{self._path.parent / 'config.json'}: k4 of {name} is {k4!r}; allowed: multiples of 128 from 0 to {k}"
            )
        return k4

    def _read(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if name not in self._names:
            raise ModelLoadError(f"{self._path}: the tensor {name} is missing")
        try:
            tensor = self._file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelLoadError(f"{self._path}: tensor {name} is not readable: {error}") from error
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ModelLoadError(
                f"{self._path}: tensor {name} is {tensor.dtype} {list(tensor.shape)}; expected {dtype} {list(shape)}"
            )
        self._used.add(name)
        self._done_bytes += tensor.numel() * tensor.itemsize
        if self._progress is not None:
            self._progress(self._done_bytes, self._total_bytes)
        return tensor

    def check_all_used(self) -> None:
        """Raises ModelLoadError if the file has tensors that the decoder did not take: its output would be wrong."""
        unused = sorted(self._names - self._used)
        if unused:
            raise ModelLoadError(
                f"{self._path}: {len(unused)} tensors belong to no known part of this model family: {', '.join(unused[:5])}"
            )
