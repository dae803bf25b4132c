"""GGUF files: metadata and tensors, with every fault of a file reported as one ModelLoadError.

The parsing is the `gguf` package's. Three of its steps are replaced: reads are bounds-checked (a slice past
the end of a memory map is silently short, and a corrupt count would then loop for hours), arrays are read
in one go (100,000 tokens and merges take 2 s one by one), and tensor shapes are limited before they are used.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGUFReader, GGUFValueType
from gguf.gguf_reader import ReaderField

from tilestream.models.checkpoint import RawTensor
from tilestream.models.errors import ModelLoadError

# Block types that pack_gguf reads (csrc/include/tilestream/linear.h, GgufType).
SUPPORTED_TYPES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
_FLOAT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MAX_DIMS = 4  # ggml's GGML_MAX_DIMS
_UINT64 = struct.Struct("<Q")
# What the gguf package raises on bytes it cannot make sense of.
_PARSE_ERRORS = (ValueError, KeyError, IndexError, TypeError, OverflowError, OSError, struct.error)


class _Reader(GGUFReader):
    """GGUFReader that never reads past the end and takes whole arrays at once."""

    strings: dict[int, list[str]]

    def __init__(self, path: Path) -> None:
        self.strings = {}
        super().__init__(path, "c")  # copy-on-write: torch wants writable memory, the file stays untouched

    def _get(self, offset, dtype, count=1, override_order=None):  # type: ignore[no-untyped-def, override]
        end = int(offset) + np.dtype(dtype).itemsize * int(count)
        if end > self.data.size:
            raise ValueError(f"it ends at byte {self.data.size}, but data is expected up to byte {end}")
        return super()._get(int(offset), dtype, count, override_order)

    def _get_field_parts(self, orig_offs, raw_type):  # type: ignore[no-untyped-def, override]
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        raw_item_type, count = self._get(orig_offs, np.uint32), int(self._get(orig_offs + 4, np.uint64)[0])
        item_type = GGUFValueType(raw_item_type[0])
        begin = orig_offs + 12
        if item_type == GGUFValueType.STRING:
            self.strings[orig_offs], end = self._read_strings(begin, count)
            return end - orig_offs, [raw_item_type], [], [GGUFValueType.ARRAY, item_type]
        if item_type not in self.gguf_scalar_to_np:
            raise ValueError(f"an array of {item_type.name} is not supported")
        values = self._get(begin, self.gguf_scalar_to_np[item_type], count)
        return 12 + values.nbytes, [raw_item_type, values], [1], [GGUFValueType.ARRAY, item_type]

    def _read_strings(self, offset: int, count: int) -> tuple[list[str], int]:
        """`count` strings from byte `offset`, and the byte after them."""
        if self.byte_order != "I":
            raise ValueError("it is big-endian; only little-endian files are supported")
        buffer, size, strings = memoryview(self.data), self.data.size, []
        length_at, append = _UINT64.unpack_from, strings.append
        for _ in range(count):
            begin = offset + 8
            offset = begin + length_at(buffer, offset)[0]
            if offset > size:
                raise ValueError(f"it ends at byte {size}, but a string is expected up to byte {offset}")
            append(str(buffer[begin:offset], "utf-8", "replace"))
        return strings, offset

    def _get_tensor_info_field(self, orig_offs):  # type: ignore[no-untyped-def, override]
        name_bytes = int(self._get(orig_offs, np.uint64)[0])
        num_dims = int(self._get(orig_offs + 8 + name_bytes, np.uint32)[0])
        if not 0 < num_dims <= _MAX_DIMS:
            raise ValueError(f"a tensor has {num_dims} dimensions; allowed: 1 to {_MAX_DIMS}")
        field: ReaderField = super()._get_tensor_info_field(orig_offs)
        shape = field.parts[3].tolist()
        if not 0 < math.prod(shape) < 2**48:
            raise ValueError(f"tensor {field.name!r} has shape {shape}; allowed: 1 to 2^48 elements")
        return field


class GgufFile:
    """An open GGUF file.

    Args:
        path: the file.
    Raises:
        ModelLoadError: missing, truncated or corrupt file, or not a GGUF file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as handle:
                magic = handle.read(4)
            if magic != b"GGUF":
                raise ModelLoadError(f"{path}: not a GGUF file: it starts with {magic!r} instead of b'GGUF'")
            self._reader = _Reader(path)
        except _PARSE_ERRORS as error:
            raise ModelLoadError(f"{path}: not a readable GGUF file, probably truncated or damaged: {error}") from error
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    @property
    def tensor_names(self) -> list[str]:
        return list(self._tensors)

    def value(self, key: str, default: Any = None) -> Any:
        """A metadata value as a Python int, float, bool, str or list of them; `default` when absent."""
        field = self._reader.fields.get(key)
        if field is None:
            return default
        try:
            if field.types == [GGUFValueType.ARRAY, GGUFValueType.STRING]:
                return self._reader.strings[field.offset + 12 + len(key.encode())]
            contents = field.contents()
        except _PARSE_ERRORS as error:
            raise ModelLoadError(f"{self.path}: the value of {key} is damaged: {error}") from error
        return contents

    def _typed(self, key: str, kinds: tuple[type, ...], what: str, default: Any) -> Any:
        value = self.value(key, default)
        if value is None:
            raise ModelLoadError(f"{self.path}: the metadata key {key} is missing")
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ModelLoadError(f"{self.path}: {key} is {value!r:.80}; it must be {what}")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        return self._typed(key, (int,), "an integer", default)

    def number(self, key: str, default: float | None = None) -> float:
        value = float(self._typed(key, (int, float), "a number", default))
        if not math.isfinite(value):
            raise ModelLoadError(f"{self.path}: {key} is {value}; it must be finite")
        return value

    def string(self, key: str, default: str | None = None) -> str:
        return self._typed(key, (str,), "a string", default)

    def boolean(self, key: str, default: bool | None = None) -> bool:
        return self._typed(key, (bool,), "a boolean", default)

    def array(self, key: str, kind: type, default: list | None = None) -> list:
        values = self._typed(key, (list,), f"an array of {kind.__name__}", default)
        if values and not isinstance(values[0], kind):
            raise ModelLoadError(f"{self.path}: {key} holds {values[0]!r:.40}; it must be an array of {kind.__name__}")
        return values

    def has_tensor(self, name: str) -> bool:
        return name in self._tensors

    def tensor(self, name: str) -> RawTensor:
        """A tensor's bytes, one row per output feature (a vector is one row).

        Raises:
            ModelLoadError: no such tensor, more than two dimensions, or a type that is not supported.
        """
        info = self._tensors.get(name)
        if info is None:
            raise ModelLoadError(f"{self.path}: the tensor {name} is missing")
        if info.tensor_type.name not in SUPPORTED_TYPES:
            raise ModelLoadError(
                f"{self.path}: tensor {name} has type {info.tensor_type.name}; supported: {', '.join(SUPPORTED_TYPES)}"
            )
        shape = info.shape.tolist()
        if len(shape) > 2:
            raise ModelLoadError(f"{self.path}: tensor {name} has shape {shape[::-1]}; one or two dimensions allowed")
        block_elements, block_bytes = GGML_QUANT_SIZES[info.tensor_type]
        num_rows = shape[1] if len(shape) == 2 else 1
        data = np.asarray(info.data).reshape(-1).view(np.uint8)
        rows = torch.from_numpy(data.reshape(num_rows, shape[0] // block_elements * block_bytes))
        return RawTensor(info.tensor_type, rows, shape[0])

    def vector(self, name: str) -> torch.Tensor:
        """A one-dimensional F32, F16 or BF16 tensor as float32, copied out of the file."""
        tensor = self.tensor(name)
        dtype = _FLOAT_DTYPES.get(tensor.type.name)
        if dtype is None or tensor.num_rows != 1:
            raise ModelLoadError(
                f"{self.path}: tensor {name} has type {tensor.type.name} and {tensor.num_rows} rows; "
                "expected one row of F32, F16 or BF16"
            )
        return tensor.rows.clone().view(dtype).reshape(-1).to(torch.float32)
