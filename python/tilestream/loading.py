"""What an LLM loads and how it runs it: the same on every rank."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tilestream._native import _C
from tilestream.calibrate import use_softmax_ranges
from tilestream.distributed.communicator import Communicator, connect
from tilestream.distributed.shard import MOST_RANKS
from tilestream.distributed.torchrun import Place
from tilestream.engine.config import EngineConfig
from tilestream.engine.errors import EngineDeadError
from tilestream.engine.runner import ModelRunner
from tilestream.kv_size import default_kv_cache_tokens
from tilestream.layers.scratch import scratch_bytes
from tilestream.models import LoadedModel, ModelConfig, load_model
from tilestream.ops.kv_cache import KV_DTYPES
from tilestream.placement import Placement

if TYPE_CHECKING:
    from tilestream.distributed.leader import Leader

# What this process would compute with; ranks of one machine share it.
_NUM_THREADS = _C.num_threads()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """How a model is loaded; see LLM.

    Args:
        most_tokens: of a step.
    Raises:
        ValueError: an option that is not allowed.
    """

    model: str
    device: str
    dtype: str
    kv_dtype: str
    act_bits: str
    page_size: int
    batch_invariant: bool
    softmax_ranges: str | os.PathLike | None
    num_threads: int | None
    most_tokens: int
    tensor_parallel_size: int

    def __post_init__(self) -> None:
        if self.kv_dtype not in KV_DTYPES:
            raise ValueError(f"kv_dtype is {self.kv_dtype!r}; supported: auto, {', '.join(KV_DTYPES)}")
        if not 1 <= self.tensor_parallel_size <= MOST_RANKS:
            raise ValueError(f"tensor_parallel_size is {self.tensor_parallel_size}; allowed: 1 to {MOST_RANKS}")
        if self.tensor_parallel_size > 1 and self.device not in ("cpu", "cuda"):
            raise ValueError(
                f"device is {self.device!r}; with tensor_parallel_size {self.tensor_parallel_size} allowed: cpu, and cuda, "
                "of which each rank takes the GPU of its number"
            )

    def load(self, place: Place | None = None, progress: Callable[[int, int], None] | None = None) -> Part:
        """Load a model, or what a rank has of it.

        Args:
            place: of this rank; None: there is one.
            progress: as for load_model.
        Raises:
            ModelLoadError, ValueError: as LLM.
        """
        self._set_num_threads(place)
        device = f"cuda:{place.local_rank}" if place is not None and self.device == "cuda" else self.device
        placement = Placement.of(device, batch_invariant=self.batch_invariant)
        if place is not None and placement.device.type == "cuda":
            torch.cuda.set_device(placement.device)

        def connect_ranks(config: ModelConfig) -> Communicator:
            shared_bytes, _ = scratch_bytes(config, placement, self.most_tokens)
            return connect(None, placement, num_bytes=shared_bytes)

        loaded = load_model(
            self.model, dtype=self.dtype, act_bits=self.act_bits, progress=progress, placement=placement,
            connect=None if place is None else connect_ranks,
        )  # fmt: skip
        if self.softmax_ranges is not None:
            use_softmax_ranges(loaded.model, self.softmax_ranges, kv_dtype=self.kv_dtype)
        num_sharers = 1 if place is None or device != "cpu" else place.local_world_size
        room_tokens = default_kv_cache_tokens(
            loaded.model.config, self.kv_dtype, self.page_size, placement.device, num_sharers
        )
        return Part(loaded, self.kv_dtype, room_tokens)

    def _set_num_threads(self, place: Place | None) -> None:
        if self.num_threads is not None:
            _C.set_num_threads(self.num_threads)
        elif place is not None and "TILESTREAM_NUM_THREADS" not in os.environ:
            _C.set_num_threads(max(1, _NUM_THREADS // place.local_world_size))


@dataclass(frozen=True, slots=True)
class Part:
    """A model, or what a rank has of it.

    Args:
        loaded: the model.
        kv_dtype: of its KV cache.
        room_tokens: that the KV cache may hold here, where nobody says how many it shall.
    """

    loaded: LoadedModel
    kv_dtype: str
    room_tokens: int

    @property
    def weight_bytes(self) -> int:
        return self.loaded.weight_bytes

    def build(self, config: EngineConfig) -> ModelRunner:
        """What runs it."""
        return ModelRunner(self.loaded.model, config, kv_dtype=self.kv_dtype)

    def on_failure(self, told: Callable[[EngineDeadError], None]) -> None:
        """Have somebody told, on another thread, when it can run no more. This one always can."""

    def close(self) -> None:
        """Nothing of it runs by itself."""


def load(options: ModelOptions, progress: Callable[[int, int], None] | None = None) -> Part | Leader:
    """The model, on as many ranks as are wanted."""
    if options.tensor_parallel_size == 1:
        return options.load(progress=progress)
    from tilestream.distributed.leader import Leader

    return Leader(options, progress)
