"""Linear layers in float64: dequantised weights, and the exact model of dynamic int8 activations."""

import torch

from tilestream.reference import activation

SCALE_K = 128  # consecutive k that share an activation scale; the last of a row may be fewer


def dequantise(q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, group: int) -> torch.Tensor:
    """q * scale + zero by group.

    Args:
        q: [n, k] integers.
        scale, zero: [n, ceil(k / group)].
        group: consecutive k that share them; the last of a row may be fewer.
    Returns:
        [n, k], float64.
    """

    def per_value(t: torch.Tensor) -> torch.Tensor:
        return t.double().repeat_interleave(group, 1)[:, : q.shape[1]]

    return q.double() * per_value(scale) + per_value(zero)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x . weight^T + bias.

    Args:
        x: [m, k].
        weight: [n, k].
        bias: [n] or None.
    Returns:
        [m, n], float64.
    """
    y = x.double() @ weight.double().T
    return y if bias is None else y + bias.double()


def gated(y: torch.Tensor, gate: str) -> torch.Tensor:
    """act(y[:, ::2]) * y[:, 1::2].

    Args:
        y: [m, 2n].
        gate: "silu" or "gelu_tanh".
    Returns:
        [m, n], float64.
    """
    act = {"silu": activation.silu_and_mul, "gelu_tanh": activation.gelu_tanh_and_mul}[gate]
    return act(torch.cat([y[:, ::2], y[:, 1::2]], -1))


def quantise(x: torch.Tensor, k4: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers per row and span of 128: scale = max|x| / 127; for the first k4 elements max|x| / 8, or / -8 where x = max|x|.

    Args:
        x: [m, k].
        k4: a multiple of 128.
    Returns:
        q: [m, k], int64 in -127..127 or -8..7, rounded to nearest (ties to even).
        scale: [m, ceil(k / 128)], float64; 0 for a span of zeros.
    """
    m, k = x.shape
    padded = torch.nn.functional.pad(x.double(), (0, -k % SCALE_K)).unflatten(1, (-1, SCALE_K))
    int4, amax = k4 // SCALE_K, padded.abs().amax(-1)
    scale = amax / 127
    scale[:, :int4] = (amax / torch.where(padded.amax(-1) == amax, -8, 8))[:, :int4]
    q = torch.round(padded / torch.where(scale == 0, 1.0, scale).unsqueeze(-1))
    q[:, :int4].clamp_(max=7)
    return q.flatten(1)[:, :k].long(), scale


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """x [m, k] with each 128 elements multiplied by the orthogonal Hadamard matrix, float64: entry (i, j) is -1 to the number of
    bits that i and j share, over the root of 128."""
    i = torch.arange(SCALE_K)
    shared = (i[:, None] & i)[:, :, None] >> torch.arange(7) & 1
    matrix = (1 - 2 * (shared.sum(2) % 2)).double() / SCALE_K**0.5
    return (x.double().unflatten(1, (-1, SCALE_K)) @ matrix).flatten(1)


def unpack_rows(q: torch.Tensor, k4: int) -> torch.Tensor:
    """The integers of quantised rows, [m, k] int64, from q [m, k - k4 / 2] int8."""
    nibbles = q[:, : k4 // 2].unflatten(1, (-1, 16)).long()
    low = ((nibbles & 15) ^ 8) - 8
    return torch.cat([torch.cat([low, nibbles >> 4], -1).flatten(1), q[:, k4 // 2 :].long()], 1)


def dequantise_rows(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """q * scale of its span: [m, k] float64 from q [m, k] and scale [m, ceil(k / 128)]."""
    return q.double() * scale.double().repeat_interleave(SCALE_K, 1)[:, : q.shape[1]]


def linear_int8(x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, group: int,
                bias: torch.Tensor | None = None, k4: int = 0) -> torch.Tensor:
    """What `linear` on a group-quantised weight computes, without its float32 rounding.

    y[m, n] = sum over spans of x_scale * sum over its groups of (scale * (x_q . w_q) + zero * sum(x_q))

    Args:
        x: [m, k].
        q: [n, k] unsigned weights.
        scale, zero: [n, ceil(k / group)], group a multiple of 32.
        group: consecutive k that share them.
        k4: how many leading elements of a row are INT4.
    Returns:
        [m, n], float64.
    """
    return linear(dequantise_rows(*quantise(x, k4)), dequantise(q, scale, zero, group), bias)
