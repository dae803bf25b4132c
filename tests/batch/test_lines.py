"""What stands in a batch file: requests, faults that are told, and ids that are what was asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tilestream.batch.lines import BatchFileError, Line, read_lines

from .conftest import chat, completion, write_lines


def read_one(path: Path, content: bytes | dict) -> Line:
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    (line,) = read_lines(path)
    return line


def test_requests(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in", [completion("a", "x", seed=5), chat("b", "y")])
    a, b = read_lines(path)
    assert (a.number, a.custom_id, a.url, a.fault) == (1, "a", "/v1/completions", None)
    assert (b.number, b.custom_id, b.url, b.fault) == (2, "b", "/v1/chat/completions", None)
    assert json.loads(a.body) == completion("a", "x", seed=5)["body"]
    seed = json.loads(b.body)["seed"]  # made of the request, so that a resumed job draws the same
    assert json.loads(b.body) == chat("b", "y")["body"] | {"seed": seed} and 0 <= seed < 2**48
    assert json.loads(read_one(path, chat("c", "y")).body)["seed"] != seed


def test_empty_file_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_bytes(b"")
    assert read_lines(path) == []
    path.write_bytes(b"\n  \r\n" + json.dumps(chat("b", "y")).encode() + b"\r\n\n")
    (line,) = read_lines(path)
    assert line.custom_id == "b" and line.number == 3 and line.fault is None


def test_an_id_is_what_was_asked_however_it_is_written(tmp_path: Path) -> None:
    path, line = tmp_path / "in", completion("a", "x")
    first = read_one(path, line)
    assert read_one(path, dict(reversed(line.items()))).id == first.id
    assert read_one(path, b"\n\n" + json.dumps(line, indent=None, separators=(" ,", ":")).encode()).id == first.id
    others = [completion("b", "x"), completion("a", "y"), completion("a", "x", seed=1)]
    assert len({first.id, *(read_one(path, other).id for other in others)}) == 4


@pytest.mark.parametrize(
    ("content", "custom_id", "words"),
    [
        (b"{nope", None, ["not valid JSON"]),
        (b"\xff\xfe", None, ["not valid JSON", "utf-8"]),
        (b"[1]", None, ["JSON list", "object"]),
        (b"[" * 100_000, None, ["too deeply"]),
        ({"method": "POST"}, None, ["custom_id is missing"]),
        ({"custom_id": 7}, None, ["custom_id is 7", "a string"]),
        ({"custom_id": ""}, None, ['custom_id is ""']),
        ({"custom_id": "a"}, "a", ["method is missing"]),
        (completion("a", "x") | {"method": "GET"}, "a", ["'GET'", "'POST'"]),
        (completion("a", "x") | {"url": "/v1/embeddings"}, "a", ["/v1/embeddings", "/v1/completions or /v1/chat/completions"]),
        (completion("a", "x") | {"body": "x"}, "a", ['body is "x"', "an object"]),
        (completion("a", "x", stream=True), "a", ["body.stream"]),
    ],
)
def test_faults(tmp_path: Path, content: bytes | dict, custom_id: str | None, words: list[str]) -> None:
    line = read_one(tmp_path / "in", content)
    assert line.custom_id == custom_id and line.fault.startswith("line 1: ")
    assert all(word in line.fault for word in words), line.fault


def test_equal_faults_have_ids_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_bytes(b"{nope\n{nope\n")
    first, second = read_lines(path)
    assert first.id != second.id


def test_a_custom_id_twice_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in", [completion("a", "x"), completion("b", "x"), {"custom_id": "a"}])
    with pytest.raises(BatchFileError, match=r"custom_id 'a' stands in lines 1 and 3"):
        read_lines(path)
