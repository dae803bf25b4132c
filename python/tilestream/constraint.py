"""What an output must look like: the text of a JSON schema, a regular expression, a list of choices, or a grammar."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Constraint:
    """A language that every output of a request belongs to, unless max_tokens or a stop string cuts it off.

    Args:
        kind: how `text` is to be read.
        text: a JSON schema, a regular expression (Rust's syntax, no look-around), a JSON list of strings, or a grammar
            (Lark as llguidance reads it, or llama.cpp's GBNF).
    """

    kind: Literal["json_schema", "regex", "choice", "grammar"]
    text: str

    @classmethod
    def json_schema(cls, schema: Mapping | bool | str) -> Constraint:
        """JSON that a schema, given as such or as text, allows; properties come in the schema's order.

        Raises:
            TypeError, ValueError: it is no JSON.
        """
        try:
            return cls("json_schema", json.dumps(json.loads(schema) if isinstance(schema, str) else schema))
        except RecursionError:
            raise ValueError("the JSON schema is nested too deeply") from None
        except ValueError as error:
            raise ValueError(f"the JSON schema is no valid JSON: {error}") from None

    @classmethod
    def json_object(cls) -> Constraint:
        """Any JSON object."""
        return cls("json_schema", '{"type": "object"}')

    @classmethod
    def regex(cls, pattern: str) -> Constraint:
        """Text that a regular expression matches as a whole."""
        return cls("regex", pattern)

    @classmethod
    def choice(cls, choices: Sequence[str]) -> Constraint:
        """One of these strings.

        Raises:
            TypeError, ValueError: they are no strings, or there are none, or one is empty.
        """
        if isinstance(choices, str) or not all(isinstance(choice, str) for choice in choices):
            raise TypeError(f"choice must be a list of strings, got {choices!r}")
        if not choices or not all(choices):
            raise ValueError(f"choice must be a list of at least one string, none of them empty, got {choices!r}")
        return cls("choice", json.dumps(list(choices)))

    @classmethod
    def grammar(cls, source: str) -> Constraint:
        """Text that a context-free grammar derives from its start symbol."""
        return cls("grammar", source)
