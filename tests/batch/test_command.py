"""`tilestream batch` as a shell sees it, with the model that comes with the package."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from tests.server.test_cli import Done, check_one_line_error, run  # noqa: F401
from tilestream import LLM
from tilestream.server.app import create_app

from .conftest import answers, chat, completion, entries, write_lines

OPTIONS = ("--kv-cache-tokens", "4096", "--batch-invariant")  # so that no answer depends on what else runs
WORDS = "river stone cloud lamp paper wheel garden salt engine winter".split()


def real_lines() -> list[dict]:
    rng = random.Random(5)
    topics = [" ".join(rng.choices(WORDS, k=60)) for _ in range(3)]
    lines = []
    for i in range(30):
        sampling = {"temperature": 0} if i % 3 else {"temperature": 0.8, "seed": i}
        system = {"role": "system", "content": f"You know about: {topics[i % 3]}"}
        messages = [system, {"role": "user", "content": f"Say something about {WORDS[i % 10]}."}]
        lines.append(chat(f"chat-{i}", "", messages=messages, max_tokens=8 + i % 20, **sampling))
    lines += [completion(f"more-{i}", f"The {word} is", n=2, temperature=1) for i, word in enumerate(WORDS)]
    return lines


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "tilestream", "batch", *map(str, arguments)]


async def served(lines: list[dict]) -> dict[str, object]:
    llm = LLM(kv_cache_tokens=4096, batch_invariant=True)
    app = create_app(llm.async_engine, llm.tokenizer, model_name=llm.name, max_model_len=4096)
    found = {}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
        for line in lines:
            found[line["custom_id"]] = (await client.post(line["url"], json=line["body"])).json()["choices"]
    llm.async_engine.shutdown()
    return found


async def test_killed_resumed_whole_and_served_are_the_same(tmp_path: Path) -> None:
    lines = real_lines()
    source, target = write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    whole = subprocess.run(command(source, tmp_path / "whole.jsonl", *OPTIONS), capture_output=True, text=True, timeout=200)
    assert whole.returncode == 0 and "40 answers in" in whole.stderr, whole.stderr
    assert " of the prompt tokens shared" in whole.stderr

    job = subprocess.Popen(command(source, target, *OPTIONS), stderr=subprocess.DEVNULL)
    end_s = time.monotonic() + 200
    while not target.exists() or target.stat().st_size == 0:
        assert time.monotonic() < end_s and job.poll() is None
        time.sleep(0.002)
    job.send_signal(signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL
    with target.open("ab") as file:
        file.write(b'{"id": "batch_req_half of an answ')
    num_first = target.read_bytes().count(b"\n")
    assert 0 < num_first < 40
    resumed = subprocess.run(command(source, target, *OPTIONS), capture_output=True, text=True, timeout=200)
    assert resumed.returncode == 0 and f"{num_first} of 40 lines are answered already" in resumed.stderr, resumed.stderr
    assert len(entries(target)) == 40 and answers(target) == answers(tmp_path / "whole.jsonl")

    asked = [line for line in lines if line["custom_id"].startswith("chat")]  # the others are drawn without a seed
    expected = await served(asked)
    found = answers(target)
    assert {name: found[name] for name in expected} == expected


def test_help(run) -> None:  # noqa: F811
    assert "batch" in run("--help").stdout
    done = run("batch", "--help")
    assert done.returncode == 0
    for word in ("IN.jsonl", "OUT.jsonl", "custom_id", "After a stop", "--kv-cache-tokens"):
        assert word in done.stdout


def test_what_is_told_before_any_work(run, tmp_path: Path) -> None:  # noqa: F811
    source = write_lines(tmp_path / "in.jsonl", [completion("a", "x"), completion("a", "y")])
    target = tmp_path / "out.jsonl"
    check_one_line_error(run("batch", str(tmp_path / "none"), str(target)), 2, "none")
    check_one_line_error(run("batch", str(source), str(tmp_path / "no" / "out")), 2, str(tmp_path / "no"), "no directory")
    check_one_line_error(run("batch", str(source), str(source)), 2, "is the input")
    check_one_line_error(run("batch", str(source), str(target)), 1, "custom_id 'a' stands in lines 1 and 2")
    assert not target.exists()
    target.write_text("precious\n")
    write_lines(source, [completion("a", "x")])
    check_one_line_error(run("batch", str(source), str(target)), 1, "no answer of a batch")
    assert target.read_text() == "precious\n"
    check_one_line_error(run("batch", str(source), str(tmp_path / "o"), "--model", "no/such.gguf"), 1, "no/such.gguf")


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_nothing_to_do_loads_no_model(run, tmp_path: Path, content: str) -> None:  # noqa: F811
    (tmp_path / "in.jsonl").write_text(content)
    done: Done = run("batch", str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), "--model", "no/such.gguf")
    assert done.returncode == 0 and "nothing to do" in done.stderr
    assert (tmp_path / "out.jsonl").read_bytes() == b""


def test_progress_on_a_terminal(tmp_path: Path) -> None:
    """Bars, and the answers' count at the end, on stderr; nothing on stdout."""
    source = write_lines(tmp_path / "in.jsonl", [completion("a", "Hello", max_tokens=2), {"custom_id": "b"}])
    master, terminal = os.openpty()
    job = subprocess.Popen(command(source, tmp_path / "out.jsonl"), stderr=terminal, stdout=subprocess.PIPE)
    os.close(terminal)
    shown = b""
    while True:
        try:
            shown += os.read(master, 65536)
        except OSError:  # the last writer has closed it
            break
    assert job.wait(60) == 0 and job.stdout.read() == b""
    assert b"Answering" in shown and b"1 answers, 1 with an error" in shown
    os.close(master)
