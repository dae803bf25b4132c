"""Error bounds: how far a kernel may be from float64, and the assertions that hold it to that."""

from __future__ import annotations

import torch


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of one rounding to `dtype`."""
    return torch.finfo(dtype).eps / 2


def assert_same_special(got: torch.Tensor, want: torch.Tensor, name: str = "result") -> None:
    """NaN and infinities have to stand at the same positions.

    Args:
        got, want: same shape.
        name: used in the message.
    Raises:
        AssertionError: shapes differ, or where the first difference is.
    """
    assert got.shape == want.shape, f"{name} has shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    for kind, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        differs = (test(got) != test(want)).nonzero()
        assert len(differs) == 0, (
            f"{name}: {len(differs)} positions differ in being {kind}, first at {differs[0].tolist()}: "
            f"got {got[tuple(differs[0])]}, expected {want[tuple(differs[0])]}"
        )


def max_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest absolute difference over the finite positions of `want`; NaN if `got` has one there."""
    finite = torch.isfinite(want)
    if not bool(finite.any()):
        return 0.0
    return float((got.double() - want.double())[finite].abs().max())


def assert_within(got: torch.Tensor, want: torch.Tensor, bound: float, name: str = "result") -> None:
    """max |got - want| <= bound, after NaN and infinities were found at the same positions.

    Args:
        got: what the kernel gave.
        want: the reference, same shape.
        bound: absolute.
    Raises:
        AssertionError: with the error, the bound and where the error is largest.
    """
    assert_same_special(got, want, name)
    err = max_error(got, want)
    where = None
    if not err <= bound:
        distance = torch.where(torch.isfinite(want), (got.double() - want.double()).abs(), 0.0)
        where = torch.unravel_index(distance.argmax(), distance.shape)
        where = [int(i) for i in where]
    assert err <= bound, (
        f"{name}: error {err:.3e} > bound {bound:.3e}, largest at {where}: got {got[tuple(where)]}, expected {want[tuple(where)]}"
    )


def plain_bound(want: torch.Tensor, plain: torch.Tensor, dtype: torch.dtype) -> float:
    """The project's rule: twice the error of plain torch, plus one rounding of the output.

    Plain torch rounds its output too. In a handful of elements that rounding may happen to be small, so its error
    counts as at least the largest that one rounding can make.

    Args:
        want: the float64 reference.
        plain: the same formula in plain torch in the kernel's dtype.
        dtype: the kernel's output dtype.
    Returns:
        The absolute bound for max |got - want|.
    """
    finite = want[torch.isfinite(want)]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    rounding = unit_roundoff(dtype) * largest
    return 2.0 * max(max_error(plain, want), rounding) + rounding


def worst_of(attempts: list[torch.Tensor], want: torch.Tensor) -> torch.Tensor:
    """Of several plain results (sums taken in different orders, say), the one that errs most, element by element."""
    worst = want
    for attempt in attempts:
        worst = torch.where((attempt - want).abs() > (worst - want).abs(), attempt.to(want.dtype), worst)
    return worst


def assert_as_good_as_plain(
    got: torch.Tensor, want: torch.Tensor, plain: torch.Tensor, name: str = "result"
) -> None:
    """`got` errs at most 2x what plain torch errs in the same dtype, plus one rounding of the output.

    Args:
        got: what the kernel gave, in its output dtype.
        want: the float64 reference, same shape.
        plain: plain torch in the same dtype, same shape.
    Raises:
        AssertionError: with both errors.
    """
    assert_within(got, want, plain_bound(want, plain, got.dtype), name)
