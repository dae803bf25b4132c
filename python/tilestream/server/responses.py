"""Deltas of the engine -> OpenAI's JSON: stream chunks and whole answers, with logprobs and usage."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tilestream.engine.request import RequestDelta, TokenLogprobs
    from tilestream.models.tokenizer import Tokenizer

Json = dict[str, Any]
SSE_DONE = "data: [DONE]\n\n"


def sse_event(payload: Json) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(payload, ensure_ascii=False, separators=(',', ':'))}\n\n"


@dataclass
class _Choice:
    """What has been received of one choice."""

    text: list[str] = field(default_factory=list)
    num_characters: int = 0  # of all tokens so far: OpenAI's text_offset
    logprobs: Json | None = None
    finish_reason: str | None = None
    num_output_tokens: int = 0
    num_cached_tokens: int = 0


class Answer(ABC):
    """Builds the JSON of one HTTP request; subclasses know the two forms of a choice.

    Args:
        answer_id: `id` of the answer and of each of its chunks.
        model: name of the model as served.
        tokenizer: for the texts of the tokens in logprobs.
        num_prompt_tokens: of each prompt.
        choices_per_prompt: `n`.
        include_usage: chunks carry `usage`, and a last one the counts.
    """

    whole_object: str
    chunk_object: str

    def __init__(
        self,
        answer_id: str,
        model: str,
        tokenizer: Tokenizer,
        *,
        num_prompt_tokens: list[int],
        choices_per_prompt: int,
        include_usage: bool = False,
    ) -> None:
        self.answer_id = answer_id
        self._head = {"id": answer_id, "created": int(time.time()), "model": model}
        self._tokenizer = tokenizer
        self._num_prompt_tokens = num_prompt_tokens
        self._choices_per_prompt = choices_per_prompt
        self._include_usage = include_usage
        self._choices = [_Choice() for _ in range(len(num_prompt_tokens) * choices_per_prompt)]

    def add(self, index: int, delta: RequestDelta) -> Json | None:
        """Takes in one delta. Returns the JSON of its logprobs, if it has any."""
        choice = self._choices[index]
        choice.text.append(delta.text)
        choice.finish_reason = delta.finish_reason
        choice.num_output_tokens = delta.num_output_tokens
        choice.num_cached_tokens = delta.num_cached_tokens
        if not delta.logprobs:
            return None
        part = self._logprobs(delta.logprobs, choice)
        if choice.logprobs is None:
            choice.logprobs = {name: [] for name in part}
        for name, values in part.items():
            choice.logprobs[name].extend(values)
        return part

    def chunks(self, index: int, delta: RequestDelta) -> list[Json]:
        """The stream chunks of one delta; none when it shows nothing new."""
        logprobs = self.add(index, delta)
        if not delta.text and logprobs is None and delta.finish_reason is None:
            return []  # bytes of an unfinished character, or what may become a stop string
        return [self._chunk([choice]) for choice in self._chunk_choices(index, delta, logprobs)]

    def opening_chunks(self) -> list[Json]:
        """Chunks before the first token."""
        return []

    def closing_chunks(self) -> list[Json]:
        """Chunks after the last choice ended."""
        return [self._chunk([]) | {"usage": self.usage()}] if self._include_usage else []

    def whole(self) -> Json:
        """The answer to a request without `stream`."""
        choices = [self._whole_choice(i, choice) for i, choice in enumerate(self._choices)]
        return self._head | {"object": self.whole_object, "choices": choices, "usage": self.usage()}

    def usage(self) -> Json:
        """Token counts; a prompt counts once, whatever `n` is."""
        num_prompt = sum(self._num_prompt_tokens)
        num_completion = sum(choice.num_output_tokens for choice in self._choices)
        num_cached = sum(choice.num_cached_tokens for choice in self._choices[:: self._choices_per_prompt])
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_completion,
            "total_tokens": num_prompt + num_completion,
            "prompt_tokens_details": {"cached_tokens": num_cached},
        }

    def _chunk(self, choices: list[Json]) -> Json:
        usage = {"usage": None} if self._include_usage else {}
        return self._head | {"object": self.chunk_object, "choices": choices} | usage

    @abstractmethod
    def _chunk_choices(self, index: int, delta: RequestDelta, logprobs: Json | None) -> list[Json]:
        ...

    @abstractmethod
    def _whole_choice(self, index: int, choice: _Choice) -> Json:
        ...

    @abstractmethod
    def _logprobs(self, tokens: list[TokenLogprobs], choice: _Choice) -> Json:
        ...


class CompletionAnswer(Answer):
    whole_object = chunk_object = "text_completion"

    def _chunk_choices(self, index: int, delta: RequestDelta, logprobs: Json | None) -> list[Json]:
        return [{"index": index, "text": delta.text, "logprobs": logprobs, "finish_reason": delta.finish_reason}]

    def _whole_choice(self, index: int, choice: _Choice) -> Json:
        text = "".join(choice.text)
        return {"index": index, "text": text, "logprobs": choice.logprobs, "finish_reason": choice.finish_reason}

    def _logprobs(self, tokens: list[TokenLogprobs], choice: _Choice) -> Json:
        part: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            text = self._token_text(token.token_id)
            top = {self._token_text(token_id): _finite(logprob) for token_id, logprob in token.top}
            part["tokens"].append(text)
            part["token_logprobs"].append(_finite(token.logprob))
            part["top_logprobs"].append(top | {text: _finite(token.logprob)})
            part["text_offset"].append(choice.num_characters)
            choice.num_characters += len(text)
        return part

    def _token_text(self, token_id: int) -> str:
        """A token's text; OpenAI writes a part of a character as `bytes:\\xe2\\x82`."""
        raw = self._tokenizer.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class ChatAnswer(Answer):
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening_chunks(self) -> list[Json]:
        return [
            self._chunk([_chat_choice(index, {"role": "assistant", "content": ""})])
            for index in range(len(self._choices))
        ]

    def _chunk_choices(self, index: int, delta: RequestDelta, logprobs: Json | None) -> list[Json]:
        choices = []
        if delta.text or logprobs:
            choices.append(_chat_choice(index, {"content": delta.text}, logprobs))
        if delta.finish_reason is not None:
            choices.append(_chat_choice(index, {}, finish_reason=delta.finish_reason))
        return choices

    def _whole_choice(self, index: int, choice: _Choice) -> Json:
        message = {"role": "assistant", "content": "".join(choice.text), "refusal": None}
        return {
            "index": index,
            "message": message,
            "logprobs": choice.logprobs,
            "finish_reason": choice.finish_reason,
        }

    def _logprobs(self, tokens: list[TokenLogprobs], choice: _Choice) -> Json:
        content = []
        for token in tokens:
            top = [self._entry(token_id, logprob) for token_id, logprob in token.top]
            content.append(self._entry(token.token_id, token.logprob) | {"top_logprobs": top})
        return {"content": content}

    def _entry(self, token_id: int, logprob: float) -> Json:
        raw = self._tokenizer.token_bytes(token_id)
        return {"token": raw.decode(errors="replace"), "logprob": _finite(logprob), "bytes": list(raw)}


def _chat_choice(index: int, delta: Json, logprobs: Json | None = None, *, finish_reason: str | None = None) -> Json:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def _finite(logprob: float) -> float:
    """JSON has no infinity: OpenAI writes -9999 for what cannot be drawn."""
    return max(logprob, -9999.0)
