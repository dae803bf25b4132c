"""States and token counts of one request, and what its reader gets after each step."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from tilestream.engine.constraints import Matcher
from tilestream.engine.detokenizer import Detokenizer
from tilestream.engine.prefix_cache import CacheNode
from tilestream.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOptions:
    """What a request asks of the scheduler, and not of the model.

    Args:
        priority: lower runs sooner, where the policy looks at it (vLLM's meaning).
        tenant: whose request it is; tenants share the engine fairly.
        cache_salt: the prefix cache shares pages only among requests of one tenant and one salt.
        deadline_s: seconds of time.monotonic() after which nobody wants the answer; None: never.
    """

    priority: int = 0
    tenant: str = ""
    cache_salt: str = ""
    deadline_s: float | None = None

    @property
    def prefix_salt(self) -> str:
        """What the prefix cache shares within."""
        return f"{self.tenant}\n{self.cache_salt}" if self.tenant else self.cache_salt


class RequestState(Enum):
    WAITING = "waiting"  # queued, holds no page
    RUNNING = "running"  # holds pages
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Request:
    """One request. There are no phases: `num_computed_tokens` catches up with `num_tokens`, in chunks
    while it is far behind (prefill, or recomputing after a preemption), by one when it is one behind.

    `token_ids` is the prompt and then the output. While a step runs that the engine does not wait for, the token it will
    draw stands there as -1 - (its row among the step's samples). `pages[i]` holds the KV of tokens
    [i * page_size, (i + 1) * page_size). Times are seconds of time.monotonic().
    """

    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    seed: int
    detokenizer: Detokenizer
    arrival_s: float
    max_num_tokens: int  # it ends when it has so many
    options: RequestOptions = RequestOptions()
    arrival_index: int = 0  # its place in the order in which the scheduler got to know them
    edits_logits: bool = False  # before the draw
    end_token_ids: tuple[int, ...] = ()  # tokens that end it, and that may not come before min_tokens
    matcher: Matcher | None = None  # follows the constraint

    state: RequestState = RequestState.WAITING
    num_computed_tokens: int = 0
    num_pending_tokens: int = 0  # at the end of token_ids, drawn by steps that still run
    num_served_tokens: int = 0  # computed before its last preemption
    num_cached_tokens: int | None = None  # prompt tokens found in the prefix cache; None: not admitted yet
    pages: list[int] = field(default_factory=list)
    cache_node: CacheNode | None = None  # end of the chain of pages known to the prefix cache
    num_registered_pages: int = 0  # length of that chain
    first_scheduled_s: float | None = None
    first_token_s: float | None = None
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # of prompt tokens 1 and on, as far as computed

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_known_tokens(self) -> int:
        return len(self.token_ids) - self.num_pending_tokens

    @property
    def num_output_tokens(self) -> int:
        """Of the answer as far as it is known."""
        return len(self.token_ids) - self.num_pending_tokens - self.num_prompt_tokens

    @property
    def num_draws(self) -> int:
        """Output tokens drawn so far, those of steps that still run included."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def lacks_prompt_logprobs(self) -> bool:
        """Whether tokens of the prompt are still to be scored: then all of it is computed, and none taken from a cache."""
        return self.params.prompt_logprobs is not None and len(self.prompt_logprobs) < self.num_prompt_tokens - 1

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural-log probabilities at one position. `top`: (token id, logprob), most likely first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True, kw_only=True)  # not frozen: one is made per token, and that takes a frozen one four times as long
class RequestDelta:
    """What is new for one request. The delta with a finish_reason is its last.

    prompt_logprobs: of the prompt's tokens from the second on, with the first token, where asked for.
    text: new text, whole characters only; it may lag behind token_ids (a character or a possible stop
        string still incomplete) and never leads.
    stop_reason: the stop string or stop token id that ended it; None for end-of-sequence. With finish_reason "error"
        "constraint" if it was too much for its own constraint.
    error: a sentence for people, with finish_reason "error"; with "length", too, where the size of the KV
        cache and not the request set the limit.
    Times are seconds of time.monotonic(), None where it has not happened.
    """

    request_id: str
    text: str = ""
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int = 0
    arrival_s: float | None = None
    first_scheduled_s: float | None = None
    first_token_s: float | None = None
    finish_s: float | None = None
