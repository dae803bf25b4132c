"""What /openapi.json says of bodies and errors. Bodies are parsed by hand, so that errors keep OpenAI's form."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

Schema = dict[str, Any]

_NULLABLE_STRING = {"anyOf": [{"type": "string"}, {"type": "null"}]}
_ERROR_SCHEMA: Schema = {
    "title": "Error",
    "type": "object",
    "required": ["error", "request_id"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": _NULLABLE_STRING,
                "code": _NULLABLE_STRING,
            },
        },
        "request_id": {"type": "string"},
    },
}
_ERROR_RESPONSE: Schema = {
    "description": "An error, with its HTTP status.",
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
}


def json_body(kind: type[BaseModel]) -> Schema:
    """`openapi_extra` of a route that reads `kind` from its body."""
    schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def complete(document: Schema) -> Schema:
    """The document of all routes, with the parts of bodies where references look for them, and our errors, which
    are what FastAPI's own checks are answered with as well."""
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    schemas["Error"] = _ERROR_SCHEMA
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
            operation["responses"]["default"] = _ERROR_RESPONSE
            for content in operation.get("requestBody", {}).get("content", {}).values():
                schemas.update(content["schema"].pop("$defs", {}))
    components["securitySchemes"] = {"api_key": {"type": "http", "scheme": "bearer"}}
    document["security"] = [{}, {"api_key": []}]  # a server without keys takes requests without one
    return document
