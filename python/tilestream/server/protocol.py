"""What a request may say: the fields of OpenAI's API that we serve, their types and limits.

Ranges of sampling values are checked once, by SamplingParams; here are the types and the shape.
A field we do not know is refused when it could change the answer, and ignored when it cannot.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator, ValidationError

from tilestream.engine.request import RequestOptions
from tilestream.sampling_params import MAX_LOGPROBS, SamplingParams
from tilestream.server.errors import ApiError

MAX_CHOICES = 128  # engine requests that one HTTP request may start: prompts x n. OpenAI's limit for n
MAX_STOP_STRINGS = 16  # OpenAI allows 4

# Bookkeeping of the sender's: never changes the answer.
_IGNORED_FIELDS = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
)
# Known fields that we do not serve, with the values that ask for nothing.
_NEUTRAL_VALUES: dict[str, tuple[object, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}


def _is_list_of(kind: type, value: object) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


def _check_prompt(value: object) -> object:
    lists_of_ids = isinstance(value, list) and all(_is_list_of(int, item) for item in value)
    if isinstance(value, str) or _is_list_of(int, value) or _is_list_of(str, value) or lists_of_ids:
        return value
    raise ValueError("a string, a list of token ids, or a list of either")


def _check_stop(value: object) -> object:
    if value is None or isinstance(value, str) or (_is_list_of(str, value) and len(value) <= MAX_STOP_STRINGS):
        return value
    raise ValueError(f"a string or a list of at most {MAX_STOP_STRINGS} strings")


def _check_content(value: object) -> str:
    if isinstance(value, str):
        return value
    parts = value if _is_list_of(dict, value) else [{}]
    if all(part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts):
        return "\n".join(part["text"] for part in parts)
    raise ValueError("a string or a list of {'type': 'text', 'text': string} parts (no images, no audio)")


def _check_messages(value: list[object]) -> list[object]:
    if not value:
        raise ValueError("a list with at least one message")
    return value


_PromptJson = str | list[int] | list[str] | list[list[int]]
_StopJson = str | list[str] | None
Prompt = Annotated[_PromptJson, PlainValidator(_check_prompt, json_schema_input_type=_PromptJson)]
Stop = Annotated[_StopJson, PlainValidator(_check_stop, json_schema_input_type=_StopJson)]
Content = Annotated[str, PlainValidator(_check_content, json_schema_input_type=str | list[dict[str, str]])]


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool = False
    include_obfuscation: bool = False  # padding against traffic analysis; accepted, never sent


class GenerationRequest(BaseModel):
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
    seed: int | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: Stop = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def options(self) -> RequestOptions:
        """What the request asks of the scheduler."""
        return RequestOptions()

    def _sampling(self, *, max_tokens: int | None, logprobs: int | None) -> list[SamplingParams]:
        """One SamplingParams per choice; with a seed, choice i samples with seed + i."""
        fields: dict[str, Any] = {"max_tokens": max_tokens, "logprobs": logprobs}
        for name in _PLAIN_SAMPLING_FIELDS:
            if (value := getattr(self, name)) is not None:
                fields[name] = value
        if self.stop is not None:
            fields["stop"] = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if self.stop_token_ids is not None:
            fields["stop_token_ids"] = tuple(self.stop_token_ids)
        seeds = [None if self.seed is None else self.seed + i for i in range(self.n or 1)]
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
    "ignore_eos",
    "include_stop_str_in_output",
)


class CompletionRequest(GenerationRequest):
    prompt_field: ClassVar[str] = "prompt"

    prompt: Prompt
    max_tokens: int | None = 16  # OpenAI's default; null: to the end of the context
    logprobs: int | None = None

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
        if len(value) * (self.n or 1) > MAX_CHOICES:
            message = f"{len(value)} prompts x n={self.n or 1}; at most {MAX_CHOICES} choices in one request."
            raise ApiError(400, message, param="n")
        return value

    def sampling_params(self) -> list[SamplingParams]:
        return self._sampling(max_tokens=self.max_tokens, logprobs=self.logprobs)


class Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str | None = None

    def for_template(self) -> dict[str, str]:
        """The message as a chat template expects it: OpenAI's newer word for system is system again."""
        message = {"role": "system" if self.role == "developer" else self.role, "content": self.content}
        if self.name is not None:
            message["name"] = self.name
        return message


class ChatCompletionRequest(GenerationRequest):
    prompt_field: ClassVar[str] = "messages"

    messages: Annotated[list[Message], AfterValidator(_check_messages)]
    max_tokens: int | None = None  # null: to the end of the context
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    chat_template_kwargs: dict[str, str | int | float | bool | None] | None = None

    def sampling_params(self) -> list[SamplingParams]:
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, f"top_logprobs={self.top_logprobs} needs logprobs=true.", param="top_logprobs")
        max_tokens = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return self._sampling(max_tokens=max_tokens, logprobs=(self.top_logprobs or 0) if self.logprobs else None)

    def template_messages(self) -> list[dict[str, str]]:
        for i, message in enumerate(self.messages):
            for name, value in (message.model_extra or {}).items():
                if value:  # clients send back answers with empty `refusal`, `tool_calls`, `annotations`, ...
                    raise ApiError(400, f"messages[{i}].{name} is not supported.", param=f"messages[{i}].{name}")
        return [message.for_template() for message in self.messages]

    def template_options(self) -> dict[str, Any]:
        """What the request tells the model's chat template, such as `enable_thinking`."""
        options = self.chat_template_kwargs or {}
        if taken := options.keys() & _TEMPLATE_ARGUMENTS:
            message = f"chat_template_kwargs may not set {', '.join(sorted(taken))}."
            raise ApiError(400, message, param="chat_template_kwargs")
        return options


# Variables of a template that are the server's to set.
_TEMPLATE_ARGUMENTS = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
RequestT = TypeVar("RequestT", bound=BaseModel)


def parse_request(kind: type[RequestT], body: dict[str, object]) -> RequestT:
    """Checks `body` against the fields of `kind`.

    Raises:
        ApiError: 400, naming the field, the value got and what is allowed.
    """
    try:
        request = kind.model_validate(body)
    except ValidationError as error:
        raise _describe(error) from None
    for name, value in (request.model_extra or {}).items():
        neutral = _NEUTRAL_VALUES.get(name, ())
        if value is None or name in _IGNORED_FIELDS or any(_same(value, v) for v in neutral):
            continue
        allowed = " or ".join([repr(v) for v in neutral] + ["leave it out"])
        raise ApiError(400, f"{name}={_short(value)} is not supported; {allowed}.", param=name, code="unsupported")
    if isinstance(request, GenerationRequest) and request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options is only allowed with stream=true.", param="stream_options")
    return request


def _same(value: object, neutral: object) -> bool:
    return type(value) is type(neutral) and value == neutral  # 1 and True are not the same here


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _describe(error: ValidationError) -> ApiError:
    """The first fault: which field, what is allowed, what came."""
    first = error.errors(include_url=False)[0]
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    if first["type"] == "missing":
        return ApiError(400, f"{field} is missing.", param=field, code="missing_field")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{field} is not supported.", param=field, code="unsupported")
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return ApiError(400, f"{field} must be {message}; got {_short(first['input'])}.", param=field)
