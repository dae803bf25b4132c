"""The float model's pass over the calibration text: what the changes of basis need to know."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tilestream.quantize.decoder import Decoder
from tilestream.quantize.keys import KeyBasis, find_key_basis
from tilestream.quantize.source import Source
from tilestream.quantize.transform import Statistics, fold_norms

_KEY_WINDOWS = 8  # whose keys and queries the basis of keys is found on

Advance = Callable[[], None]


def gather_statistics(source: Source, decoder: Decoder, x: torch.Tensor, *, fold: bool, advance: Advance) -> Statistics:
    """Statistics of the float model.

    Args:
        x: [windows, tokens, hidden], token embeddings.
        fold: norm weights count as the linears'.
        advance: called after each layer.
    """
    config = source.config
    residual = torch.zeros(config.hidden_size, config.hidden_size)
    inner: list[torch.Tensor] = []
    keys: list[KeyBasis] = []
    for i in range(config.num_layers):
        weights = source.layer(i)
        energy = torch.zeros(config.intermediate_size)

        def watch(name: str, rows: torch.Tensor, energy: torch.Tensor = energy) -> torch.Tensor:
            flat = rows.flatten(0, 1)
            if name in ("qkv", "gate_up"):
                residual.addmm_(flat.t(), flat)
            elif name == "down":
                energy.add_(flat.square().sum(0))
            return rows

        def heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, i: int = i) -> tuple[torch.Tensor, torch.Tensor]:
            few_q, few_k = q[:_KEY_WINDOWS], k[:_KEY_WINDOWS]
            attention = decoder.attention(i, few_q, few_k)
            keys.append(find_key_basis(few_q, few_k, attention, config.layer_rope(i).rotary_dim, shared=config.qk_norm))
            return k, v

        x = decoder.layer(i, fold_norms(weights) if fold else weights, x, watch, heads)
        inner.append(energy)
        advance()
    return Statistics(residual, keys, inner, x)
