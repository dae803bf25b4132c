"""Token embeddings, gathered from a packed weight."""

from __future__ import annotations

import torch

from tilestream.ops.linear import PackedWeight


class Embedding:
    """Rows of a packed [vocab_size, hidden] table; a tied output projection shares the same memory.

    Args:
        weight: the packed table.
        scale: multiplies the rows (Gemma: sqrt(hidden)).
    """

    def __init__(self, weight: PackedWeight, scale: float = 1.0) -> None:
        self.weight, self.scale = weight, scale
        self._op, self._format = torch.ops.tilestream.embedding.default, int(weight.format)

    def __call__(self, token_ids: torch.Tensor, out: torch.Tensor) -> None:
        """Writes [num_tokens, hidden] into `out` from token_ids [num_tokens] int64."""
        self._op(token_ids, self.weight.data, out, n=self.weight.n, format=self._format)
        if self.scale != 1.0:
            out.mul_(self.scale)
