"""/tokenize and /detokenize: text to ids and back, in vLLM's form; special tokens are spelled out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from pydantic import BaseModel, ConfigDict

from tilestream.server.errors import ApiError, read_json
from tilestream.server.openapi import json_body
from tilestream.server.protocol import ChatCompletionRequest, Message, parse_request
from tilestream.server.tools import tool_use

if TYPE_CHECKING:
    from tilestream.server.http import Server


class TokenizeRequest(BaseModel):
    """A prompt, or the messages of a chat.

    add_special_tokens: what the model wants around a text; by default for a prompt, not for messages, whose template
        writes them.
    """

    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    tokens: list[int]


# Fields that say how to tokenise; the others of a body with messages are those of a chat.
_HOW = {"prompt", "add_special_tokens", "add_generation_prompt", "return_token_strs"}


def add_token_routes(app: FastAPI, server: Server) -> None:
    @app.post("/tokenize", openapi_extra=json_body(TokenizeRequest))
    async def tokenize(http: Request) -> dict[str, Any]:
        fields = await read_json(http)
        text, add_special_tokens, with_strings = _text(server, fields)
        (ids,) = await server.prompt_ids([text], add_special_tokens=add_special_tokens)
        spell = server.tokenizer.special_token_bytes
        strings = [spell(token_id).decode(errors="replace") for token_id in ids] if with_strings else None
        return {"count": len(ids), "max_model_len": server.max_model_len, "tokens": ids, "token_strs": strings}

    @app.post("/detokenize", openapi_extra=json_body(DetokenizeRequest))
    async def detokenize(http: Request) -> dict[str, str]:
        body = parse_request(DetokenizeRequest, await read_json(http))
        server.check_model(body.model)
        server.check_token_ids(body.tokens, "tokens")
        text = b"".join(server.tokenizer.special_token_bytes(token_id) for token_id in body.tokens)
        return {"prompt": text.decode(errors="replace")}


def _text(server: Server, fields: dict[str, object]) -> tuple[str, bool, bool]:
    """The text to tokenise; whether special tokens go around it; whether the answer spells the tokens."""
    if fields.get("messages") is None:
        body = parse_request(TokenizeRequest, fields)
        server.check_model(body.model)
        if body.prompt is None:
            raise ApiError(400, "A prompt or messages are needed.", param="prompt", code="missing_field")
        return body.prompt, body.add_special_tokens is not False, body.return_token_strs
    body = parse_request(TokenizeRequest, {name: value for name, value in fields.items() if name in _HOW})
    if body.prompt is not None:
        raise ApiError(400, "Either prompt or messages, not both.", param="prompt")
    chat = parse_request(ChatCompletionRequest, {name: value for name, value in fields.items() if name not in _HOW})
    server.check_model(chat.model)
    tools = tool_use(chat, server.tool_format)
    text = server.chat_text(chat, tools, add_generation_prompt=body.add_generation_prompt)
    return text, body.add_special_tokens is True, body.return_token_strs
