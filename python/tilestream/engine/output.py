"""What a drawn token means for its request: new text, logprobs, perhaps the end."""

from __future__ import annotations

from collections.abc import Set

from tilestream.engine.config import EngineConfig
from tilestream.engine.request import FinishReason, Request, RequestDelta, RequestState, TokenLogprobs
from tilestream.engine.step_plan import PromptScores, SampledTokens, StepPlan


def read_token(
    request: Request, token_id: int, eos_token_ids: Set[int], config: EngineConfig
) -> tuple[str, FinishReason | None, str | int | None, str | None]:
    """New text, and if the request ends here: why, by which stop string or token, and a note for people."""
    params = request.params
    if request.matcher is not None:
        request.matcher.accept(token_id)
    is_stop_token = token_id in params.stop_token_ids
    is_eos = token_id in eos_token_ids and not params.ignore_eos
    text, stop_string = "", None
    if not (is_eos or is_stop_token) or params.include_stop_str_in_output:
        may_stop = request.num_output_tokens > params.min_tokens
        text, stop_string = request.detokenizer.append(token_id, may_stop=may_stop)
    if is_stop_token:
        return text, "stop", token_id, None
    if is_eos or (request.matcher is not None and request.matcher.is_complete and stop_string is None):
        return text, "stop", None, None
    if stop_string is not None:
        return text, "stop", stop_string, None
    if request.num_known_tokens < request.max_num_tokens:
        return text, None, None, None
    return text, "length", None, _capacity_note(request, config)


def _capacity_note(request: Request, config: EngineConfig) -> str | None:
    """Says so when the size of the cache, and nothing that the request asked for, has ended it."""
    num_tokens = request.num_known_tokens
    if request.num_output_tokens == request.params.max_tokens or num_tokens >= config.max_model_len:
        return None
    return (
        f"the request ended at {num_tokens} tokens because the whole KV cache holds {config.capacity_tokens}; a larger "
        f"kv_cache_tokens lets it go on to max_model_len = {config.max_model_len}"
    )


def row_logprobs(request: Request, sampled: SampledTokens, row: int) -> list[TokenLogprobs] | None:
    """Of the token of one row, as far as its request asks for them."""
    num_top = request.params.logprobs
    if num_top is None:
        return None
    top: tuple[tuple[int, float], ...] = ()
    if num_top > 0:
        top = tuple(zip(sampled.top_ids[row][:num_top], sampled.top_logprobs[row][:num_top], strict=True))
    return [TokenLogprobs(sampled.token_ids[row], sampled.logprobs[row], top)]


def take_prompt_scores(scores: PromptScores) -> None:
    """Add to its request's prompt_logprobs what is new; after a preemption the first of them are there already."""
    request, num_top = scores.request, scores.request.params.prompt_logprobs
    if request.state is RequestState.FINISHED:
        return
    for position in range(1 + len(request.prompt_logprobs), scores.start + len(scores.logprobs)):
        row = position - scores.start
        top = tuple(zip(scores.top_ids[row][:num_top], scores.top_logprobs[row][:num_top], strict=True))
        request.prompt_logprobs.append(TokenLogprobs(request.token_ids[position], scores.logprobs[row], top))


def delta_of(
    request: Request, text: str, token_ids: list[int], logprobs: list[TokenLogprobs] | None
) -> RequestDelta:
    """A delta of a request as it stands."""
    prompt_logprobs = None
    if request.params.prompt_logprobs is not None and request.num_output_tokens <= 1:
        prompt_logprobs = request.prompt_logprobs
    return RequestDelta(
        request_id=request.request_id,
        text=text,
        token_ids=token_ids,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        num_prompt_tokens=request.num_prompt_tokens,
        num_output_tokens=request.num_output_tokens,
        num_cached_tokens=request.num_cached_tokens or 0,
        arrival_s=request.arrival_s,
        first_scheduled_s=request.first_scheduled_s,
        first_token_s=request.first_token_s,
    )


def check_row_count(sampled: SampledTokens, plan: StepPlan) -> None:
    if len(sampled.token_ids) != plan.num_samples:
        raise RuntimeError(f"the runner gave {len(sampled.token_ids)} tokens for {plan.num_samples} sampling rows")
