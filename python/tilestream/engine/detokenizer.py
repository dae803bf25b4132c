"""Token ids -> text as it streams: whole characters only, and nothing past a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol


class TokenBytes(Protocol):
    def token_bytes(self, token_id: int) -> bytes: ...

    def special_token_bytes(self, token_id: int) -> bytes: ...


class Detokenizer:
    """Text of one request's output.

    Works on the tokens' exact bytes, so that a character whose bytes come in several tokens is held back
    until it is whole. Bytes that can never become a character turn into U+FFFD, as bytes.decode does it.
    Text that may be the beginning of a stop string is held back, too.

    Where several stop strings occur, the one that ends first counts (of those, the longest), so the result
    does not depend on where the token borders fall.

    Args:
        tokenizer: token_bytes(id) gives a token's bytes, b"" for tokens that are no text; special_token_bytes(id) the
            bytes of those, too.
        stop: stop strings, none of them empty.
        include_stop: emit the stop string itself, too.
        skip_special: special tokens give no text.
    """

    def __init__(
        self,
        tokenizer: TokenBytes,
        stop: Sequence[str] = (),
        *,
        include_stop: bool = False,
        skip_special: bool = True,
    ) -> None:
        self._token_bytes = tokenizer.token_bytes if skip_special else tokenizer.special_token_bytes
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def append(self, token_id: int, *, may_stop: bool = True) -> tuple[str, str | None]:
        """Take one output token.

        Args:
            may_stop: whether a stop string that begins with it counts.
        Returns:
            The text that is certain now, and the stop string that it completed, or None. After a stop
            string there is nothing more to come: everything past it is dropped.
        """
        text = self._decoder.decode(self._token_bytes(token_id))
        if not (self._stop and may_stop):
            return text, None
        self._held += text
        found = self._find_stop()
        if found is None:
            num_certain = len(self._held) - self._num_maybe_stop()
            text, self._held = self._held[:num_certain], self._held[num_certain:]
            return text, None
        begin, stop = found
        text = self._held[: begin + len(stop)] if self._include_stop else self._held[:begin]
        self._held = ""
        self._decoder.reset()
        return text, stop

    def flush(self) -> str:
        """The text still held back, at the end of the output; an incomplete character becomes U+FFFD."""
        text = self._held + self._decoder.decode(b"", final=True)
        self._held = ""
        return text

    def _find_stop(self) -> tuple[int, str] | None:
        best: tuple[int, int, str] | None = None
        for stop in self._stop:
            begin = self._held.find(stop)
            if begin >= 0 and (best is None or (begin + len(stop), begin) < best[:2]):
                best = (begin + len(stop), begin, stop)
        return None if best is None else (best[1], best[2])

    def _num_maybe_stop(self) -> int:
        """Length of the longest end of the held text that is a beginning of a stop string."""
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:length]):
                    longest = length
                    break
        return longest
