"""Rounding of a weight to 4 bits: GPTQ (2210.17323) with groups whose scales and zeros are found beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

_LEVELS = 15
_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # of a group's range: what is cut off pays for finer steps
_PEAK = 8  # steps from 0 to the value of largest magnitude, whatever its sign, of a group whose steps meet 0 (GGUF's Q4_0)
# Of the mean of the Hessian's diagonal. GPTQ's 0.01 (section 3.3) fits the calibration text's rows and not the next text's.
_DAMPING = 0.1
_LAZY_COLUMNS = 64  # columns between two updates of all that follow


@dataclass(frozen=True, slots=True)
class Codes:
    """weight = q * scale + zero.

    Attributes:
        q: [n, k] uint8, 0..15.
        scale, zero: [n, ceil(k / group)] float16.
        group: consecutive k with one scale and one zero.
    """

    q: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    group: int

    def split(self, sizes: Sequence[int]) -> list[Codes]:
        """Parts of the output features, so many each."""
        return [
            Codes(*parts, self.group) for parts in zip(*(t.split(sizes) for t in (self.q, self.scale, self.zero)), strict=True)
        ]

    def dequantise(self) -> torch.Tensor:
        k = self.q.size(1)
        spread = [t.float().repeat_interleave(self.group, 1)[:, :k] for t in (self.scale, self.zero)]
        return self.q * spread[0] + spread[1]


def nearest(weight: torch.Tensor, group: int) -> Codes:
    """Every value to the nearest of 16 steps between its group's least and greatest."""
    low, high = _groups(weight, group).aminmax(dim=-1)
    scale, zero = _grid(low, high)
    return Codes(_round(_groups(weight, group), scale, zero).flatten(1)[:, : weight.size(1)], scale, zero, group)


def gptq(weight: torch.Tensor, hessian: torch.Tensor, group: int) -> Codes:
    """Codes with a small error of the linear's output: each column's error is made up for by the columns after it.

    Args:
        weight: [n, k] float32.
        hessian: [k, k], sum over rows x of x^T x.
        group: consecutive k with one scale and one zero.
    """
    n, k = weight.shape
    importance = hessian.diagonal().clamp_min(1e-8 * float(hessian.diagonal().mean()) + 1e-30)
    scale, zero = _search_grid(weight, importance, group)
    order = importance.argsort(descending=True)
    # Transposed, so that a column lies together.
    column_scale, column_zero = (t.float().t()[order // group] for t in (scale, zero))
    left, q = weight.t()[order], torch.empty(k, n, dtype=torch.uint8)
    upper = torch.linalg.cholesky(_damped_inverse(hessian[order][:, order]), upper=True)
    feedback = upper / upper.diagonal()[:, None]
    for begin in range(0, k, _LAZY_COLUMNS):
        end = min(begin + _LAZY_COLUMNS, k)
        errors = torch.empty(end - begin, n)
        for i in range(begin, end):
            steps = _steps(left[i], column_scale[i], column_zero[i])
            q[i] = steps
            errors[i - begin] = left[i] - (steps * column_scale[i] + column_zero[i])
            left[i + 1 : end].addr_(feedback[i, i + 1 : end], errors[i - begin], alpha=-1)
        left[end:].addmm_(feedback[begin:end, end:].t(), errors, alpha=-1)
    return Codes(q[order.argsort()].t().contiguous(), scale, zero, group)


def squared_output(weight: torch.Tensor, hessian: torch.Tensor) -> float:
    """|x . weight^T|^2, summed over the Hessian's rows x."""
    return float((weight @ hessian * weight).sum())


def _damped_inverse(hessian: torch.Tensor) -> torch.Tensor:
    """Its inverse, after what keeps a Hessian of few or of equal rows from being singular."""
    damping = _DAMPING * hessian.diagonal().mean() + 1e-30
    return torch.cholesky_inverse(torch.linalg.cholesky(hessian + damping * torch.eye(hessian.size(0))))


def _groups(weight: torch.Tensor, group: int) -> torch.Tensor:
    """[n, groups, group]; a last group that is not full repeats its last value."""
    short = -weight.size(1) % group
    padded = torch.cat([weight, weight[:, -1:].expand(-1, short)], 1) if short else weight
    return padded.unflatten(1, (-1, group))


def _grid(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return ((high - low) / _LEVELS).half(), low.half()


def _steps(values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    return ((values - zero) / scale.masked_fill(scale == 0, torch.inf)).round_().clamp_(0, _LEVELS)


def _round(groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    return _steps(groups, scale.float().unsqueeze(-1), zero.float().unsqueeze(-1)).to(torch.uint8)


def _search_grid(weight: torch.Tensor, importance: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each group, the steps that round to nearest with the least weighted error: over a share of its range, or of its peak."""
    groups = _groups(weight, group)
    weights = F.pad(importance, (0, -weight.size(1) % group)).unflatten(0, (-1, group))
    low, high = groups.aminmax(dim=-1)
    peak = torch.where(high > -low, high, low)
    grids = [_grid(low * shrink, high * shrink) for shrink in _SHRINKS]
    grids += [((peak * shrink / -_PEAK).half(), (peak * shrink).half()) for shrink in _SHRINKS]
    best = torch.full_like(low, torch.inf)
    best_scale, best_zero = grids[0]
    for scale, zero in grids:
        s, z = scale.float().unsqueeze(-1), zero.float().unsqueeze(-1)
        error = ((_steps(groups, s, z) * s + z - groups).square_() * weights).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
    return best_scale, best_zero
