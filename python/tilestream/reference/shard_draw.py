"""Masses of logits in float64, and the bits by which histograms sort them."""

import torch

_UNIT = 2.0**44  # the mass of a weight of 1


def ordered_bits(logits: torch.Tensor) -> torch.Tensor:
    """Integers of 32 bits in the order of the float32 logits; -0 is as 0.

    Args:
        logits: float32.
    Returns:
        int64, of the same shape.
    """
    bits = (logits + 0.0).view(torch.int32).long() & 0xFFFFFFFF
    return torch.where(bits >= 1 << 31, bits ^ 0xFFFFFFFF, bits ^ (1 << 31))


def masses(logits: torch.Tensor, *, maximum: float, temperature: float, threshold: float = -torch.inf,
           min_p: float = 0.0) -> torch.Tensor:
    """2^44 exp((logit - maximum) / temperature) of the logits that a draw keeps, 0 of others.

    Args:
        logits: [num_tokens].
        threshold: the least logit that top-p keeps.
    Returns:
        [num_tokens], float64.
    """
    weight = torch.exp((logits.double() - maximum) / temperature)
    return torch.where((logits >= threshold) & (weight >= min_p), weight * _UNIT, 0.0)


def histogram(logits: torch.Tensor, *, maximum: float, temperature: float, prefix: int, num_known: int) -> torch.Tensor:
    """Masses by the 8 bits that follow the first num_known, of logits that begin with `prefix`.

    Args:
        logits: [num_tokens].
    Returns:
        [256], float64.
    """
    bits = ordered_bits(logits)
    inside = bits >> (32 - num_known) == prefix
    bins = bits >> (24 - num_known) & 255
    mass = torch.where(inside, masses(logits, maximum=maximum, temperature=temperature), 0.0)
    return torch.zeros(256, dtype=torch.float64).index_add(0, bins, mass)
