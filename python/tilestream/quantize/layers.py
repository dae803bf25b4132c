"""Layer by layer: round the weights on what the rounded layers before them give."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from tilestream.ops import KeyRounding
from tilestream.quantize.decoder import Decoder
from tilestream.quantize.gptq import Codes, gptq, squared_output
from tilestream.quantize.key_rounding import KeyStatistics, find_key_rounding
from tilestream.quantize.rounding import round_rows
from tilestream.quantize.select import Key
from tilestream.quantize.source import INPUTS, LayerWeights

_CHUNK = 8  # windows at a time


def round_layer(
    layer_idx: int, weights: LayerWeights, k4: Mapping[Key, int], decoder: Decoder, x: torch.Tensor, group: int
) -> tuple[dict[str, Codes], dict[str, float], KeyRounding]:
    """Codes of a layer's linears, the relative squared error that they add to what is read from each input, and how the layer's
    keys are to be rounded.

    Args:
        weights: of the layer, float.
        x: [windows, tokens, hidden], the residual stream of the layers rounded so far; becomes the stream behind this one.
        group: input channels with one scale and zero.
    """
    widths = {name: weights.linear[readers[0]].size(1) for name, readers in INPUTS.items()}
    hessians = {name: torch.zeros(k, k) for name, k in widths.items()}  # sums of x^T x over rounded rows x

    def watch(name: str, rows: torch.Tensor) -> torch.Tensor:
        rounded = round_rows(rows, k4[layer_idx, name])
        flat = rounded.flatten(0, 1)
        hessians[name].addmm_(flat.t(), flat)
        return rounded

    for part in x.split(_CHUNK):
        decoder.layer(layer_idx, weights, part, watch)
    codes, errors = {}, {}
    for name, readers in INPUTS.items():
        hessian, weight = hessians[name], torch.cat([weights.linear[reader] for reader in readers])
        joint = gptq(weight, hessian, group)
        error, signal = squared_output(weight - joint.dequantise(), hessian), squared_output(weight, hessian)
        errors[name] = error / max(signal, 1e-30)
        codes |= zip(readers, joint.split([len(weights.linear[reader]) for reader in readers]), strict=True)
    rounded = replace(weights, linear={name: c.dequantise() for name, c in codes.items()})
    statistics = KeyStatistics(decoder.config.num_kv_heads, decoder.config.head_dim)
    for part in x.split(_CHUNK):
        part.copy_(
            decoder.layer(layer_idx, rounded, part, lambda name, rows: round_rows(rows, k4[layer_idx, name]), statistics.watch)
        )
    return codes, errors, find_key_rounding(statistics, logits_soft_cap=decoder.config.logits_soft_cap)
