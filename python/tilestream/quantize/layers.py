"""Layer by layer: round the weights on what the rounded layers before them give, and find how to round the keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tilestream.ops import KeyRounding
from tilestream.quantize.decoder import Decoder, Heads
from tilestream.quantize.gptq import Codes, gptq, squared_output
from tilestream.quantize.key_rounding import KeyStatistics, find_key_rounding
from tilestream.quantize.rounding import round_rows
from tilestream.quantize.select import Key
from tilestream.quantize.source import INPUTS, LayerWeights

_CHUNK = 8  # windows at a time


@dataclass(slots=True)
class RoundedLayer:
    """A layer whose linears are codes; the rest as in LayerWeights."""

    codes: dict[str, Codes]
    bias: dict[str, torch.Tensor]
    norm: dict[str, torch.Tensor]
    down_hadamard: bool

    def weights(self) -> LayerWeights:
        return LayerWeights({name: c.dequantise() for name, c in self.codes.items()}, self.bias, self.norm, self.down_hadamard)


def round_layer(
    layer_idx: int,
    weights: LayerWeights,
    k4: Mapping[Key, int],
    token_weights: Mapping[Key, torch.Tensor],
    decoder: Decoder,
    x: torch.Tensor,
    group: int,
) -> tuple[RoundedLayer, dict[str, float]]:
    """A layer's codes, and the relative squared error that they add to what is read from each input, tokens weighted.

    Args:
        weights: of the layer, float.
        token_weights: of Sensitivity.
        x: [windows, tokens, hidden], the residual stream of the layers rounded so far; becomes the stream behind this one.
        group: input channels with one scale and zero.
    """
    widths = {name: weights.linear[readers[0]].size(1) for name, readers in INPUTS.items()}
    hessians = {name: torch.zeros(k, k) for name, k in widths.items()}  # sums of x^T x over rounded rows x, weighted
    for begin in range(0, len(x), _CHUNK):
        part = slice(begin, begin + _CHUNK)

        def watch(name: str, rows: torch.Tensor, part: slice = part) -> torch.Tensor:
            rounded = round_rows(rows, k4[layer_idx, name])
            flat = rounded.flatten(0, 1)
            hessians[name].addmm_((flat * token_weights[layer_idx, name][part].reshape(-1, 1)).t(), flat)
            return rounded

        decoder.layer(layer_idx, weights, x[part], watch)
    codes, errors = {}, {}
    for name, readers in INPUTS.items():
        hessian, weight = hessians[name], torch.cat([weights.linear[reader] for reader in readers])
        joint = gptq(weight, hessian, group)
        error, signal = squared_output(weight - joint.dequantise(), hessian), squared_output(weight, hessian)
        errors[name] = error / max(signal, 1e-30)
        codes |= zip(readers, joint.split([len(weights.linear[reader]) for reader in readers]), strict=True)
    rounded = RoundedLayer(codes, weights.bias, weights.norm, weights.down_hadamard)
    _run_rounded(layer_idx, rounded, k4, decoder, x)
    return rounded, errors


def teach_cache(layer_idx: int, layer: RoundedLayer, k4: Mapping[Key, int], decoder: Decoder, x: torch.Tensor) -> KeyRounding:
    """How a rounded layer's keys are to be rounded. `x` as in round_layer."""
    statistics = KeyStatistics(decoder.config.num_kv_heads, decoder.config.head_dim)
    _run_rounded(layer_idx, layer, k4, decoder, x, statistics.watch)
    return find_key_rounding(statistics, logits_soft_cap=decoder.config.logits_soft_cap)


def _run_rounded(
    layer_idx: int, layer: RoundedLayer, k4: Mapping[Key, int], decoder: Decoder, x: torch.Tensor, heads: Heads | None = None
) -> None:
    weights = layer.weights()
    for part in x.split(_CHUNK):
        part.copy_(decoder.layer(layer_idx, weights, part, lambda name, rows: round_rows(rows, k4[layer_idx, name]), heads))
