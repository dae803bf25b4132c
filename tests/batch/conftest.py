"""A batch job on the fake runner: answers that depend on every token of the prompt, and on nothing else."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from tests.engine.fakes import FakeRunner, make_config
from tests.server import fakes
from tilestream.batch.job import BatchJob, Counts, Progress
from tilestream.batch.journal import Journal
from tilestream.batch.lines import read_lines
from tilestream.batch.order import in_shared_order
from tilestream.engine.async_engine import AsyncEngine
from tilestream.engine.engine import Engine

MODEL = "fake-model"


class ByteTokenizer(fakes.ByteTokenizer):
    eos_token_ids = frozenset({fakes.EOS})


def make_engine(**changes: object) -> Engine:
    """Its page size is 16."""
    config = make_config(max_queued_requests=10_000, **changes)
    runner = FakeRunner(config)
    runner.engine = Engine(runner, ByteTokenizer(), config)
    return runner.engine


def make_job(engine: Engine, journal: Journal, *, progress: Progress = Progress(), order=in_shared_order) -> BatchJob:
    return BatchJob(AsyncEngine(engine), ByteTokenizer(), MODEL, engine.config, journal, progress, order)


def run_job(source: Path, target: Path, engine: Engine | None = None, **how: object) -> Counts:
    """What the command does, without its options."""
    lines = read_lines(source)
    journal = Journal(target)
    done = journal.resume(lines, MODEL)
    job = make_job(engine or make_engine(), journal, **how)
    try:
        return asyncio.run(job.run([line for line in lines if line.id not in done]))
    finally:
        job._engine.shutdown()
        journal.close()


def completion(custom_id: str, prompt: object, **body: object) -> dict:
    body = {"prompt": prompt, "max_tokens": 6, "temperature": 0, **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}


def chat(custom_id: str, text: str, **body: object) -> dict:
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 6, "temperature": 0, **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def write_lines(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def entries(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def told(body: dict) -> object:
    """What an answer says, without what differs from run to run: its choices, or its error."""
    return body["choices"] if "choices" in body else body["error"]


def answers(path: Path) -> dict[str, object]:
    """What each line was told, each exactly once, by custom_id."""
    found: dict[str, object] = {}
    for entry in entries(path):
        assert entry["custom_id"] not in found, "answered twice"
        response = entry["response"]
        found[entry["custom_id"]] = entry["error"] if response is None else told(response["body"])
    return found


def shared_prompts(num: int, num_families: int = 3) -> list[dict]:
    """Requests whose prompts begin with one of a few texts, mixed."""
    heads = [f"{family} " * 20 for family in range(num_families)]
    return [completion(f"r{i}", f"{heads[i % num_families]}and now number {i}", max_tokens=3 + i % 7) for i in range(num)]
