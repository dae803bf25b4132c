"""How much prefill a step gets: a fixed number of tokens, or what a target for the time between tokens leaves."""

from __future__ import annotations

from tilestream.engine.config import EngineConfig
from tilestream.engine.cost_model import CostModel, StepCounts

# A prefill chunk that a limit cuts ends where the step's tokens fill whole tiles of this many rows, since a
# partial tile costs as much as a full one (257 tokens cost 32% more than 256: Sarathi-Serve, arXiv 2403.02310).
TILE_TOKENS = 32

_WEIGHT, _MOST_SLOWDOWN = 0.1, 4.0  # of one step in the mean; one hiccup says little


class StepBudget:
    """Cuts prefill chunks.

    Args:
        config: token_budget and tbt_ms.
        cost_model: what a step costs; needed with tbt_ms, and used with it alone.
    Attributes:
        slowdown: what steps with prefill took lately over what the cost model said, a running mean, at least 1: the target
            is divided by it, so that it is kept on a machine that got other work since the cost model was measured.
    """

    def __init__(self, config: EngineConfig, cost_model: CostModel | None) -> None:
        if config.tbt_ms is not None and cost_model is None:
            raise ValueError(f"tbt_ms is {config.tbt_ms}: that needs a cost model")
        self._token_budget = config.token_budget
        self._cost_model = cost_model if config.tbt_ms is not None else None
        self._target_s = (config.tbt_ms or 0) / 1e3
        self.slowdown = 1.0

    def chunk_tokens(self, step: StepCounts, start: int, num_uncomputed: int, room_tokens: int) -> int:
        """Tokens of a prefill that run in a step: all that are uncomputed, or what is left, cut back to a whole tile if it
        reaches one. With a target the first chunk of a step is a tile at least, whatever that takes: prefills never starve.

        Args:
            step: what is in the step so far.
            start: tokens computed before.
            room_tokens: those that pages are left for.
        """
        most = min(self._token_budget - step.num_tokens, room_tokens, num_uncomputed)
        if most <= 0:
            return 0
        least = 0
        if self._cost_model is not None:
            if step.num_prefill_tokens == 0:
                least = min(most, TILE_TOKENS)
            most = max(least, self._cost_model.affordable_tokens(step, start, most, self._target_s / self.slowdown))
        if most == num_uncomputed:
            return most
        to_tile_border = (step.num_tokens + most) // TILE_TOKENS * TILE_TOKENS - step.num_tokens
        return max(least, to_tile_border if to_tile_border > 0 else most)

    def observe(self, step: StepCounts, seconds: float) -> None:
        """A step has taken so long, from the end of the one before."""
        if self._cost_model is not None and step.num_prefill_tokens > 0:
            expected_s = max(self._cost_model.step_s(step), 1e-9)
            ratio = min(seconds / expected_s, _MOST_SLOWDOWN)
            self.slowdown = max(1.0, self.slowdown + _WEIGHT * (ratio - self.slowdown))
