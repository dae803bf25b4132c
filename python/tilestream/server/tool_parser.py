"""Tool calls out of a text as it streams: what is certain goes out at once, and no character is lost.

What looks like a call but is none (no JSON, an unknown function) stays text.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Set
from typing import Any

Json = dict[str, Any]  # a `delta` of a chat chunk: {"content": ...} or {"tool_calls": [...]}

_SEPARATORS = re.compile(r"[\s,;\[\]]*")
_CALL_HEAD = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_DECODER = json.JSONDecoder()


def _begin_call(index: int, name: str, arguments: str = "") -> Json:
    # Mistral's template insists on ids of nine letters and digits; the others take any.
    call = {"index": index, "id": uuid.uuid4().hex[:9], "type": "function"}
    return {"tool_calls": [call | {"function": {"name": name, "arguments": arguments}}]}


def _more_arguments(index: int, text: str) -> Json:
    return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}


class NamedCallParser:
    """The whole answer is the arguments of one call.

    Args:
        name: of the function.
    """

    names_finish_reason = False  # OpenAI ends such an answer with "stop"

    def __init__(self, name: str) -> None:
        self._name = name
        self.num_calls = 0

    def feed(self, text: str) -> list[Json]:
        if self.num_calls > 0:
            return [_more_arguments(0, text)] if text else []
        self.num_calls = 1
        return [_begin_call(0, self._name, text)]

    def finish(self) -> list[Json]:
        return []


class ToolParser:
    """Calls as JSON objects with a name and arguments (or parameters), several of them apart or in a list.

    Args:
        names: of the functions that may be called.
        begin, end: what stands around calls; "": nothing does.
        bare: calls may come first in the answer without `begin`.
        max_calls: later ones are dropped; None: none is.
    """

    names_finish_reason = True

    def __init__(
        self, names: Set[str], *, begin: str = "", end: str = "", bare: bool = False, max_calls: int | None = None
    ) -> None:
        self._names, self._begin, self._end, self._max_calls = names, begin, end, max_calls
        self._take = self._between if bare else self._text
        self._held = ""  # not decided yet
        self._skipped = ""  # in front of it: text, should no call follow
        self._scanner = _ObjectScanner(depth=0)
        self.num_calls = 0

    def feed(self, text: str) -> list[Json]:
        """Take more text. Returns what is certain now."""
        self._held += text
        deltas: list[Json] = []
        while self._take(deltas):
            pass
        return deltas

    def finish(self) -> list[Json]:
        """At the end of the answer: what was held back."""
        undecided = self._take in (self._text, self._between, self._call)
        text = self._skipped + self._held if undecided else ""
        return [{"content": text}] if text else []

    # Each of these is a state: it takes from what is held, and returns whether the next one can go on with the rest.

    def _text(self, deltas: list[Json]) -> bool:
        at = self._held.find(self._begin) if self._begin else -1
        num_certain = at if at >= 0 else len(self._held) - _len_of_maybe(self._held, self._begin)
        if num_certain > 0:
            deltas.append({"content": self._held[:num_certain]})
        self._held = self._held[num_certain:]
        if at >= 0:
            self._take = self._between
        return at >= 0

    def _between(self, deltas: list[Json]) -> bool:
        for mark in filter(None, (self._begin, self._end)):
            if self._held.startswith(mark):
                self._skip(len(mark))
                return True
            if mark.startswith(self._held):
                return False
        if num_separators := _SEPARATORS.match(self._held).end():
            self._skip(num_separators)
        elif not self._held:
            return False
        elif self._held[0] == "{":
            self._take = self._call
        else:
            self._give_up(deltas)
        return True

    def _call(self, deltas: list[Json]) -> bool:
        head = _CALL_HEAD.match(self._held)
        try:
            value, end = ({"name": json.loads(head[1])}, head.end()) if head else _DECODER.raw_decode(self._held)
        except (ValueError, RecursionError):
            if self._end and self._end in self._held:
                self._give_up(deltas)
                return True
            return False
        name, arguments = value.get("name"), value.get("arguments", value.get("parameters", {}))
        if not isinstance(name, str) or name not in self._names or not isinstance(arguments, (dict, str)):
            self._give_up(deltas)
            return True
        self._held, self._skipped = self._held[end:], ""
        self.num_calls += 1
        if head:
            deltas.append(_begin_call(self.num_calls - 1, name))
            self._scanner, self._take = _ObjectScanner(depth=0), self._arguments
        else:
            text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            deltas.append(_begin_call(self.num_calls - 1, name, text))
            self._end_call()
        return True

    def _arguments(self, deltas: list[Json]) -> bool:
        end = self._scanner.end_in(self._held)
        if piece := self._held[:end]:
            deltas.append(_more_arguments(self.num_calls - 1, piece))
        self._held = "" if end is None else self._held[end:]
        if end is not None:
            self._scanner, self._take = _ObjectScanner(depth=1), self._rest
        return end is not None

    def _rest(self, deltas: list[Json]) -> bool:
        end = self._scanner.end_in(self._held)
        self._held = "" if end is None else self._held[end:]
        if end is not None:
            self._end_call()
        return end is not None

    def _done(self, deltas: list[Json]) -> bool:
        self._held = ""
        return False

    def _end_call(self) -> None:
        self._take = self._done if self.num_calls == self._max_calls else self._between

    def _skip(self, num: int) -> None:
        """What stands between calls is text only as long as there was none."""
        self._skipped += self._held[:num]
        self._held = self._held[num:]
        if self.num_calls > 0 and not self._skipped.endswith(self._begin or "\0"):
            self._skipped = ""

    def _give_up(self, deltas: list[Json]) -> None:
        """No call after all."""
        if self._skipped:
            deltas.append({"content": self._skipped})
        self._skipped, self._take = "", self._text


class _ObjectScanner:
    """Finds where a JSON object ends, piece by piece.

    Args:
        depth: how many braces are open before the first piece.
    """

    def __init__(self, *, depth: int) -> None:
        self._depth = depth
        self._in_string = self._escaped = False

    def end_in(self, piece: str) -> int | None:
        """The index after the closing brace, if it is in this piece."""
        for i, char in enumerate(piece):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = char == "\\"
                self._in_string = char != '"'
            elif char == '"':
                self._in_string = True
            elif char == "{":
                self._depth += 1
            elif char == "}":
                self._depth -= 1
                if self._depth == 0:
                    return i + 1
        return None


def _len_of_maybe(text: str, mark: str) -> int:
    """Length of the longest end of `text` that is a beginning of `mark`."""
    longest = min(len(text), len(mark) - 1)
    return next((n for n in range(longest, 0, -1) if mark.startswith(text[-n:])), 0)
