"""Deltas of the engine -> OpenAI's JSON: stream chunks and whole answers, with logprobs and usage."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tilestream.engine.request import RequestDelta, TokenLogprobs
    from tilestream.models.tokenizer import Tokenizer
    from tilestream.server.tools import ToolUse

Json = dict[str, Any]
SSE_DONE = "data: [DONE]\n\n"
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def sse_event(payload: Json) -> str:
    """One server-sent event."""
    return f"data: {_encode(payload)}\n\n"


@dataclass
class _Choice:
    """What has been received of one choice."""

    text: list[str] = field(default_factory=list)
    tool_calls: list[Json] = field(default_factory=list)
    num_characters: int = 0  # of all tokens so far: OpenAI's text_offset
    logprobs: Json | None = None
    sum_logprobs: float = 0.0
    finish_reason: str | None = None
    num_deltas: int = 0
    num_output_tokens: int = 0
    num_cached_tokens: int = 0

    @property
    def mean_logprob(self) -> float:
        return self.sum_logprobs / max(1, self.num_output_tokens)

    def add_logprobs(self, part: Json) -> None:
        if self.logprobs is None:
            self.logprobs = {name: [] for name in part}
        for name, values in part.items():
            self.logprobs[name].extend(values)


class Answer(ABC):
    """Builds the JSON of one HTTP request; subclasses know the two forms of a choice.

    Args:
        answer_id: `id` of the answer and of each of its chunks.
        model: name of the model as served.
        tokenizer: for the texts of the tokens in logprobs.
        num_prompt_tokens: of each prompt.
        choices_per_prompt: engine requests for each prompt.
        include_usage: chunks carry `usage`, and a last one the counts; continuous_usage: every chunk has the counts so far.
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
        continuous_usage: bool = False,
    ) -> None:
        self.answer_id = answer_id
        self._head = {"id": answer_id, "created": int(time.time()), "model": model}
        self._tokenizer = tokenizer
        self._num_prompt_tokens = num_prompt_tokens
        self._choices_per_prompt = choices_per_prompt
        self._include_usage, self._continuous_usage = include_usage, continuous_usage
        self._choices = [_Choice() for _ in range(len(num_prompt_tokens) * choices_per_prompt)]

    def add(self, index: int, delta: RequestDelta) -> list[Json]:
        """Takes in one delta. Returns the choices of the chunks that show it; none when it shows nothing new."""
        choice = self._choices[index]
        choice.num_output_tokens = delta.num_output_tokens
        choice.num_cached_tokens = delta.num_cached_tokens
        shown = self._show(index, choice, delta)
        choice.num_deltas += 1
        return shown

    def chunks(self, index: int, delta: RequestDelta) -> list[Json]:
        """The stream chunks of one delta."""
        return [self._chunk([choice]) for choice in self.add(index, delta)]

    def opening_chunks(self) -> list[Json]:
        """Chunks before the first token."""
        return []

    def closing_chunks(self) -> list[Json]:
        """Chunks after the last choice ended."""
        return [self._chunk([]) | {"usage": self.usage()}] if self._include_usage else []

    def whole(self) -> Json:
        """The answer to a request without `stream`."""
        choices = [self._whole_choice(i, choice) for i, choice in enumerate(self._given_choices())]
        return self._head | {"object": self.whole_object, "choices": choices, "usage": self.usage()}

    def usage(self) -> Json:
        """Token counts; a prompt counts once, whatever `n` is, and every answer that was generated."""
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
        chunk = self._head | {"object": self.chunk_object, "choices": choices}
        if self._include_usage:
            chunk["usage"] = self.usage() if self._continuous_usage else None
        return chunk

    def _given_choices(self) -> list[_Choice]:
        return self._choices

    @abstractmethod
    def _show(self, index: int, choice: _Choice, delta: RequestDelta) -> list[Json]:
        """Take in what a delta adds to its choice; the choices of its chunks."""

    @abstractmethod
    def _whole_choice(self, index: int, choice: _Choice) -> Json:
        ...


class CompletionAnswer(Answer):
    """
    Args:
        echo: of each prompt its text and its token ids, which the answers begin with; None: they do not.
        given_per_prompt: `n`: as many of the choices_per_prompt are given, those with the likeliest tokens.
        with_logprobs: whether the answer has them, should the engine's deltas have them.
    """

    whole_object = chunk_object = "text_completion"

    def __init__(
        self,
        *args: Any,
        echo: Sequence[tuple[str, list[int]]] | None = None,
        given_per_prompt: int,
        with_logprobs: bool,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._echo, self._given_per_prompt, self._with_logprobs = echo, given_per_prompt, with_logprobs

    def _given_choices(self) -> list[_Choice]:
        size, given = self._choices_per_prompt, []
        for first in range(0, len(self._choices), size):
            group = self._choices[first : first + size]
            if self._given_per_prompt < size:
                group = sorted(group, key=lambda choice: choice.mean_logprob, reverse=True)
            given += group[: self._given_per_prompt]
        return given

    def _show(self, index: int, choice: _Choice, delta: RequestDelta) -> list[Json]:
        text, parts = delta.text, []
        if self._echo is not None and choice.num_deltas == 0:
            prompt_text, prompt_ids = self._echo[index // self._choices_per_prompt]
            text = prompt_text + text
            if self._with_logprobs:
                parts = [self._first_token(prompt_ids[0], choice)]
                parts.append(self._logprobs(delta.prompt_logprobs or (), choice))
        if delta.logprobs:
            choice.sum_logprobs += sum(token.logprob for token in delta.logprobs)
            if self._with_logprobs:
                parts.append(self._logprobs(delta.logprobs, choice))
        choice.text.append(text)
        choice.finish_reason = delta.finish_reason
        if not text and not parts and delta.finish_reason is None:
            return []  # bytes of an unfinished character, or what may become a stop string
        logprobs = None
        if parts:
            logprobs = {name: [value for part in parts for value in part[name]] for name in parts[0]}
            choice.add_logprobs(logprobs)
        return [{"index": index, "text": text, "logprobs": logprobs, "finish_reason": delta.finish_reason}]

    def _whole_choice(self, index: int, choice: _Choice) -> Json:
        text = "".join(choice.text)
        return {"index": index, "text": text, "logprobs": choice.logprobs, "finish_reason": choice.finish_reason}

    def _first_token(self, token_id: int, choice: _Choice) -> Json:
        """Of a prompt: nothing comes before it, so it has no probability."""
        text = self._token_text(token_id)
        part = {"tokens": [text], "token_logprobs": [None], "top_logprobs": [None], "text_offset": [choice.num_characters]}
        choice.num_characters += len(text)
        return part

    def _logprobs(self, tokens: Sequence[TokenLogprobs], choice: _Choice) -> Json:
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
    """
    Args:
        tools: what the request does with tools; None: nothing.
    """

    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, *args: Any, tools: ToolUse | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._parsers = None if tools is None else [tools.parser() for _ in self._choices]

    def opening_chunks(self) -> list[Json]:
        return [
            self._chunk([_chat_choice(index, {"role": "assistant", "content": ""})])
            for index in range(len(self._choices))
        ]

    def _show(self, index: int, choice: _Choice, delta: RequestDelta) -> list[Json]:
        shown, reason = [{"content": delta.text}] if delta.text else [], delta.finish_reason
        if self._parsers is not None:
            parser = self._parsers[index]
            shown = parser.feed(delta.text)
            if reason is not None:
                shown += parser.finish()
            if reason == "stop" and parser.num_calls > 0 and parser.names_finish_reason:
                reason = "tool_calls"
        for part in shown:
            _collect(choice, part)
        logprobs = None
        if delta.logprobs:
            logprobs = {"content": [self._token_logprobs(token) for token in delta.logprobs]}
            choice.add_logprobs(logprobs)
            shown = shown or [{"content": ""}]
        choice.finish_reason = reason
        chunks = [_chat_choice(index, part, None if i else logprobs) for i, part in enumerate(shown)]
        if reason is not None:
            chunks.append(_chat_choice(index, {}, finish_reason=reason))
        return chunks

    def _whole_choice(self, index: int, choice: _Choice) -> Json:
        message = {"role": "assistant", "content": "".join(choice.text), "refusal": None}
        if choice.tool_calls:
            message |= {"content": message["content"] or None, "tool_calls": choice.tool_calls}
        return {"index": index, "message": message, "logprobs": choice.logprobs, "finish_reason": choice.finish_reason}

    def _token_logprobs(self, token: TokenLogprobs) -> Json:
        top = [self._entry(token_id, logprob) for token_id, logprob in token.top]
        return self._entry(token.token_id, token.logprob) | {"top_logprobs": top}

    def _entry(self, token_id: int, logprob: float) -> Json:
        raw = self._tokenizer.token_bytes(token_id)
        return {"token": raw.decode(errors="replace"), "logprob": _finite(logprob), "bytes": list(raw)}


def _collect(choice: _Choice, part: Json) -> None:
    """Add a part of a streamed message to the whole one."""
    choice.text.append(part.get("content", ""))
    for call in part.get("tool_calls", ()):
        if "id" in call:
            whole = {name: value for name, value in call.items() if name != "index"}
            choice.tool_calls.append(whole | {"function": dict(call["function"])})
        else:
            choice.tool_calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]


def _chat_choice(index: int, delta: Json, logprobs: Json | None = None, *, finish_reason: str | None = None) -> Json:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def _finite(logprob: float) -> float:
    """JSON has no infinity and no NaN: OpenAI writes -9999 for what cannot be drawn."""
    return logprob if logprob > -9999.0 else -9999.0
