"""FMPQ: 4-bit weights, 4- and 8-bit activations, from a float checkpoint and a text (docs/quantize.md)."""

from tilestream.quantize.run import Recipe, quantize

__all__ = ["Recipe", "quantize"]
