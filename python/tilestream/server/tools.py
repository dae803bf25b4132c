"""Tool calls: what a model's chat template knows of them, and what a request's `tool_choice` makes of that.

With "auto" the model writes calls as its template taught it, and they are parsed. With "required" or a named function the
answer is constrained to be calls, as JSON, so any model can be made to call.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tilestream.constraint import Constraint
from tilestream.server.errors import ApiError
from tilestream.server.messages import NamedToolChoice, Tool
from tilestream.server.protocol import ChatCompletionRequest
from tilestream.server.tool_parser import NamedCallParser, ToolParser

Json = dict[str, Any]


@dataclass(frozen=True)
class ToolFormat:
    """How a family of models writes calls.

    Args:
        marker: what a chat template has that teaches this format; without: what one of another, similar format has.
        begin, end: around calls, "" for nothing.
        bare: calls may come without `begin`, if they are all that the answer has.
    """

    name: str
    marker: str
    without: str
    begin: str
    end: str
    bare: bool = False


FORMATS = (
    ToolFormat("hermes", "<tool_call>", "<function=", "<tool_call>", "</tool_call>"),  # Qwen2.5, Qwen3, Hermes
    ToolFormat("mistral", "[TOOL_CALLS]", "[ARGS]", "[TOOL_CALLS]", ""),
    ToolFormat(
        "llama3", "dictionary of argument name and its value", "<function=", "<|python_tag|>", "", bare=True
    ),
)


def format_of(chat_template: str | None) -> ToolFormat | None:
    """The format that a template teaches; None: it knows no tools, or writes calls in a way that we do not read."""
    source = chat_template or ""
    return next((f for f in FORMATS if f.marker in source and f.without not in source), None)


@dataclass(frozen=True)
class ToolUse:
    """What one request does with tools.

    Args:
        tools: that may be called.
        format: that the template teaches; None: it knows none, and is given none.
        constraint: that forces calls, as JSON; named: of this function.
        max_calls: in one answer; None: any number.
    """

    tools: list[Tool]
    format: ToolFormat | None
    constraint: Constraint | None = None
    named: str | None = None
    max_calls: int | None = None

    def parser(self) -> ToolParser | NamedCallParser:
        """A parser for one answer."""
        if self.named is not None:
            return NamedCallParser(self.named)
        names = {tool.function.name for tool in self.tools}
        if self.constraint is not None:
            return ToolParser(names, bare=True, max_calls=self.max_calls)
        f = self.format
        return ToolParser(names, begin=f.begin, end=f.end, bare=f.bare, max_calls=self.max_calls)

    def sampling_fields(self) -> Json:
        """Of SamplingParams."""
        if self.constraint is not None:
            return {"constraint": self.constraint}
        return {"skip_special_tokens": False}  # some models' `begin` is a special token

    def template_tools(self) -> list[Json]:
        return [tool.for_template() for tool in self.tools]


def tool_use(body: ChatCompletionRequest, known: ToolFormat | None) -> ToolUse | None:
    """What a request asks for; None: no tools.

    Args:
        known: the format that the model's chat template teaches.

    Raises:
        ApiError: 400 for a choice that names no given tool, and for "auto" where the template knows no tools.
    """
    tools, choice = body.tools or [], body.tool_choice
    named = choice.function.name if isinstance(choice, NamedToolChoice) else None
    if not tools and (named is not None or choice == "required"):
        raise ApiError(400, "tool_choice asks for a call, but there are no tools.", param="tool_choice")
    if not tools or choice == "none":
        return None
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise ApiError(400, f"tools must have different names; got {names}.", param="tools")
    if named is not None and named not in names:
        message = f"tool_choice names the function {named!r}; the tools are {names}."
        raise ApiError(400, message, param="tool_choice")
    if found := body.constraint():
        message = f"{found[0]} cannot be combined with tools; set tool_choice to 'none' or leave one of them out."
        raise ApiError(400, message, param=body.constraint_field)
    max_calls = 1 if body.parallel_tool_calls is False else None
    if named is not None or choice == "required":
        try:
            schema = _calls_schema(tools, max_calls) if named is None else _arguments_schema(tools[names.index(named)])
            return ToolUse(tools, known, Constraint.json_schema(schema), named=named, max_calls=max_calls)
        except (ValueError, RecursionError):
            raise ApiError(400, "tools have parameters that are nested too deeply.", param="tools") from None
    if known is None:
        message = (
            "this model's chat template teaches no tool calls that this server reads (it reads "
            f"{', '.join(f.name for f in FORMATS)}); tool_choice 'required' or a named function works with any model."
        )
        raise ApiError(400, message, param="tools", code="unsupported")
    return ToolUse(tools, known, max_calls=max_calls)


def _arguments_schema(tool: Tool) -> Json:
    return {"type": "object"} | (tool.function.parameters or {})


def _calls_schema(tools: list[Tool], max_calls: int | None) -> Json:
    """A list of calls. Each tool's parameters stand under $defs, and their own references are led there."""
    definitions = {f"tool{i}": _lead_to(f"#/$defs/tool{i}", _arguments_schema(tool)) for i, tool in enumerate(tools)}
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.function.name}, "arguments": {"$ref": f"#/$defs/tool{i}"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for i, tool in enumerate(tools)
    ]
    limit = {} if max_calls is None else {"maxItems": max_calls}
    return {"type": "array", "minItems": 1, "items": {"anyOf": calls}, "$defs": definitions} | limit


def _lead_to(root: str, schema: Any) -> Any:
    """The schema with references to its own root turned into references to `root`."""
    if isinstance(schema, list):
        return [_lead_to(root, item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: root + value[1:]
        if key == "$ref" and isinstance(value, str) and value.startswith("#")
        else _lead_to(root, value)
        for key, value in schema.items()
    }


def messages_for(messages: list[Json], use: ToolUse | None, known: ToolFormat | None) -> list[Json]:
    """The conversation as the template can show it: one that knows no tools is told of them, and of calls made, in words."""
    if known is not None:
        return messages
    plain = [_call_as_text(message) for message in messages]
    if use is None:
        return plain
    described = json.dumps([tool["function"] for tool in use.template_tools()], ensure_ascii=False)
    wanted = (
        'Answer with a JSON list of calls: [{"name": function name, "arguments": {...}}].'
        if use.named is None
        else f"Answer with the arguments of a call of {use.named}, as a JSON object."
    )
    instructions = f"You can call these functions: {described}\n{wanted}"
    if plain[0]["role"] == "system":
        return [plain[0] | {"content": f"{plain[0]['content']}\n\n{instructions}"}, *plain[1:]]
    return [{"role": "system", "content": instructions}, *plain]


def _call_as_text(message: Json) -> Json:
    if "tool_calls" not in message:
        return message
    calls = json.dumps([call["function"] for call in message["tool_calls"]], ensure_ascii=False)
    content = "\n".join(filter(None, [message["content"], calls]))
    return {"role": message["role"], "content": content}
