"""The lines of a batch file, as OpenAI writes them: {"custom_id", "method": "POST", "url", "body"}."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

URLS = ("/v1/completions", "/v1/chat/completions")


class BatchFileError(ValueError):
    """A file with which no work can begin: which, and why."""


@dataclass(frozen=True, slots=True)
class Line:
    """One request of the input.

    Args:
        number: of the line, from 1.
        id: of its answer; made of what it asks, so a changed line has another one.
        custom_id: None where the line has none that can be used.
        url: one of URLS.
        body: JSON, for the server to read.
        fault: why the line is no request; url and body are empty then.
    """

    number: int
    id: str
    custom_id: str | None
    url: str = ""
    body: bytes = b""
    fault: str | None = None


def read_lines(path: Path) -> list[Line]:
    """All requests of a file; blank lines are none.

    Raises:
        BatchFileError: a custom_id comes twice.
        OSError: the file cannot be read.
    """
    lines: list[Line] = []
    first_with: dict[str, int] = {}
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            line = _read_line(number, raw)
            if line.custom_id is not None:
                first = first_with.setdefault(line.custom_id, number)
                if first != number:
                    where = f"{path}: custom_id {line.custom_id!r} stands in lines {first} and {number}"
                    raise BatchFileError(f"{where}; every line needs its own")
            lines.append(line)
    return lines


def _read_line(number: int, raw: bytes) -> Line:
    custom_id = None
    try:
        value = json.loads(raw.decode("utf-8-sig"))
        if not isinstance(value, dict):
            raise ValueError(f"the line is a JSON {type(value).__name__}; it must be an object")
        custom_id = _field(value, "custom_id", str)
        if not custom_id:
            raise ValueError('custom_id is ""; it must name the request')
        if (method := _field(value, "method", str)) != "POST":
            raise ValueError(f"method is {method!r}; it must be 'POST'")
        if (url := _field(value, "url", str)) not in URLS:
            raise ValueError(f"url is {url!r}; it must be {' or '.join(URLS)}")
        body = _field(value, "body", dict)
        if body.get("stream"):
            raise ValueError("body.stream is true; a batch has nobody to stream to: leave it out")
        asked = json.dumps([custom_id, url, body], sort_keys=True).encode()
        digest = hashlib.sha256(asked).digest()
        # Sampling without a seed would give another answer after a resume.
        seed = int.from_bytes(digest[:6], "big") if body.get("seed") is None else body["seed"]
        return Line(number, _id(digest), custom_id, url, json.dumps(body | {"seed": seed}).encode())
    except (ValueError, RecursionError) as error:
        fault = "the line is nested too deeply" if isinstance(error, RecursionError) else str(error)
        if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
            fault = f"the line is not valid JSON: {fault}"
        digest = hashlib.sha256(f"{number} ".encode() + raw.strip()).digest()
        return Line(number, _id(digest), custom_id or None, fault=f"line {number}: {fault}")


def _field(value: dict, name: str, kind: type) -> object:
    if name not in value:
        raise ValueError(f"{name} is missing")
    if not isinstance(value[name], kind):
        wanted = {str: "a string", dict: "an object"}[kind]
        raise ValueError(f"{name} is {json.dumps(value[name])[:80]}; it must be {wanted}")
    return value[name]


def _id(digest: bytes) -> str:
    return f"batch_req_{digest.hex()[:32]}"
