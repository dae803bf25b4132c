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
    """Too many requests wait already; trying again later may work: HTTP 503.

    Args:
        num_waiting: requests waiting now.
        max_queued_requests: the most that may wait.
        retry_after_s: when trying again may work.
    """

    def __init__(self, num_waiting: int, max_queued_requests: int, *, retry_after_s: int = 1) -> None:
        super().__init__(f"the queue is full: {num_waiting} requests wait, at most {max_queued_requests} may")
        self.num_waiting = num_waiting
        self.max_queued_requests = max_queued_requests
        self.retry_after_s = retry_after_s


class EngineDeadError(RuntimeError):
    """The engine's thread has ended (shutdown or a fault in the engine itself): no request can run."""
