"""Directories that `tilestream quantize` wrote: codes of 4 and 8 bits in safetensors (docs/quantize.md has the format)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from tilestream.models.checkpoint import QuantisedTensor
from tilestream.models.errors import ModelLoadError
from tilestream.ops import KeyRounding

QUANT_METHOD = "tilestream"
VERSION = 2  # 1 had no down_hadamard
FILE_NAME = "model.safetensors"
GROUP_SIZES = (32, 128)
HADAMARD_K = 128  # channels of a matrix
_TABLE_GROUP = 32
# Which entry of k4 is a linear's: that of the input that it reads.
_INPUT_OF_STEM = {
    "attn_q": "qkv",
    "attn_k": "qkv",
    "attn_v": "qkv",
    "attn_output": "o",
    "ffn_gate": "gate_up",
    "ffn_up": "gate_up",
    "ffn_down": "down",
}


def is_fmpq(values: Any) -> bool:
    """Whether a parsed config.json is of such a directory."""
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


class FmpqCheckpoint:
    """Weights with the number of INT4 channels that each reads (tilestream.models.checkpoint.Checkpoint).

    Args:
        path: the directory.
        quantisation: quantization_config of its config.json.
    Attributes:
        group_size: input channels of a 4-bit weight with one scale and zero.
        down_hadamard: the columns of `down` were multiplied by Hadamard matrices, and so must be what it reads.
    Raises:
        ModelLoadError: a missing, damaged or foreign file.
    """

    def __init__(self, path: Path, quantisation: Mapping[str, Any]) -> None:
        self.path, self._config = path, path / "config.json"
        version, group = quantisation.get("version"), quantisation.get("group_size")
        if version not in (1, VERSION) or type(group) is not int or group not in GROUP_SIZES:
            raise ModelLoadError(
                f"{self._config}: quantization_config has version {version!r} and group_size {group!r}; this build reads "
                f"versions 1 and {VERSION} and groups of {GROUP_SIZES}"
            )
        self.group_size, self._k4 = group, quantisation.get("k4")
        self.down_hadamard = quantisation.get("down_hadamard", False if version == 1 else None)
        if not isinstance(self.down_hadamard, bool):
            raise ModelLoadError(
                f"{self._config}: quantization_config has down_hadamard {self.down_hadamard!r}; it must be true or false"
            )
        try:
            self._file = safe_open(path / FILE_NAME, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ModelLoadError(f"{path / FILE_NAME}: not a readable safetensors file: {error}") from error
        self._stored = set(self._file.keys())

    @property
    def tensor_names(self) -> list[str]:
        """A weight's tensors by one name."""
        parts = (".codes", ".scale", ".zero")
        return sorted({f"{name.rpartition('.')[0]}.weight" if name.endswith(parts) else name for name in self._stored})

    def has_tensor(self, name: str) -> bool:
        return name in self._stored or name.removesuffix("weight") + "codes" in self._stored

    def vector(self, name: str) -> torch.Tensor:
        """A norm weight or bias as float32."""
        return self._read(name, torch.float32, 1)

    def tensor(self, name: str) -> QuantisedTensor:
        """A weight matrix; embedding and output projection have 8 bits, all others 4."""
        stem, table = name.removesuffix(".weight"), not name.startswith("blk.")
        codes = self._read(stem + ".codes", torch.uint8, 2)
        scale = self._read(stem + ".scale", torch.float16, 2).float()
        zero = None if table else self._read(stem + ".zero", torch.float16, 2).float()
        group = _TABLE_GROUP if table else self.group_size
        k = codes.shape[1] * (1 if table else 2)
        expected = (codes.shape[0], -(-k // group))
        if k % 32 != 0 or scale.shape != expected or (zero is not None and zero.shape != expected):
            raise ModelLoadError(
                f"{self.path / FILE_NAME}: the tensors of {stem} do not fit each other: codes {list(codes.shape)}, scale "
                f"{list(scale.shape)}; expected a multiple of 32 columns, and a scale for each {group} of them"
            )
        if self.down_hadamard and stem.endswith(".ffn_down") and k % HADAMARD_K:
            raise ModelLoadError(
                f"{self._config}: down_hadamard is true, and {stem} has {k} columns; they must be a multiple of {HADAMARD_K}"
            )
        if table:
            return QuantisedTensor(codes, scale, None, group, 8)
        return QuantisedTensor(unpack_nibbles(codes), scale, zero, group, 4, self._k4_of(stem, k))

    def key_rounding(self, stem: str, num_kv_heads: int, head_dim: int) -> KeyRounding | None:
        """How what the projection `stem` gives is rounded to 4 bits; None where the directory does not say."""
        kinds = {"offset": (torch.float32, 2), "order": (torch.int32, 2), "feedback": (torch.float16, 3)}
        if self._stored.isdisjoint(f"{stem}.{part}" for part in kinds):
            return None
        parts = {part: self._read(f"{stem}.{part}", *kind) for part, kind in kinds.items()}
        for part, tensor in parts.items():
            expected = [num_kv_heads] + [head_dim] * (tensor.dim() - 1)
            if list(tensor.shape) != expected:
                raise ModelLoadError(
                    f"{self.path / FILE_NAME}: tensor {stem}.{part} has shape {list(tensor.shape)}; expected {expected}"
                )
        order = parts["order"]
        if not order.sort().values.equal(torch.arange(head_dim, dtype=torch.int32).expand_as(order)):
            raise ModelLoadError(
                f"{self.path / FILE_NAME}: tensor {stem}.order must have each of 0 to {head_dim - 1} once in every row"
            )
        return KeyRounding(parts["offset"], order, parts["feedback"].float())

    def _k4_of(self, stem: str, k: int) -> int:
        try:
            _, layer, linear = stem.split(".")
            k4 = self._k4[int(layer)][_INPUT_OF_STEM[linear]]
        except (TypeError, KeyError, IndexError, ValueError) as error:
            raise ModelLoadError(f"{self._config}: quantization_config has no k4 for {stem}") from error
        if not isinstance(k4, int) or not 0 <= k4 <= k or k4 % 128:
            raise ModelLoadError(f"{self._config}: k4 of {stem} is {k4!r}; allowed: multiples of 128 from 0 to {k}")
        return k4

    def _read(self, name: str, dtype: torch.dtype, dim: int) -> torch.Tensor:
        if name not in self._stored:
            raise ModelLoadError(f"{self.path / FILE_NAME}: the tensor {name} is missing")
        try:
            tensor = self._file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelLoadError(f"{self.path / FILE_NAME}: tensor {name} is not readable: {error}") from error
        if tensor.dim() != dim or tensor.dtype != dtype or tensor.numel() == 0:
            raise ModelLoadError(
                f"{self.path / FILE_NAME}: tensor {name} is {tensor.dtype} {list(tensor.shape)}; "
                f"expected {dtype} of {dim} dimensions"
            )
        return tensor
