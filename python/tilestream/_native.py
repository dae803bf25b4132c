"""Loads tilestream._C, which registers the ops, after making sure that it fits the torch that is running."""

from __future__ import annotations

import torch

try:
    from tilestream import _build_info
except ImportError as error:
    raise ImportError("tilestream's native part is not built: run `pip install .` in its source tree") from error

if _build_info.TORCH_VERSION != torch.__version__:
    raise ImportError(
        f"tilestream was built for torch {_build_info.TORCH_VERSION}, and this is torch {torch.__version__}: "
        "reinstall tilestream in this environment (pip install --force-reinstall --no-deps tilestream, or `pip install .` "
        "in its source tree)"
    )

from tilestream import _C  # noqa: E402

_C.num_threads()  # reads TILESTREAM_NUM_THREADS and TILESTREAM_PIN_THREADS: a bad value is an error now, not in mid-step

__all__ = ["_C"]
