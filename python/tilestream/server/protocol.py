"""What a request may say: the fields of OpenAI's API that we serve, and some of vLLM's.

Ranges of sampling values are checked once, by SamplingParams; here are the types and the shape.
A field we do not know is refused when it could change the answer, and ignored when it cannot.
"""

from __future__ import annotations

import time
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from tilestream.engine.request import RequestOptions
from tilestream.sampling_params import MAX_LOGPROBS, SamplingParams
from tilestream.server.errors import ApiError
from tilestream.server.fields import LogitBias, Prompt, Stop, StreamOptions, describe, short
from tilestream.server.messages import Message, Tool, ToolChoice
from tilestream.server.structured import StructuredFields

MAX_CHOICES = 128  # engine requests that one HTTP request may start: prompts x n. OpenAI's limit for n
_MAX_PRIORITY = 2**31 - 1

# Bookkeeping of the sender's: never changes the answer.
_IGNORED_FIELDS = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
)
# Known fields that we do not serve, with the values that ask for nothing, and why not.
_REFUSED_FIELDS: dict[str, tuple[tuple[object, ...], str]] = {
    "best_of": ((1,), "it is a field of /v1/completions"),
    "echo": ((False,), "it is a field of /v1/completions"),
    "function_call": (("none", "auto"), "use tool_choice"),
    "functions": (([],), "use tools"),
    "parallel_tool_calls": ((True, False), "it is a field of /v1/chat/completions"),
    "tool_choice": (("none", "auto"), "it is a field of /v1/chat/completions"),
    "tools": (([],), "it is a field of /v1/chat/completions"),
    "modalities": ((["text"],), "text is all there is"),
    "suffix": (("",), "the models here continue a text, they do not fill a gap"),
}


class GenerationRequest(StructuredFields):
    """The fields that completions and chat completions share."""

    model_config = ConfigDict(strict=True, extra="allow")
    prompt_field: ClassVar[str]  # the field that the model reads

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: LogitBias = None
    seed: int | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    min_tokens: int | None = None
    stop: Stop = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Annotated[int, Field(ge=-_MAX_PRIORITY, le=_MAX_PRIORITY)] | None = None
    cache_salt: str | None = None
    timeout: Annotated[float, Field(gt=0)] | None = None

    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def continuous_usage(self) -> bool:
        return self.include_usage() and self.stream_options.continuous_usage_stats

    def options(self) -> RequestOptions:
        """What the request asks of the scheduler."""
        deadline_s = None if self.timeout is None else time.monotonic() + self.timeout
        return RequestOptions(
            priority=self.priority or 0, cache_salt=self.cache_salt or "", deadline_s=deadline_s
        )

    def _sampling(self, num_choices: int, **fields: Any) -> list[SamplingParams]:
        """One SamplingParams per choice; with a seed, choice i samples with seed + i."""
        for name in _PLAIN_SAMPLING_FIELDS:
            if (value := getattr(self, name)) is not None:
                fields.setdefault(name, value)
        if self.stop is not None:
            fields["stop"] = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if self.stop_token_ids is not None:
            fields["stop_token_ids"] = tuple(self.stop_token_ids)
        seeds = [None if self.seed is None else self.seed + i for i in range(num_choices)]
        try:
            return [SamplingParams(**fields, seed=seed) for seed in seeds]
        except (ValueError, TypeError) as error:
            name = str(error).split(" ", 1)[0].rstrip(":")
            raise ApiError(400, str(error), param=name if name in type(self).model_fields else None) from None


_PLAIN_SAMPLING_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "min_tokens",
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
)


class CompletionRequest(GenerationRequest):
    prompt_field: ClassVar[str] = "prompt"

    prompt: Prompt
    max_tokens: int | None = 16  # OpenAI's default; null: to the end of the context
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    echo: bool | None = None
    logprobs: int | None = None

    @property
    def num_candidates(self) -> int:
        """Answers that are generated to each prompt; the best n of them are given."""
        return max(self.n or 1, self.best_of or 1)

    @property
    def ranks(self) -> bool:
        return self.num_candidates > (self.n or 1)

    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or token ids.

        Raises:
            ApiError: 400 when there is none, one is empty, or there are too many.
        """
        value = self.prompt
        if isinstance(value, str) or (value and isinstance(value[0], int)):
            value = [value]
        if not value or not all(len(prompt) for prompt in value):
            raise ApiError(400, "prompt is empty; at least one character or token is needed.", param="prompt")
        if len(value) * self.num_candidates > MAX_CHOICES:
            name, num = ("best_of", self.best_of) if self.ranks else ("n", self.n or 1)
            message = f"{len(value)} prompts x {name}={num}; at most {MAX_CHOICES} choices in one request."
            raise ApiError(400, message, param=name)
        return value

    def sampling_params(self) -> list[SamplingParams]:
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise ApiError(400, f"best_of must be at least n={self.n}, got {self.best_of}.", param="best_of")
        if self.ranks and self.stream:
            message = f"best_of={self.best_of} cannot be streamed: which answers are best is known at the end only."
            raise ApiError(400, message, param="best_of")
        fields: dict[str, Any] = {"max_tokens": self.max_tokens, "logprobs": self.logprobs}
        if self.ranks and self.logprobs is None:
            fields["logprobs"] = 0
        if self.echo and (self.logprobs is not None or self.max_tokens == 0):
            fields["prompt_logprobs"] = self.logprobs or 0
        elif self.max_tokens == 0:
            raise ApiError(400, "max_tokens must be at least 1, or 0 together with echo; got 0.", param="max_tokens")
        if found := self.constraint():
            fields["constraint"] = found[1]
        return self._sampling(self.num_candidates, **fields)


def _check_messages(value: list[object]) -> list[object]:
    if not value:
        raise ValueError("a list with at least one message")
    return value


class ChatCompletionRequest(GenerationRequest):
    prompt_field: ClassVar[str] = "messages"

    messages: Annotated[list[Message], AfterValidator(_check_messages), Field(json_schema_extra={"minItems": 1})]
    max_tokens: int | None = None  # null: to the end of the context
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, str | int | float | bool | None] | None = None

    def sampling_params(self, **fields: Any) -> list[SamplingParams]:
        """
        Args:
            fields: of SamplingParams that the tools decide.
        """
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, f"top_logprobs={self.top_logprobs} needs logprobs=true.", param="top_logprobs")
        fields["max_tokens"] = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        fields["logprobs"] = (self.top_logprobs or 0) if self.logprobs else None
        if found := self.constraint():
            fields["constraint"] = found[1]
        return self._sampling(self.n or 1, **fields)

    def template_messages(self) -> list[dict[str, Any]]:
        return [message.for_template(f"messages[{i}]") for i, message in enumerate(self.messages)]

    def template_options(self) -> dict[str, Any]:
        """What the request tells the model's chat template, such as `enable_thinking`."""
        options = self.chat_template_kwargs or {}
        if taken := options.keys() & _TEMPLATE_ARGUMENTS:
            message = f"chat_template_kwargs may not set {', '.join(sorted(taken))}."
            raise ApiError(400, message, param="chat_template_kwargs")
        return options


# Variables of a template that are not the request's to set: the server's, and Jinja's own.
_TEMPLATE_ARGUMENTS = frozenset({"messages", "tools", "documents", "add_generation_prompt", "self"})
RequestT = TypeVar("RequestT", bound=BaseModel)


def parse_request(kind: type[RequestT], body: dict[str, object]) -> RequestT:
    """Checks `body` against the fields of `kind`.

    Raises:
        ApiError: 400, naming the field, the value got and what is allowed.
    """
    try:
        request = kind.model_validate(body)
    except ValidationError as error:
        raise describe(error, body) from None
    for name, value in (request.model_extra or {}).items():
        neutral, why = _REFUSED_FIELDS.get(name, ((), ""))
        if value is None or name in _IGNORED_FIELDS or any(_same(value, v) for v in neutral):
            continue
        allowed = " or ".join([repr(v) for v in neutral] + ["leave it out"])
        because = f" ({why})" if why else ""
        message = f"{name}={short(value)} is not supported{because}; {allowed}."
        raise ApiError(400, message, param=name, code="unsupported")
    if isinstance(request, GenerationRequest) and request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options is only allowed with stream=true.", param="stream_options")
    return request


def _same(value: object, neutral: object) -> bool:
    return type(value) is type(neutral) and value == neutral  # 1 and True are not the same here
