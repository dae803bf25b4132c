"""The engine's runner on rank 0 of a tensor-parallel group: what it launches, all ranks do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tilestream.distributed.control import ClearPages, StepWriter
from tilestream.distributed.ranks import Ranks
from tilestream.engine.protocols import Runner
from tilestream.engine.step_plan import SampledTokens, StepPlan


class TensorParallelRunner:
    """See Runner. An error in the middle of a step leaves the ranks waiting for each other: it is the end of all of them.

    Args:
        runner: of this rank's part; its launch() takes the draws too.
        ranks: the others, which have built theirs.
        draws: what the others need to know for their part of the draw.
    """

    def __init__(self, runner: Runner, ranks: Ranks, draws: Callable[[StepPlan], Any]) -> None:
        self.vocab_size = runner.vocab_size
        self.overlaps = runner.overlaps
        self._runner, self._ranks, self._draws = runner, ranks, draws
        self._steps = StepWriter()

    def launch(self, plan: StepPlan) -> Any:
        draws = self._draws(plan)
        with self._for_all():
            self._ranks.send(self._steps.write(plan, draws))
            return self._runner.launch(plan, draws)

    def collect(self, launched: Any) -> SampledTokens:
        with self._for_all():
            return self._runner.collect(launched)

    def check(self) -> None:
        pass  # whatever goes wrong is the end at once

    def clear_pages(self, num_pages: int) -> None:
        with self._for_all():
            self._ranks.tell(ClearPages(num_pages))
            self._runner.clear_pages(num_pages)

    @contextmanager
    def _for_all(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            failure = self._ranks.fail(error)
            raise failure from (None if failure is error else error)
        except BaseException as error:  # an interruption
            self._ranks.fail(error)
            raise
