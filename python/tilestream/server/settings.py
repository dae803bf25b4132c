"""What an operator may set of the server, and who may use it."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Limits and rights of one server. Times are in seconds.

    Args:
        api_keys: whoever sends one of these may use the API; none: everybody may.
        cors_origins: web pages of these origins may use the API from a browser; "*": all.
        request_timeout_s: a request that has not ended by then is given up with 504; None: never.
        drain_timeout_s: what running answers get to end after a stop signal.
        access_log: one line per request.
        max_body_bytes: a longer body is refused with 413. 128k prompt tokens are about 1 MB of JSON, as ids or as text.
        body_timeout_s: a body that has not come by then is refused with 408.
        header_timeout_s: a connection that has not sent a request's head by then is closed.
        write_timeout_s: so is one that takes nothing of its answer for so long.
        keep_alive_s: so is one that sends no further request for so long: longer than the minute that balancers keep
            idle connections, so that they and not we close one that is just being used.
    """

    api_keys: ApiKeys = field(default_factory=lambda: ApiKeys(()))
    cors_origins: tuple[str, ...] = ()
    request_timeout_s: float | None = None
    drain_timeout_s: float = 30.0
    access_log: bool = True
    max_body_bytes: int = 4 * 2**20
    body_timeout_s: float = 30.0
    header_timeout_s: float = 10.0
    write_timeout_s: float = 30.0
    keep_alive_s: int = 75


class ApiKeys:
    """The keys that are good. Only their hashes are kept, and compared in a time that says nothing about them.

    Args:
        keys: none of them empty.
    Raises:
        ValueError: an empty key, or one with characters that a header cannot carry.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._hashes = []
        for key in keys:
            if not key or not key.isascii() or not key.isprintable() or key != key.strip():
                raise ValueError("an API key must be printable ASCII characters, without spaces around them")
            self._hashes.append(_hash(key))

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def tenant(self, key: str) -> str | None:
        """A short name of a good key's owner; None: the key is not good."""
        digest = _hash(key)
        found = [hmac.compare_digest(digest, good) for good in self._hashes]  # all of them: no early end
        return digest[:12] if any(found) else None


def read_api_keys(keys: Iterable[str], file: Path | None) -> ApiKeys:
    """Keys from options or the environment, and from a file with one on each line (# begins a comment).

    Raises:
        ValueError: a key that cannot be one, or a file without any.
        OSError: the file cannot be read.
    """
    found = list(keys)
    if file is not None:
        lines = (line.strip() for line in file.read_text(encoding="utf-8").splitlines())
        from_file = [line for line in lines if line and not line.startswith("#")]
        if not from_file:
            raise ValueError(f"{file} holds no API key; it must have one on each line")
        found += from_file
    return ApiKeys(found)


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
