"""An AsyncEngine and a Tokenizer that answer at once, by rule: what the server's fast tests run on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

from tilestream.engine.config import EngineConfig
from tilestream.engine.errors import PromptTooLongError, QueueFullError
from tilestream.engine.metrics import EngineMetrics, StepLog
from tilestream.engine.request import RequestDelta, RequestOptions, TokenLogprobs
from tilestream.engine.request_builder import RequestBuilder
from tilestream.sampling_params import SamplingParams

ANSWER = "Grüße: the quick brown fox jumps over the lazy dog. "
MAX_MODEL_LEN = 1000
EOS = 256


class ByteTokenizer:
    """One token per byte."""

    vocab_size = 257
    has_chat_template = True
    chat_template = "<tool_call>"  # it teaches the calls of Hermes
    eos_token_ids = frozenset({EOS})

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < EOS else b""

    def special_token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < EOS else b"<end>"

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < EOS).decode(errors="replace")

    def apply_chat_template(
        self, messages: list[dict[str, str]], tools: list[dict] | None = None, **options: object
    ) -> str:
        if messages[-1]["role"] == "assistant":
            raise ValueError("the last message must be the user's")
        shown = [] if tools is None else [f"[tools={json.dumps(tools)}]"]
        shown += [f"<{m['role']}>{m['content']}{json.dumps(m['tool_calls']) if 'tool_calls' in m else ''}" for m in messages]
        shown += [f"[{k}={v}]" for k, v in options.items()]
        return "".join(shown)


class FakeAsyncEngine:
    """Answers with ANSWER's bytes, from the seed's place on.

    Prompts steer it: `FAIL` ends with an error delta, `BUG` raises, `SLOW` waits between tokens,
    `STUCK` never gives a token, `LATE FAIL` fails after three tokens, `TOO LATE` misses its deadline.
    It obeys no constraint, but finds out which cannot be compiled.

    Attributes:
        answer: text instead of ANSWER, given once; the request ends after it.
    """

    answer: str | None = None

    def __init__(self, max_requests: int = 1000) -> None:
        self.max_requests = max_requests
        self.active: dict[str, tuple[list[int], SamplingParams]] = {}
        self.seen: list[tuple[list[int], SamplingParams]] = []
        self.seen_options: list[RequestOptions] = []
        self.config = EngineConfig(kv_cache_tokens=MAX_MODEL_LEN, max_model_len=MAX_MODEL_LEN)
        self.metrics = EngineMetrics()
        self.steps = StepLog()
        self.is_running, self.failure = True, None
        self._builder = RequestBuilder(
            ByteTokenizer(), EngineConfig(kv_cache_tokens=32, max_model_len=32), ByteTokenizer.vocab_size
        )

    def prepare(self, params: SamplingParams) -> None:
        self._builder.prepare(params)

    def shutdown(self) -> None:
        self.is_running = False

    async def stream(
        self, request_id: str, prompt: list[int], params: SamplingParams, options: RequestOptions = RequestOptions()
    ) -> AsyncIterator[RequestDelta]:
        if not prompt:
            raise ValueError("prompt_token_ids is empty; at least one token is needed")
        if not all(0 <= i < ByteTokenizer.vocab_size for i in prompt):
            raise ValueError(f"prompt_token_ids is {prompt}, but the vocabulary is 0..{ByteTokenizer.vocab_size - 1}")
        if len(prompt) >= MAX_MODEL_LEN:
            raise PromptTooLongError(len(prompt), MAX_MODEL_LEN - 1, "the model's context length")
        if len(self.active) >= self.max_requests:
            raise QueueFullError(len(self.active), self.max_requests)
        self.active[request_id] = (prompt, params)
        self.seen.append((prompt, params))
        self.seen_options.append(options)
        reason = "abort"
        try:
            async for delta in self._deltas(request_id, prompt, params):
                reason = delta.finish_reason or reason
                yield delta
        finally:
            del self.active[request_id]
            self.metrics.finished_requests[reason] += 1

    async def _deltas(self, request_id: str, prompt: list[int], params: SamplingParams) -> AsyncIterator[RequestDelta]:
        text = bytes(i for i in prompt if i < EOS).decode(errors="replace")
        source = (ANSWER if self.answer is None else self.answer).encode()
        max_tokens = MAX_MODEL_LEN - len(prompt) if params.max_tokens is None else params.max_tokens
        counts = {"request_id": request_id, "num_prompt_tokens": len(prompt), "num_cached_tokens": 2}
        prompt_logprobs = None
        if params.prompt_logprobs is not None:
            prompt_logprobs = [TokenLogprobs(token, -0.25 * i, ((token, -0.25 * i),)) for i, token in enumerate(prompt)][1:]
        if max_tokens == 0:
            yield RequestDelta(
                token_ids=[], finish_reason="length", num_output_tokens=0, prompt_logprobs=prompt_logprobs, **counts
            )
            return
        if "TOO LATE" in text:
            yield RequestDelta(
                token_ids=[], finish_reason="abort", num_output_tokens=0, error="the deadline has passed", **counts
            )
            return
        pending, out = b"", ""
        for i in range(max_tokens):
            await asyncio.sleep(3600 if "STUCK" in text else 0.02 if "SLOW" in text else 0)
            if "BUG" in text:
                raise RuntimeError("secret detail")
            failed = "FAIL" in text and (i == 3 or "LATE" not in text)
            token = source[((params.seed or 0) + i) % len(source)]
            pending += bytes([token])
            try:
                piece, pending = pending.decode(), b""
            except UnicodeDecodeError:
                piece = ""
            out += piece
            hit = next((s for s in params.stop if s in out), None)
            last = i == max_tokens - 1
            said = self.answer is not None and i == len(source) - 1
            self.metrics.generation_tokens += 1
            yield RequestDelta(
                text="" if failed or hit else piece,
                token_ids=[token],
                logprobs=self._logprobs(token, params),
                finish_reason="error" if failed else "stop" if hit or said else "length" if last else None,
                error="logits are NaN" if failed else None,
                num_output_tokens=i + 1,
                prompt_logprobs=prompt_logprobs if i == 0 else None,
                **counts,
            )
            if failed or hit or said:
                return

    @staticmethod
    def _logprobs(token: int, params: SamplingParams) -> list[TokenLogprobs] | None:
        if params.logprobs is None:
            return None
        logprob = -0.5 - 0.1 * (params.seed or 0)
        top = tuple(((token + k) % EOS, logprob - k) for k in range(params.logprobs))
        return [TokenLogprobs(token, logprob, top)]
