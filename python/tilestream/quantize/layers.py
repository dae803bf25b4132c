"""Layer by layer: round the weights on what the rounded layers before them give."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from tilestream.quantize.decoder import Decoder
from tilestream.quantize.gptq import Codes, compensated, gptq, nearest
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


@dataclass(slots=True)
class Streams:
    """The residual stream over the calibration windows: of the float model, and of the one rounded so far."""

    exact: torch.Tensor
    rounded: torch.Tensor


def round_layer(
    layer_idx: int, weights: LayerWeights, k4: Mapping[Key, int], decoder: Decoder, streams: Streams, group: int
) -> dict[str, Codes]:
    """Codes of a layer's linears; moves both streams past it."""
    moments = {name: _Moments(weights.linear[readers[0]].size(1)) for name, readers in INPUTS.items()}
    for begin in range(0, len(streams.exact), _CHUNK):
        part = slice(begin, begin + _CHUNK)
        seen: dict[str, torch.Tensor] = {}

        def keep(name: str, rows: torch.Tensor) -> torch.Tensor:
            seen[name] = rows.flatten(0, 1)
            return rows

        def compare(name: str, rows: torch.Tensor) -> torch.Tensor:
            rounded = round_rows(rows, k4[layer_idx, name])
            moments[name].add(seen.pop(name), rounded.flatten(0, 1))
            return rounded

        streams.exact[part] = decoder.layer(layer_idx, weights, streams.exact[part], keep)
        decoder.layer(layer_idx, weights, streams.rounded[part], compare)
    codes = {}
    for name, readers in INPUTS.items():
        m = moments[name]
        for reader in readers:
            codes[reader] = gptq(compensated(weights.linear[reader], m.hessian, m.cross), m.hessian, group)
    rounded = replace(weights, linear={name: c.dequantise() for name, c in codes.items()})
    for begin in range(0, len(streams.rounded), _CHUNK):
        part = slice(begin, begin + _CHUNK)
        streams.rounded[part] = decoder.layer(
            layer_idx, rounded, streams.rounded[part], lambda name, rows: round_rows(rows, k4[layer_idx, name])
        )
    return codes
