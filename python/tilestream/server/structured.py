"""The fields that say what an answer must look like, OpenAI's and vLLM's -> a Constraint."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tilestream.constraint import Constraint
from tilestream.server.errors import ApiError

JsonSchema = dict[str, Any]


class JsonSchemaFormat(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    name: str | None = None
    description: str | None = None
    schema_: JsonSchema = Field(alias="schema")
    strict: bool | None = None  # it always is


class ResponseFormat(BaseModel):
    """OpenAI's `response_format`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(BaseModel):
    """vLLM's `structured_outputs`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    json_: JsonSchema | str | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class StructuredFields(BaseModel):
    """The fields of a request that constrain its answer; at most one of them may."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonSchema | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    def constraint(self) -> tuple[str, Constraint] | None:
        """The field that constrains the answer, and how.

        Raises:
            ApiError: 400 when several do, or one is not complete.
        """
        wanted = {name: value for name, value in self._wanted().items() if value is not None}
        if len(wanted) > 1:
            message = f"{' and '.join(wanted)} both say what the answer must look like; at most one may."
            raise ApiError(400, message, param=list(wanted)[1])
        for name, (make, value) in wanted.items():
            try:
                return name, make(value)
            except (ValueError, TypeError) as error:
                raise ApiError(400, f"{name}: {error}.", param=name) from None
        return None

    @property
    def constraint_field(self) -> str | None:
        """The field of the request that an error of the constraint is about."""
        found = self.constraint()
        return None if found is None else found[0].split(".")[0]

    def _wanted(self) -> dict[str, tuple[Any, Any] | None]:
        def of(make: Any, value: Any) -> tuple[Any, Any] | None:
            return None if value is None else (make, value)

        outputs = self.structured_outputs or StructuredOutputs()
        return {
            "response_format": self._response_format(),
            "structured_outputs.json": of(Constraint.json_schema, outputs.json_),
            "structured_outputs.json_object": of(_any_object, outputs.json_object or None),
            "structured_outputs.regex": of(Constraint.regex, outputs.regex),
            "structured_outputs.choice": of(Constraint.choice, outputs.choice),
            "structured_outputs.grammar": of(Constraint.grammar, outputs.grammar),
            "guided_json": of(Constraint.json_schema, self.guided_json),
            "guided_regex": of(Constraint.regex, self.guided_regex),
            "guided_choice": of(Constraint.choice, self.guided_choice),
            "guided_grammar": of(Constraint.grammar, self.guided_grammar),
        }

    def _response_format(self) -> tuple[Any, Any] | None:
        form = self.response_format
        if form is None or form.type == "text":
            return None
        if form.type == "json_object":
            return _any_object, True
        if form.json_schema is None:
            raise ApiError(400, "response_format.json_schema is missing.", param="response_format", code="missing_field")
        return Constraint.json_schema, form.json_schema.schema_


def _any_object(_: bool) -> Constraint:
    return Constraint.json_object()
