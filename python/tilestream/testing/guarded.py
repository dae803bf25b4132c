"""Tensors that betray a kernel which reads or writes where it must not."""

from __future__ import annotations

import torch

_MARGIN = 32  # elements on each side, and between rows


class Guarded:
    """A tensor inside a larger one whose other elements hold a sentinel, with strides that are not contiguous.

    Args:
        shape: of `tensor`; its last dimension stays contiguous, all others have gaps.
        dtype: any.
        fill: what `tensor` holds at first; default the sentinel, so that an element never written shows.
    Attributes:
        tensor: the view to hand to an op.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, fill: torch.Tensor | None = None) -> None:
        self.sentinel = float("nan") if dtype.is_floating_point else 77
        padded = [size + 1 for size in shape[:-1]] + [shape[-1] + _MARGIN]
        self.whole = torch.full((_MARGIN + torch.Size(padded).numel() + _MARGIN,), self.sentinel, dtype=dtype)
        strides = torch.empty(padded, device="meta").stride()
        self.tensor = self.whole.as_strided(shape, strides, _MARGIN)
        if fill is not None:
            self.tensor.copy_(fill)

    def assert_untouched_outside(self) -> None:
        """Raises AssertionError if anything but `tensor` was written."""
        inside = torch.zeros(self.whole.shape, dtype=torch.bool)
        inside.as_strided(self.tensor.shape, self.tensor.stride(), _MARGIN).fill_(True)
        outside = self.whole[~inside]
        kept = outside.isnan() if outside.is_floating_point() else outside == self.sentinel
        assert bool(kept.all()), f"{int((~kept).sum())} elements outside the output were written"


def guarded_contiguous(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A contiguous sentinel-filled tensor and the whole buffer around it.

    Returns:
        tensor: [*shape].   whole: 1-D; its first and last 32 elements must stay the sentinel (NaN, or 77).
    """
    sentinel = float("nan") if dtype.is_floating_point else 77
    whole = torch.full((2 * _MARGIN + torch.Size(shape).numel(),), sentinel, dtype=dtype)
    return whole[_MARGIN : whole.numel() - _MARGIN].view(shape), whole


def assert_margins(whole: torch.Tensor) -> None:
    """Raises AssertionError if a margin of `guarded_contiguous` was written."""
    margins = torch.cat([whole[:_MARGIN], whole[-_MARGIN:]])
    kept = margins.isnan() if whole.is_floating_point() else margins == 77
    assert bool(kept.all()), f"{int((~kept).sum())} elements around the output were written"
