"""The float model's passes over the calibration text: what the changes of basis and the choice of blocks need to know."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tilestream.quantize.decoder import Decoder
from tilestream.quantize.keys import KeyBasis, find_key_basis
from tilestream.quantize.select import Input, Key, block_harm
from tilestream.quantize.source import INPUTS, Source
from tilestream.quantize.transform import Statistics, Transform, fold_norms

_KEY_WINDOWS = 8  # whose keys and queries the basis of keys is found on
_HARM_WINDOWS = 4

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
    return Statistics(residual, keys, inner)


def measure_harm(source: Source, transform: Transform, decoder: Decoder, x: torch.Tensor, advance: Advance) -> dict[Key, Input]:
    """What INT4 activations would do to every block of every linear, in the new basis.

    Args:
        x: [windows, tokens, hidden], token embeddings in the new basis.
        advance: called after each layer.
    """
    x, inputs = x[:_HARM_WINDOWS], {}
    for i in range(source.config.num_layers):
        weights = transform.layer(i, source.layer(i))

        def watch(name: str, rows: torch.Tensor, i: int = i, linear: dict[str, torch.Tensor] = weights.linear) -> torch.Tensor:
            readers = [linear[reader] for reader in INPUTS[name]]
            gain = sum(w.square().sum(0) for w in readers)
            inputs[i, name] = Input(rows.size(-1), sum(len(w) for w in readers), block_harm(rows.flatten(0, 1), gain))
            return rows

        x = decoder.layer(i, weights, x, watch)
        advance()
    return inputs
