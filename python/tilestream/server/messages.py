"""The messages of a chat and the tools it may call, as a request writes them."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from tilestream.server.errors import ApiError
from tilestream.server.fields import CONTENT_FORMS, Content, short


class CalledFunction(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    name: str
    arguments: str  # a JSON object as text


class ToolCall(BaseModel):
    """A call in an assistant's message, as an earlier answer gave it."""

    model_config = ConfigDict(strict=True, extra="ignore")

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction

    def for_template(self, field: str) -> dict[str, Any]:
        """As chat templates expect it: the arguments are an object."""
        try:
            arguments = json.loads(self.function.arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            message = f"{field}.function.arguments must be a JSON object as text; got {short(self.function.arguments)}."
            raise ApiError(400, message, param=f"{field}.function.arguments")
        return {"id": self.id, "type": "function", "function": {"name": self.function.name, "arguments": arguments}}


class Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    def for_template(self, field: str) -> dict[str, Any]:
        """The message as a chat template expects it: OpenAI's newer word for system is system again.

        Args:
            field: the message's place in the request, for errors.
        """
        for name, value in (self.model_extra or {}).items():
            if value:  # clients send back answers with empty `refusal`, `audio`, `annotations`, ...
                raise ApiError(400, f"{field}.{name} is not supported.", param=f"{field}.{name}")
        if self.tool_calls and self.role != "assistant":
            raise ApiError(400, f"{field}.tool_calls: only an assistant's message has them.", param=f"{field}.tool_calls")
        if self.content is None and not self.tool_calls:
            message = f"{field}.content must be {CONTENT_FORMS}; it may be missing only where an assistant calls tools."
            raise ApiError(400, message, param=f"{field}.content", code="missing_field")
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role}
        message["content"] = self.content or ""
        if self.name is not None:
            message["name"] = self.name
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if self.tool_calls:
            calls = enumerate(self.tool_calls)
            message["tool_calls"] = [call.for_template(f"{field}.tool_calls[{i}]") for i, call in calls]
        return message


class Function(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(BaseModel):
    """A function that the model may call."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        return self.model_dump(exclude_none=True, exclude={"function": {"strict"}})


class NamedFunction(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    name: str


class NamedToolChoice(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedToolChoice | None
