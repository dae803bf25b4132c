"""What is refused at the door: prompts that can never be answered, and requests that the queue has no room for."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

from tilestream.engine.config import EngineConfig
from tilestream.engine.errors import PromptTooLongError, QueueFullError
from tilestream.sampling_params import SamplingParams

_KEPT = 0.99  # of what was measured, from step to step: about the last hundred count


def checked_prompt(
    prompt_token_ids: Sequence[int], params: SamplingParams, config: EngineConfig, vocab_size: int
) -> list[int]:
    """The prompt as a list of its own; what it raises: see Engine.validate."""
    if not isinstance(params, SamplingParams):
        raise TypeError(f"params must be SamplingParams, got {type(params).__name__}")
    try:
        token_ids = [operator.index(token_id) for token_id in prompt_token_ids]
    except TypeError as error:
        raise TypeError(f"prompt_token_ids must be integers: {error}") from None
    if not token_ids:
        raise ValueError("the prompt is empty: at least one token is needed")
    if len(token_ids) >= config.max_model_len:
        limit_name = f"max_model_len is {config.max_model_len}, and one token is for the output"
        raise PromptTooLongError(len(token_ids), config.max_model_len - 1, limit_name)
    if len(token_ids) > config.capacity_tokens:
        raise PromptTooLongError(len(token_ids), config.capacity_tokens, "the size of the whole KV cache")
    if min(token_ids) < 0 or max(token_ids) >= vocab_size:
        index = next(i for i, token_id in enumerate(token_ids) if not 0 <= token_id < vocab_size)
        raise ValueError(f"prompt_token_ids[{index}] is {token_ids[index]}; token ids are 0..{vocab_size - 1}")
    return token_ids


class QueueLimits:
    """Who may still join the queue, and when those who may not should ask again.

    Args:
        config: max_queued_requests and max_queued_tokens.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._tokens = self._seconds = 0.0  # of the steps so far, the older the less

    def count_step(self, num_tokens: int, seconds: float) -> None:
        """A step has computed so many tokens."""
        self._tokens = self._tokens * _KEPT + num_tokens
        self._seconds = self._seconds * _KEPT + seconds

    def check(self, num_prompt_tokens: int, num_waiting_requests: int, num_waiting_tokens: int) -> None:
        """Whether one more may wait.

        Raises:
            QueueFullError: it may not.
        """
        config = self._config
        most_tokens = config.max_queued_tokens
        if num_waiting_requests >= config.max_queued_requests:
            raise QueueFullError(
                num_waiting_requests, config.max_queued_requests, retry_after_s=self._retry_after_s(num_waiting_tokens)
            )
        if most_tokens is not None and 0 < num_waiting_tokens and num_waiting_tokens + num_prompt_tokens > most_tokens:
            raise QueueFullError(
                num_waiting_tokens, most_tokens, unit="prompt tokens", retry_after_s=self._retry_after_s(num_waiting_tokens)
            )

    def _retry_after_s(self, num_waiting_tokens: int) -> int:
        """What waits over what was computed per second lately, in whole seconds."""
        return max(1, math.ceil(num_waiting_tokens * self._seconds / self._tokens)) if self._tokens > 0 else 1
