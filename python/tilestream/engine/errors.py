"""What add_request refuses, and how a dead engine says so."""

from __future__ import annotations


class PromptTooLongError(ValueError):
    """A prompt that can never be answered: HTTP 400.

    Args:
        num_prompt_tokens: what came.
        limit_tokens: the most that is allowed.
        limit_name: which limit that is, in words.
    """

    def __init__(self, num_prompt_tokens: int, limit_tokens: int, limit_name: str) -> None:
        super().__init__(
            f"the prompt has {num_prompt_tokens} tokens, but at most {limit_tokens} are allowed ({limit_name})"
        )
        self.num_prompt_tokens = num_prompt_tokens
        self.limit_tokens = limit_tokens


class QueueFullError(RuntimeError):
    """Too much waits already; trying again later may work: HTTP 503.

    Args:
        num_waiting: requests, or prompt tokens, that wait now.
        limit: the most that may.
        unit: which of the two: "requests" or "prompt tokens".
        retry_after_s: when what waits now should be through, by what was computed per second lately.
    """

    def __init__(self, num_waiting: int, limit: int, *, unit: str = "requests", retry_after_s: int = 1) -> None:
        super().__init__(f"the queue is full: {num_waiting} {unit} wait, at most {limit} may")
        self.num_waiting = num_waiting
        self.limit = limit
        self.retry_after_s = retry_after_s


class EngineDeadError(RuntimeError):
    """The engine's thread has ended (shutdown or a fault in the engine itself): no request can run."""


class RankDiedError(EngineDeadError):
    """A rank of a tensor-parallel group has died or does not answer; the text names it."""
