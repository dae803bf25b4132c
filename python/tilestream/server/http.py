"""The routes: parse a request, hand it to the engine, answer with JSON or a stream of events."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from tilestream.server.access import Traffic, within_limits
from tilestream.server.context import current
from tilestream.server.errors import CLIENT_LEFT_STATUS, ApiError, internal_error, read_json
from tilestream.server.generation import ClientLeftError, generate, unless_client_leaves
from tilestream.server.metrics import ServerMetrics
from tilestream.server.openapi import json_body
from tilestream.server.protocol import ChatCompletionRequest, CompletionRequest, GenerationRequest, parse_request
from tilestream.server.responses import SSE_DONE, Answer, ChatAnswer, CompletionAnswer, sse_event
from tilestream.server.settings import ServerSettings
from tilestream.server.telemetry import open_telemetry
from tilestream.server.tools import ToolUse, format_of, messages_for, tool_use

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from tilestream.engine.async_engine import AsyncEngine
    from tilestream.engine.request import RequestDelta, RequestOptions
    from tilestream.models.tokenizer import Tokenizer
    from tilestream.sampling_params import SamplingParams
    from tilestream.server.generation import Deltas

logger = logging.getLogger("tilestream.server")

# A text as long as a body may be takes seconds to tokenise, off the event loop; shorter ones must not wait behind it.
_TOKENIZING_THREADS = 4


class Server:
    """What the routes share.

    Args:
        engine: runs the requests; shut down with the server.
        tokenizer: text to ids, chat template, bytes of a token.
        model_name: the name that clients ask for.
        max_model_len: tokens of prompt and answer together; told in /v1/models.
        settings: limits and rights.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        tokenizer: Tokenizer,
        *,
        model_name: str,
        max_model_len: int,
        settings: ServerSettings,
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.model_name = model_name
        self.max_model_len = max_model_len
        self.settings = settings
        self.traffic = Traffic()
        self.telemetry = open_telemetry(model_name)
        self.metrics = ServerMetrics(engine, model_name)
        self.model_card = {
            "id": model_name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "tilestream",
            "max_model_len": max_model_len,
        }
        self.tool_format = format_of(tokenizer.chat_template)
        self.tokenizing = ThreadPoolExecutor(_TOKENIZING_THREADS, thread_name_prefix="tokenize")
        self.compiling = ThreadPoolExecutor(1, thread_name_prefix="compile")  # hard grammars hold up one another alone

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.model_name:
            message = f"The model {name!r} does not exist here; this server has {self.model_name!r}."
            raise ApiError(404, message, param="model", code="model_not_found")

    async def prompt_ids(self, prompts: list[str | list[int]], *, add_special_tokens: bool) -> list[list[int]]:
        """Token ids of each prompt; ids pass as they are, for the engine to check."""
        encode = partial(self.tokenizer.encode, add_special_tokens=add_special_tokens)
        loop = asyncio.get_running_loop()
        return [
            await loop.run_in_executor(self.tokenizing, encode, prompt) if isinstance(prompt, str) else prompt
            for prompt in prompts
        ]

    def check_token_ids(self, token_ids: list[int], field: str) -> None:
        """Before the tokenizer looks at ids: it knows no others.

        Raises:
            ApiError: 400, the first one that is no token.
        """
        vocab_size = self.tokenizer.vocab_size
        for i, token_id in enumerate(token_ids):
            if not 0 <= token_id < vocab_size:
                raise ApiError(400, f"{field}[{i}] is {token_id}; token ids are 0..{vocab_size - 1}.", param=field)

    def chat_text(self, body: ChatCompletionRequest, tools: ToolUse | None, **options: bool) -> str:
        """The prompt of a chat, as the model's template writes it.

        Args:
            tools: what `body` does with tools; None: nothing.
            options: of the template, set by the server.
        Raises:
            ApiError: 400, the template refuses the messages.
        """
        messages = messages_for(body.template_messages(), tools, self.tool_format)
        shown_tools = tools.template_tools() if tools is not None and tools.format is not None else None
        try:
            return self.tokenizer.apply_chat_template(messages, tools=shown_tools, **body.template_options(), **options)
        except ValueError as error:
            raise ApiError(400, f"{self.model_name}: {error}", param="messages") from None

    def echo(self, prompt: str | list[int]) -> str:
        """A prompt as an answer begins with it."""
        if isinstance(prompt, str):
            return prompt
        self.check_token_ids(prompt, "prompt")
        return self.tokenizer.decode(prompt)

    async def prepare(self, params: SamplingParams, field: str | None) -> None:
        """Let the engine compile a constraint and look at token ids, before it gets the request itself.

        Args:
            field: the request's field that has the constraint.
        Raises:
            ApiError: 400, what is wrong with it.
        """
        if params.constraint is None and not params.logit_bias:
            return
        try:
            await asyncio.get_running_loop().run_in_executor(self.compiling, self.engine.prepare, params)
        except ValueError as error:
            name = "logit_bias" if str(error).startswith("logit_bias") else field
            raise ApiError(400, f"{error}.", param=name) from None

    def answer(
        self,
        kind: type[Answer],
        id_prefix: str,
        body: GenerationRequest,
        prompts: list[list[int]],
        params: list[SamplingParams],
        **more: Any,
    ) -> Answer:
        """An empty answer to `body`, with an id of its own; `more` is for its kind."""
        context = current()
        context.body = body
        context.answer = kind(
            f"{id_prefix}-{uuid.uuid4().hex}",
            self.model_name,
            self.tokenizer,
            num_prompt_tokens=[len(prompt) for prompt in prompts],
            choices_per_prompt=len(params),
            include_usage=body.include_usage(),
            continuous_usage=body.continuous_usage(),
            **more,
        )
        return context.answer

    def options(self, body: GenerationRequest) -> RequestOptions:
        """What the scheduler is told of the request at hand."""
        return within_limits(body.options(), self.settings.request_timeout_s)

    async def run(
        self,
        http: Request,
        body: GenerationRequest,
        answer: Answer,
        prompts: list[list[int]],
        params: list[SamplingParams],
    ) -> Response:
        """Generates and answers. An error before the first token still gets its own HTTP status."""
        deltas = generate(
            self.engine,
            self.metrics,
            answer.answer_id,
            prompts,
            params,
            prompt_field=body.prompt_field,
            options=self.options(body),
        )
        try:
            if body.stream:
                first = await unless_client_leaves(http, anext(deltas))
                return EventStream(first, deltas, answer)
            await unless_client_leaves(http, _collect(deltas, answer))
            return JSONResponse(answer.whole())
        except ClientLeftError:
            return Response(status_code=CLIENT_LEFT_STATUS)


async def _collect(deltas: Deltas, answer: Answer) -> None:
    async with contextlib.aclosing(deltas):
        async for index, delta in deltas:
            answer.add(index, delta)


class EventStream(StreamingResponse):
    """Server-sent events of one request. However it ends, the engine's part ends with it."""

    def __init__(self, first: tuple[int, RequestDelta], deltas: Deltas, answer: Answer) -> None:
        super().__init__(
            self._events(first, deltas, answer),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},  # proxies must not hold events back
        )
        self._deltas = deltas

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._deltas.aclose()

    @staticmethod
    async def _events(first: tuple[int, RequestDelta], deltas: Deltas, answer: Answer) -> AsyncIterator[str]:
        try:
            for chunk in [*answer.opening_chunks(), *answer.chunks(*first)]:
                yield sse_event(chunk)
            async for index, delta in deltas:
                for chunk in answer.chunks(index, delta):
                    yield sse_event(chunk)
            for chunk in answer.closing_chunks():
                yield sse_event(chunk)
        except ApiError as error:
            yield sse_event(error.body())
        except Exception:
            logger.exception("%s failed", answer.answer_id)
            yield sse_event(internal_error().body())
        yield SSE_DONE


def add_generation_routes(app: FastAPI, server: Server) -> None:
    @app.post("/v1/completions", openapi_extra=json_body(CompletionRequest))
    async def completions(http: Request) -> Response:
        body = parse_request(CompletionRequest, await read_json(http))
        server.check_model(body.model)
        params = body.sampling_params()
        given = body.prompts()
        await server.prepare(params[0], body.constraint_field)
        prompts = await server.prompt_ids(given, add_special_tokens=True)
        texts = [server.echo(prompt) for prompt in given] if body.echo else []
        answer = server.answer(
            CompletionAnswer,
            "cmpl",
            body,
            prompts,
            params,
            echo=list(zip(texts, prompts, strict=True)) if body.echo else None,
            given_per_prompt=body.n or 1,
            with_logprobs=body.logprobs is not None,
        )
        return await server.run(http, body, answer, prompts, params)

    @app.post("/v1/chat/completions", openapi_extra=json_body(ChatCompletionRequest))
    async def chat_completions(http: Request) -> Response:
        body = parse_request(ChatCompletionRequest, await read_json(http))
        server.check_model(body.model)
        tools = tool_use(body, server.tool_format)
        params = body.sampling_params(**({} if tools is None else tools.sampling_fields()))
        text = server.chat_text(body, tools)
        await server.prepare(params[0], body.constraint_field or "tools")
        prompts = await server.prompt_ids([text], add_special_tokens=False)  # the template has written them
        answer = server.answer(ChatAnswer, "chatcmpl", body, prompts, params, tools=tools)
        return await server.run(http, body, answer, prompts, params)
