"""Random weights that are made at once, of any size: a few rows, packed on the CPU, again and again."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tilestream import ops
from tilestream.layers.linear import Linear
from tilestream.ops import PackedFormat, PackedWeight
from tilestream.placement import Placement

DISTINCT_ROWS = 256  # whole panels of every packed format, and a divisor of Llama 3's sizes


def random_weight(n: int, k: int, format: PackedFormat, device: torch.device) -> tuple[PackedWeight, torch.Tensor]:
    """A weight of deviation about k ** -0.5, n a multiple of DISTINCT_ROWS.

    Returns:
        The weight, and the float32 values [DISTINCT_ROWS, k] that its rows repeat.
    """
    if format == PackedFormat.ROWS_BFLOAT16:
        values = (torch.randn(DISTINCT_ROWS, k) * k**-0.5).bfloat16().float()
        packed = ops.pack_weight(values, format=format)
    else:
        levels, group = 2**format.bits, format.group_size
        q = torch.randint(0, levels, (DISTINCT_ROWS, k), dtype=torch.uint8)
        scale = ((0.5 + torch.rand(DISTINCT_ROWS, k // group)) * 3.4 * k**-0.5 / levels).half().float()
        values = (q.float() - levels // 2) * scale.repeat_interleave(group, 1)
        packed = ops.pack_weight(q=q, scale=scale, format=format)
    data = packed.data.to(device).repeat(n // DISTINCT_ROWS)
    return PackedWeight(data, n, k, format), values.to(device)


class RandomWeights:
    """Stands where a WeightLoader does, and reads nothing.

    num_bytes: of all weights that a step reads whole.
    """

    def __init__(self, format: PackedFormat, placement: Placement) -> None:
        self.placement, self._format, self.num_bytes = placement, format, 0

    def vector(self, name: str, size: int) -> torch.Tensor:
        return torch.ones(size, device=self.placement.device)

    def block(self, names: Sequence[str]) -> int:
        return 1

    def linear(
        self, name: str, n: int, k: int, *, rows: range | None = None, columns: range | None = None
    ) -> Linear:
        n, k = len(rows or range(n)), len(columns or range(k))
        return Linear(self._weight(n, k, is_read_whole=name != "token_embd"))

    def stacked(
        self, names: Sequence[str], sizes: Sequence[int], k: int, *, rows: Sequence[range] | None = None
    ) -> Linear:
        return self.linear(" ".join(names), sum(map(len, rows)) if rows else sum(sizes), k)

    def gated(self, names: Sequence[str], n: int, k: int, activation: str, *, rows: range | None = None) -> Linear:
        return Linear(self._weight(2 * len(rows or range(n)), k), gate=activation)

    def _weight(self, n: int, k: int, *, is_read_whole: bool = True) -> PackedWeight:
        weight, _ = random_weight(n, k, self._format, self.placement.device)
        self.num_bytes += weight.data.nbytes if is_read_whole else 0
        return weight

    def check_all_used(self) -> None:
        pass
