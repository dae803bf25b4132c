"""Tilestream: attention and decoding kernels for LLM serving, and the scheduler that composes them.

`LLM` and `SamplingParams` generate text, `Constraint` says what it must look like; `tilestream.ops` are the kernels, and
importing it registers `torch.ops.tilestream`. `LLM` and `ops` are loaded when they are first used, so that
`import tilestream` does not cost torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from tilestream.constraint import Constraint
from tilestream.sampling_params import SamplingParams

if TYPE_CHECKING:
    from tilestream import ops
    from tilestream.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "Constraint", "SamplingParams", "ops"]


def __getattr__(name: str):
    if name == "LLM":
        return importlib.import_module("tilestream.llm").LLM
    if name == "ops":
        return importlib.import_module("tilestream.ops")
    raise AttributeError(f"module 'tilestream' has no attribute {name!r}")
