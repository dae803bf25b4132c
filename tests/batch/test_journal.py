"""The output file survives kills at any byte, and is nobody else's."""

from __future__ import annotations

from pathlib import Path

import pytest
from tilestream.batch.journal import Journal
from tilestream.batch.lines import BatchFileError, read_lines

from .conftest import completion, entries, write_lines


def entry(line, **response: object) -> dict:
    body = {"model": "m", "text": "ä\u2028"} | response
    return {"id": line.id, "custom_id": line.custom_id, "response": {"status_code": 200, "body": body}, "error": None}


def test_every_kill_leaves_whole_answers(tmp_path: Path) -> None:
    lines = read_lines(write_lines(tmp_path / "in", [completion(name, "x") for name in "abc"]))
    path = tmp_path / "out"
    journal = Journal(path)
    for line in lines[:2]:
        journal.append(entry(line))
    journal.close()
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        journal = Journal(path)
        done = journal.resume(lines, "m")
        assert done == {line.id for line in lines[: (length >= first) + (length >= len(whole))]}
        for line in lines:
            if line.id not in done:
                journal.append(entry(line))
        journal.close()
        assert sorted(e["custom_id"] for e in entries(path)) == ["a", "b", "c"]


def test_one_job_at_a_time(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "out")
    with pytest.raises(BatchFileError, match="another batch job"):
        Journal(tmp_path / "out")
    journal.close()
    Journal(tmp_path / "out").close()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"hello\n", "line 1: this is no answer of a batch"),
        (b"[]\n", "line 1: this is no answer of a batch"),
        (b'{"id": "x", "custom_id": "z", "response": null}\n', "custom_id 'z' is not in the input"),
        (b'{"id": "x", "custom_id": "a", "response": null}\n', "custom_id 'a' was asked something else"),
    ],
)
def test_foreign_files_are_left_alone(tmp_path: Path, content: bytes, message: str) -> None:
    lines = read_lines(write_lines(tmp_path / "in", [completion("a", "x")]))
    (tmp_path / "out").write_bytes(content + b"half")
    journal = Journal(tmp_path / "out")
    with pytest.raises(BatchFileError, match=message):
        journal.resume(lines)
    journal.close()
    assert (tmp_path / "out").read_bytes() == content + b"half"


def test_answers_of_another_model_are_told(tmp_path: Path) -> None:
    lines = read_lines(write_lines(tmp_path / "in", [completion("a", "x")]))
    journal = Journal(tmp_path / "out")
    journal.append(entry(lines[0]))
    assert journal.resume(lines) == journal.resume(lines, "m") == {lines[0].id}
    with pytest.raises(BatchFileError, match="answered by 'm', and this is 'other'"):
        journal.resume(lines, "other")
    journal.close()
