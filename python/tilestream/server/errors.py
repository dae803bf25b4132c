"""Errors as OpenAI clients expect them: `{"error": {"message", "type", "param", "code"}}`, and beside it the request's id."""

from __future__ import annotations

import json
import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from tilestream.server.context import current

logger = logging.getLogger("tilestream.server")

_TYPE_OF_STATUS = {
    401: "authentication_error",
    404: "not_found_error",
    500: "internal_server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
# nginx's code for a client that closed its connection; nobody reads it but an access log.
CLIENT_LEFT_STATUS = 499


class ApiError(Exception):
    """A request that is answered with an error.

    Args:
        status: HTTP status code.
        message: one sentence with the value that was got and what is allowed.
        param: the request field at fault, if there is one.
        code: a word that programs can test for.
        retry_after_s: whole seconds after which the same request may succeed.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, object]:
        """The error as OpenAI's JSON object, the same for a response and for an event of a stream."""
        kind = _TYPE_OF_STATUS.get(self.status, "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error, "request_id": current().request_id}

    def response(self) -> JSONResponse:
        headers = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        return JSONResponse(self.body(), status_code=self.status, headers=headers)


def internal_error() -> ApiError:
    """For a failure of ours: the log has the details, the client gets no traceback."""
    return ApiError(500, "The server failed on this request; its log says why.", code="internal_error")


def install_error_handlers(app: FastAPI) -> None:
    """Answers ApiError, unknown paths, wrong methods and unexpected exceptions in OpenAI's form."""

    @app.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def on_bad_parameter(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        name = str(first["loc"][-1])
        return ApiError(400, f"{name}: {first['msg']}; got {first['input']!r:.80}.", param=name).response()

    @app.exception_handler(HTTPException)
    async def on_http_exception(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}. The API is described at /docs."
        answer = ApiError(error.status_code, message).response()
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(ClientDisconnect)
    async def on_client_left(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_LEFT_STATUS)

    @app.exception_handler(Exception)
    async def on_exception(request: Request, error: Exception) -> JSONResponse:
        return internal_error().response()


async def read_json(request: Request) -> dict[str, object]:
    """The request's body as a JSON object.

    Raises:
        ApiError: 415 for another content type, 400 for what is not a JSON object.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise ApiError(415, f"Content-Type is {content_type!r}; it must be 'application/json'.")
    body = await request.body()
    try:
        value = json.loads(body.decode(), parse_constant=_refuse_constant)  # of bytes, json takes surrogates and UTF-16
        if b"\\ud" in body.lower():  # half of a \\ud83d\\ude00 pair is no character: no tokenizer takes it
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ApiError(400, "The body is not usable JSON: it is nested too deeply.") from None
    except ValueError as error:  # also bytes that are not UTF-8
        raise ApiError(400, f"The body is not valid JSON: {error}.", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"The body is a JSON {type(value).__name__}; it must be an object.")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")
