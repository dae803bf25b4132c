"""Requests to replay: when they come, how long they are, what they share."""

from __future__ import annotations

import csv
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from os import PathLike
from pathlib import Path

_REQUIRED = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a trace.

    Args:
        arrival_s: since the first one.
        prefix_id, prefix_tokens: prompts of one id begin with the same so many tokens; "": shares nothing.
    """

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    tenant: str = ""
    priority: int = 0
    prefix_id: str = ""
    prefix_tokens: int = 0


def read_trace(path: str | PathLike[str], *, rate_scale: float = 1.0, max_requests: int | None = None) -> list[TraceRequest]:
    """Read a CSV with the columns TIMESTAMP, ContextTokens and GeneratedTokens (the form of the Azure LLM inference dataset),
    and if there are any Tenant, Priority, PrefixId and PrefixTokens.

    Args:
        path: the file. A TIMESTAMP is a date and time, or seconds.
        rate_scale: arrivals come so many times as fast.
        max_requests: read so many.
    Returns:
        In order of arrival.
    Raises:
        ValueError: the line, and what is wrong with it.
    """
    requests = []
    with Path(path).open(newline="") as file:
        rows = csv.DictReader(file)
        missing = [name for name in _REQUIRED if name not in (rows.fieldnames or ())]
        if missing:
            raise ValueError(f"{path} has no column {missing[0]}; a trace needs {', '.join(_REQUIRED)}")
        for row in rows:
            if max_requests is not None and len(requests) >= max_requests:
                break
            try:
                requests.append(_request(row, rate_scale))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {rows.line_num}: {error}") from None
    if not requests:
        raise ValueError(f"{path} has no requests")
    requests.sort(key=lambda request: request.arrival_s)
    begin_s = requests[0].arrival_s
    return [replace(request, arrival_s=request.arrival_s - begin_s) for request in requests]


def _request(row: dict[str, str], rate_scale: float) -> TraceRequest:
    prompt_tokens, output_tokens = int(row["ContextTokens"]), int(row["GeneratedTokens"])
    prefix_tokens = int(row.get("PrefixTokens") or 0)
    if prompt_tokens < 1 or output_tokens < 1:
        raise ValueError(f"ContextTokens and GeneratedTokens must be at least 1, got {prompt_tokens} and {output_tokens}")
    if not 0 <= prefix_tokens <= prompt_tokens:
        raise ValueError(f"PrefixTokens must be 0..ContextTokens = {prompt_tokens}, got {prefix_tokens}")
    return TraceRequest(
        _seconds(row["TIMESTAMP"]) / rate_scale,
        prompt_tokens,
        output_tokens,
        row.get("Tenant") or "",
        int(row.get("Priority") or 0),
        row.get("PrefixId") or "",
        prefix_tokens,
    )


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        whole, _, fraction = text.partition(".")  # seven digits, which fromisoformat of Python 3.10 does not read
        return datetime.fromisoformat(whole).replace(tzinfo=timezone.utc).timestamp() + float(f"0.{fraction or 0}")
