"""How a layer's keys are to become 4-bit codes as they are stored: found from the queries and keys of a text.

An error e of a key costs e^T C e of its logits, C = E[q q^T]. Elements that are still to be rounded can be moved to lessen what
those before have done; by how much, GPTQ's triangle says (2210.17323): with C^-1 = U^T U, the i-th element's error moves the
j-th by -U[i][j] / U[i][i]. Elements that queries weigh most go first, while all others are there to make up for them.
"""

from __future__ import annotations

import torch

from tilestream.ops import KeyRounding

_DAMPING = 0.01  # of the mean of the moment's diagonal


class KeyStatistics:
    """What is summed up over a text, after RoPE.

    Attributes:
        moment: [num_kv_heads, head_dim, head_dim], float64: sum of q q^T over the queries of each KV head.
    """

    def __init__(self, num_kv_heads: int, head_dim: int) -> None:
        self.moment = torch.zeros(num_kv_heads, head_dim, head_dim, dtype=torch.float64)
        self._sum, self._num_keys = torch.zeros(num_kv_heads, head_dim, dtype=torch.float64), 0

    @property
    def mean(self) -> torch.Tensor:
        """[num_kv_heads, head_dim], float64: of the keys."""
        return self._sum / self._num_keys

    def watch(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sees what attention reads (tilestream.quantize.decoder.Heads), and leaves it as it is."""
        queries = q.unflatten(1, (k.size(1), -1)).transpose(0, 1).flatten(1, 3).double()
        self.moment.baddbmm_(queries.mT, queries)
        self._sum += k.sum((0, 2), dtype=torch.float64)
        self._num_keys += k.size(0) * k.size(2)
        return k, v


def find_key_rounding(statistics: KeyStatistics, *, logits_soft_cap: float) -> KeyRounding:
    """The rounding with the least error of the logits.

    Args:
        statistics: of the layer's queries and keys.
        logits_soft_cap: of the model; a capped softmax would see an offset, so then there is none.
    """
    moment, mean = statistics.moment, statistics.mean
    order = moment.diagonal(dim1=1, dim2=2).argsort(descending=True, stable=True)
    moment = moment.gather(1, order[:, :, None].expand_as(moment)).gather(2, order[:, None].expand_as(moment))
    # What keeps a moment of few or of equal queries from being singular.
    damping = _DAMPING * moment.diagonal(dim1=1, dim2=2).mean(1) + 1e-30
    damped = moment + damping[:, None, None] * torch.eye(moment.size(1), dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    feedback = (upper / upper.diagonal(dim1=1, dim2=2)[..., None]).triu(1)
    return KeyRounding(torch.zeros_like(mean).float() if logits_soft_cap else mean.float(), order.int(), feedback.float())
