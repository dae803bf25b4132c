"""Token embeddings, gathered from a packed weight."""

from __future__ import annotations

import torch

from tilestream.ops.linear import PackedWeight


class Embedding:
    """Rows of a packed [vocab_size, hidden] table; a tied output projection shares the same memory.

    Args:
        weight: the packed table.
        scale: multiplies the rows (Gemma: sqrt(hidden)).
        vocabulary: the tokens that the table has, others get zeros; None: all.
    """

    def __init__(self, weight: PackedWeight, scale: float = 1.0, vocabulary: range | None = None) -> None:
        self.weight, self.scale, self.vocabulary = weight, scale, vocabulary
        self._op, self._format = torch.ops.tilestream.embedding.default, int(weight.format)

    def __call__(self, token_ids: torch.Tensor, out: torch.Tensor) -> None:
        """Writes [num_tokens, hidden] into `out` from token_ids [num_tokens] int64."""
        foreign = None
        if self.vocabulary is not None:
            foreign = (token_ids < self.vocabulary.start) | (token_ids >= self.vocabulary.stop)
            token_ids = (token_ids - self.vocabulary.start).masked_fill_(foreign, 0)
        self._op(token_ids, self.weight.data, out, n=self.weight.n, format=self._format)
        if foreign is not None:
            out.masked_fill_(foreign.unsqueeze(1), 0.0)
        if self.scale != 1.0:
            out.mul_(self.scale)
