"""A model whose parts are on several ranks, as rank 0 has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tilestream._native import _C
from tilestream.distributed.control import Build
from tilestream.distributed.launch import gather
from tilestream.distributed.tensor_parallel_runner import TensorParallelRunner
from tilestream.distributed.worker import work_if_not_first
from tilestream.engine.config import EngineConfig
from tilestream.engine.errors import RankDiedError
from tilestream.engine.sampling_shards import draw_plan
from tilestream.models.errors import ModelLoadError
from tilestream.models.loader import resolve
from tilestream.placement import Placement

if TYPE_CHECKING:
    from tilestream.loading import ModelOptions


class Leader:
    """As tilestream.loading.Part, of all ranks. Where torchrun has made this process another rank, it works instead, and
    ends.

    Args:
        options: what to load, on how many ranks.
        progress: as for load_model, of this rank's part.
    """

    def __init__(self, options: ModelOptions, progress: Callable[[int, int], None] | None = None) -> None:
        world_size = options.tensor_parallel_size
        work_if_not_first(world_size)
        Placement.of(options.device)  # what cannot be is told before the others are started
        resolve(options.model)
        self._num_threads = _C.num_threads()
        self._ranks, place = gather(world_size, options.load, device_type=options.device)
        try:
            self._part = options.load(place, progress)
            others = self._ranks.answers()
        except (ModelLoadError, ValueError, KeyboardInterrupt):  # the first two: every rank finds the same
            self.close()
            raise
        except BaseException as error:  # perhaps what another rank's death has done to this one
            failure = self._ranks.fail(error)
            self.close()
            raise failure from None
        self.loaded = self._part.loaded
        self.room_tokens = min([self._part.room_tokens, *(room_tokens for room_tokens, _ in others)])
        self.weight_bytes = sum([self._part.weight_bytes, *(weight_bytes for _, weight_bytes in others)])

    def build(self, config: EngineConfig) -> TensorParallelRunner:
        self._ranks.tell(Build(config))
        try:
            runner = self._part.build(config)
            self._ranks.answers()
        except Exception as error:
            raise self._ranks.fail(error) from None
        return TensorParallelRunner(runner, self._ranks, draw_plan)

    def on_failure(self, told: Callable[[RankDiedError], None]) -> None:
        self._ranks.on_failure(told)

    def close(self) -> None:
        self._ranks.close()
        _C.set_num_threads(self._num_threads)  # the ranks shared the cores
