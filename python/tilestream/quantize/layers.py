"""Layer by layer: round the weights on what the rounded layers before them give."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from tilestream.quantize.decoder import Decoder
from tilestream.quantize.gptq import Codes, compensated, gptq, squared_output
from tilestream.quantize.rounding import round_rows
from tilestream.quantize.select import Key
from tilestream.quantize.source import INPUTS, LayerWeights

_CHUNK = 8  # windows at a time


class _Moments:
    """Of one input: sums of x^T x over rounded rows x, and of y^T x with the exact rows y."""

    def __init__(self, k: int) -> None:
        self.hessian, self.cross = torch.zeros(k, k), torch.zeros(k, k)

    def add(self, exact: torch.Tensor, rounded: torch.Tensor) -> None:
        self.hessian.addmm_(rounded.t(), rounded)
        self.cross.addmm_(exact.t(), rounded)


def round_layer(
    layer_idx: int, weights: LayerWeights, k4: Mapping[Key, int], decoder: Decoder, x: torch.Tensor, group: int
) -> tuple[dict[str, Codes], dict[str, float]]:
    """Codes of a layer's linears, and the relative squared error that they add to what is read from each input.

    Args:
        weights: of the layer, float.
        x: [windows, tokens, hidden], the residual stream of the layers rounded so far; becomes the stream behind this one.
        group: input channels with one scale and zero.
    """
    moments = {name: _Moments(weights.linear[readers[0]].size(1)) for name, readers in INPUTS.items()}

    def compare(name: str, rows: torch.Tensor) -> torch.Tensor:
        rounded = round_rows(rows, k4[layer_idx, name])
        moments[name].add(rows.flatten(0, 1), rounded.flatten(0, 1))
        return rounded

    for part in x.split(_CHUNK):
        decoder.layer(layer_idx, weights, part, compare)
    codes, errors = {}, {}
    for name, readers in INPUTS.items():
        m, error, signal = moments[name], 0.0, 0.0
        for reader in readers:
            wanted = weights.linear[reader]
            if k4[layer_idx, name]:  # INT8 leaves nothing worth it, and weights that are codes already stay so
                wanted = compensated(wanted, m.hessian, m.cross)
            codes[reader] = gptq(wanted, m.hessian, group)
            error += squared_output(wanted - codes[reader].dequantise(), m.hessian)
            signal += squared_output(wanted, m.hessian)
        errors[name] = error / max(signal, 1e-30)
    rounded = replace(weights, linear={name: c.dequantise() for name, c in codes.items()})
    for part in x.split(_CHUNK):
        part.copy_(decoder.layer(layer_idx, rounded, part, lambda name, rows: round_rows(rows, k4[layer_idx, name])))
    return codes, errors
