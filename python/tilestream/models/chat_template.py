"""Chat templates: Jinja in a sandbox, with the helpers that published templates expect."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any


class ChatTemplate:
    """A model's chat template, compiled at the first use (jinja2 takes 40 ms to import).

    Args:
        source: Jinja source.
        special_tokens: variables such as bos_token and eos_token.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source, self.special_tokens = source, dict(special_tokens)
        self._template: Any = None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """The prompt text of a conversation.

        Args:
            messages: mappings with `role` and `content`, and what else the template reads.
            tools: JSON-schema tool descriptions, or None.
            add_generation_prompt: end with the opening of the assistant's turn.
            kwargs: further template variables (such as enable_thinking).
        Returns:
            The rendered prompt, special tokens spelled out.
        Raises:
            ValueError: the template does not compile, refuses the messages or fails on them.
        """
        if self._template is None:
            self._template = _compile(self.source)
        try:
            return self._template.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **(self.special_tokens | kwargs),
            )
        except Exception as error:  # a template is foreign code: it may raise anything
            raise ValueError(f"the chat template cannot render these messages: {error}") from error


def _compile(source: str) -> Any:
    from jinja2 import TemplateError, nodes
    from jinja2.exceptions import TemplateRuntimeError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks assistant text for training; rendering ignores it."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> None:
        raise TemplateRuntimeError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None,
               separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
        # Jinja's own filter escapes HTML characters, which would put \u003c into prompts.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise ValueError(f"the chat template is not valid Jinja: {error}") from error
