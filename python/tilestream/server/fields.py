"""The types of single fields of a request, and the sentences that say what is wrong with one."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError

from tilestream.server.errors import ApiError

MAX_STOP_STRINGS = 16  # OpenAI allows 4


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


def _check_logit_bias(value: object) -> object:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ValueError('an object of token ids and biases, such as {"50": -100}')
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise ValueError(f"an object whose keys are token ids as strings, not {short(key)}")
        if isinstance(bias, bool) or not isinstance(bias, (int, float)):
            raise ValueError(f"an object whose values are numbers in [-100, 100], not {short(bias)}")
    return {int(key): bias for key, bias in value.items()}


def _check_content(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    parts = value if _is_list_of(dict, value) else [{}]
    if all(part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts):
        return "\n".join(part["text"] for part in parts)
    raise ValueError(CONTENT_FORMS)


CONTENT_FORMS = "a string or a list of {'type': 'text', 'text': string} parts (no images, no audio)"
_PromptJson = str | list[int] | list[str] | list[list[int]]
_StopJson = str | list[str] | None
_ContentJson = str | list[dict[str, str]] | None
_LogitBiasJson = dict[str, Annotated[float, Field(ge=-100, le=100)]] | None
Prompt = Annotated[_PromptJson, PlainValidator(_check_prompt, json_schema_input_type=_PromptJson)]
Stop = Annotated[_StopJson, PlainValidator(_check_stop, json_schema_input_type=_StopJson)]
Content = Annotated[str | None, PlainValidator(_check_content, json_schema_input_type=_ContentJson)]
LogitBias = Annotated[dict[int, float] | None, PlainValidator(_check_logit_bias, json_schema_input_type=_LogitBiasJson)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool = False
    continuous_usage_stats: bool = False  # as vLLM: with include_usage every chunk has the counts so far
    include_obfuscation: bool = False  # padding against traffic analysis; accepted, never sent


def short(value: Any) -> str:
    """A value as an error shows it."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def describe(error: ValidationError, body: dict[str, object]) -> ApiError:
    """The first fault: which field, what is allowed, what came."""
    first = error.errors(include_url=False)[0]
    field = _path(first["loc"], body)
    if first["type"] == "missing":
        return ApiError(400, f"{field} is missing.", param=field, code="missing_field")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{field} is not supported.", param=field, code="unsupported")
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return ApiError(400, f"{field} must be {message}; got {short(first['input'])}.", param=field)


def _path(loc: tuple[str | int, ...], body: object) -> str:
    """A field as the request writes it, without what pydantic adds between: which member of a union it tried."""
    path = ""
    for i, part in enumerate(loc):
        inside = isinstance(body, dict) and part in body or isinstance(body, list) and isinstance(part, int)
        if inside or i == len(loc) - 1 and isinstance(body, dict):  # the last one may be missing
            path += f"[{part}]" if isinstance(part, int) else f".{part}"
            body = body[part] if inside else None
    return path.lstrip(".")
