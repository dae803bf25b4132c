"""What LLM.generate() gives for a request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tilestream.engine.request import FinishReason, RequestDelta, TokenLogprobs


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A finished request.

    Args:
        prompt: as given, None for token ids.
        prompt_token_ids, token_ids: the prompt's and the answer's tokens.
        text: the answer.
        logprobs: one entry per answer token, when asked for; prompt_logprobs: per prompt token but the first.
        finish_reason: "stop", "length", "abort" or "error"; stop_reason: the stop string or token, if any.
        error: a sentence, with finish_reason "error".
        num_cached_tokens: prompt tokens whose KV was found in the prefix cache.
        ttft_s: seconds from the request's arrival to its first token; e2e_s: to its end.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    prompt_logprobs: list[TokenLogprobs] | None
    finish_reason: FinishReason
    stop_reason: str | int | None
    error: str | None
    num_cached_tokens: int
    ttft_s: float | None
    e2e_s: float | None

    @staticmethod
    def of(prompt: str | Sequence[int], token_ids: list[int], deltas: Sequence[RequestDelta]) -> RequestOutput:
        """From all deltas of the request, and its prompt's tokens."""
        last = deltas[-1]
        logprobs = [entry for delta in deltas for entry in delta.logprobs or ()]
        return RequestOutput(
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=token_ids,
            text="".join(delta.text for delta in deltas),
            token_ids=[token for delta in deltas for token in delta.token_ids],
            logprobs=logprobs if any(delta.logprobs is not None for delta in deltas) else None,
            prompt_logprobs=next((d.prompt_logprobs for d in deltas if d.prompt_logprobs is not None), None),
            finish_reason=last.finish_reason,
            stop_reason=last.stop_reason,
            error=last.error,
            num_cached_tokens=last.num_cached_tokens,
            ttft_s=None if last.first_token_s is None else last.first_token_s - last.arrival_s,
            e2e_s=None if last.finish_s is None else last.finish_s - last.arrival_s,
        )
