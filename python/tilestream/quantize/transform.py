"""Changes of basis that leave a float model's outputs as they are and make it easier to round.

  residual stream   turned to the principal directions of what the linears read, most energy last, and mixed by a Hadamard
                    matrix within each block of 128 (ResQ, 2412.14363; QuaRot, 2404.00456). Norm weights move into the linears.
                    Or, without rotation, its channels sorted by energy.
  MLP's inside      channels sorted by energy.
  keys              RoPE pairs scaled and turned (tilestream.quantize.keys).
  values            every head turned by a Hadamard matrix, which `o` undoes.
  what down reads   turned by a Hadamard matrix within each block of 128, in down's weight and, as the model runs, in its rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tilestream.models.config import ModelConfig
from tilestream.quantize.head import Head
from tilestream.quantize.keys import KeyBasis
from tilestream.quantize.rounding import BLOCK_K
from tilestream.quantize.source import LayerWeights


@dataclass(slots=True)
class Statistics:
    """What calibration gathers of a float model.

    Attributes:
        residual: [hidden, hidden], sum over layers and rows of x^T x of what q, k, v, gate and up read.
        keys: per layer.
        inner: per layer [intermediate], sum of squares of what `down` reads.
        final: [windows, tokens, hidden], the residual stream behind the last layer.
    """

    residual: torch.Tensor
    keys: list[KeyBasis]
    inner: list[torch.Tensor]
    final: torch.Tensor


class Identity:
    """No change of basis."""

    down_hadamard = False

    def layer(self, layer_idx: int, weights: LayerWeights) -> LayerWeights:
        return weights


class Transform:
    """The changes of basis of one model.

    Args:
        config: the model's shape.
        statistics: of the model with its norms folded, where `rotate`.
        rotate: turn the residual stream, the values and what `down` reads; not for families with post norms.
        granule: consecutive channels that stay together when channels are sorted.
    Attributes:
        down_hadamard: whether what `down` reads is turned (where it has whole blocks of 128).
    """

    def __init__(self, config: ModelConfig, statistics: Statistics, *, rotate: bool, granule: int) -> None:
        self._config, self._rotate = config, rotate
        if rotate:
            self.basis = principal_blocks(statistics.residual)
        else:
            order = energy_order(statistics.residual.diagonal(), granule)
            self.basis = torch.eye(config.hidden_size)[:, order]
            self._order = order
        self._inner = [energy_order(inner, granule) for inner in statistics.inner]
        self._keys = statistics.keys
        self._turn = hadamard(config.head_dim) if rotate else None
        self.down_hadamard = rotate and config.intermediate_size % BLOCK_K == 0

    def table(self, embedding: torch.Tensor) -> torch.Tensor:
        """The token embedding in the new basis."""
        return self._columns(embedding)

    def head(self, head: Head) -> Head:
        """The final norm and the output projection."""
        if self._rotate:
            return replace(head, norm=torch.ones_like(head.norm), weight=self._columns(head.weight * head.norm))
        return replace(head, norm=head.norm[self._order], weight=self._columns(head.weight))

    def layer(self, layer_idx: int, weights: LayerWeights) -> LayerWeights:
        """A layer that reads and writes the residual stream in the new basis."""
        weights = fold_norms(weights) if self._rotate else weights
        linear, bias, norm = dict(weights.linear), dict(weights.bias), dict(weights.norm)
        for name in ("q", "k", "v", "gate", "up"):
            linear[name] = self._columns(linear[name])
        for name in ("o", "down"):
            linear[name] = self._columns(linear[name].t()).t().contiguous()
            if name in bias:
                bias[name] = self._columns(bias[name][None])[0]
        if not self._rotate:
            for name in norm.keys() - {"q", "k"}:
                norm[name] = norm[name][self._order]
        inner = self._inner[layer_idx]
        for tensors in (linear, bias):
            for name in tensors.keys() & {"gate", "up"}:
                tensors[name] = tensors[name][inner]
        linear["down"] = linear["down"][:, inner]
        if self.down_hadamard:
            linear["down"] = turn_blocks(linear["down"])
        self._move_keys(self._keys[layer_idx], linear, bias, norm)
        if self._turn is not None:
            self._turn_values(linear, bias)
        return LayerWeights(linear, bias, norm, self.down_hadamard)

    def _columns(self, weight: torch.Tensor) -> torch.Tensor:
        return weight @ self.basis if self._rotate else weight[:, self._order]

    def _move_keys(self, basis: KeyBasis, linear: dict, bias: dict, norm: dict) -> None:
        for name in "qk":
            for tensors in (norm,) if "k" in norm else (linear, bias):  # a norm undoes what stands before it
                if name in tensors:
                    shared = basis.first() if tensors is norm else basis
                    tensors[name] = shared.apply(tensors[name], self._config.head_dim, queries=name == "q")

    def _turn_values(self, linear: dict, bias: dict) -> None:
        turn, head_dim = self._turn, self._config.head_dim
        linear["v"] = (turn @ linear["v"].unflatten(0, (-1, head_dim))).flatten(0, 1)
        linear["o"] = (linear["o"].unflatten(1, (-1, head_dim)) @ turn.t()).flatten(1)
        if "v" in bias:
            bias["v"] = (bias["v"].unflatten(0, (-1, head_dim)) @ turn.t()).flatten()


def fold_norms(weights: LayerWeights) -> LayerWeights:
    """The same layer with norms of weight 1 before attention and MLP."""
    linear, norm = dict(weights.linear), dict(weights.norm)
    for stem, names in (("attn", "qkv"), ("mlp", ("gate", "up"))):
        for name in names:
            linear[name] = linear[name] * norm[stem]
        norm[stem] = torch.ones_like(norm[stem])
    return LayerWeights(linear, weights.bias, norm)


def energy_order(energy: torch.Tensor, granule: int) -> torch.Tensor:
    """Channels by rising energy, `granule` neighbours at a time; what fills no granule stays at the end."""
    full = energy.numel() // granule * granule
    first = energy[:full].unflatten(0, (-1, granule)).sum(1).argsort() * granule
    return torch.cat([(first[:, None] + torch.arange(granule)).flatten(), torch.arange(full, energy.numel())])


def principal_blocks(moment: torch.Tensor) -> torch.Tensor:
    """An orthogonal basis, one direction a column: principal directions by rising energy, mixed within blocks of 128."""
    basis = torch.linalg.eigh(moment.double())[1].float()
    for begin in range(0, basis.size(1), BLOCK_K):
        block = basis[:, begin : begin + BLOCK_K]
        block.copy_(block @ hadamard(block.size(1)))
    return basis


def turn_blocks(rows: torch.Tensor) -> torch.Tensor:
    """Each 128 elements of the last dimension times the Hadamard matrix (tilestream.ops.hadamard)."""
    return (rows.unflatten(-1, (-1, BLOCK_K)) @ hadamard(BLOCK_K)).flatten(-2)


def hadamard(n: int) -> torch.Tensor:
    """An orthogonal [n, n] matrix of signs times 1 / sqrt(m), on blocks of m, the largest power of two that divides n."""
    size = n & -n
    matrix = torch.ones(1, 1)
    while matrix.size(0) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return torch.block_diag(*[matrix / size**0.5] * (n // size))
