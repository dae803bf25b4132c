"""Which page layouts the backend of the running test knows."""

from __future__ import annotations

import pytest

from tests.on_device import OnDevice
from tilestream._native import _C


def layout_or_own(layout: str | None) -> str:
    """`layout`, or if it is None the backend's own. Skips the test where the backend does not know it."""
    on_cuda = _C.simd_level() == "simt" or OnDevice.active is not None
    if layout == "blocked" and on_cuda:
        pytest.skip("the blocked layout is the CPU backend's own")
    return layout or ("hnd" if on_cuda else "blocked")
