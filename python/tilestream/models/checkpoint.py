"""What the weight loader needs of a file format: tensors by one set of names, as rows of blocks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from gguf import GGMLQuantizationType


@dataclass(frozen=True, slots=True)
class RawTensor:
    """A weight as it lies in its file.

    Attributes:
        type: GGUF block type; plain float types are blocks of one element.
        rows: uint8 [num_rows, bytes per row].
        num_columns: elements per row.
    """

    type: GGMLQuantizationType
    rows: torch.Tensor
    num_columns: int

    @property
    def num_rows(self) -> int:
        return self.rows.shape[0]


class Checkpoint(Protocol):
    """Named tensors. The names are GGUF's: `token_embd.weight`, `blk.0.attn_q.weight`, ..."""

    path: Path

    @property
    def tensor_names(self) -> list[str]: ...

    def has_tensor(self, name: str) -> bool: ...

    def tensor(self, name: str) -> RawTensor: ...

    def vector(self, name: str) -> torch.Tensor: ...
