"""The command line as a shell sees it: help that teaches, one-line errors, exit codes."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
from tilestream.cli import main
from tilestream.cli.bench import _parse_sizes
from tilestream.cli.plan import parse_requests
from tilestream.models import ModelLoadError

MODULE = (sys.executable, "-m", "tilestream")


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def shell(*command: str) -> Done:
    """Runs a command in a process of its own."""
    environment = os.environ | {"COLUMNS": "120", "TILESTREAM_DEBUG": "0"}
    done = subprocess.run(command, input="", capture_output=True, text=True, timeout=60, env=environment)
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Runs the entry point in this process, which has torch already: most of a command's time is its import."""
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "stdin", io.StringIO())

    def run_main(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["tilestream", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        return Done(int(stopped.value.code or 0), captured.out, captured.err)

    return run_main


def check_one_line_error(done: Done, code: int, *words: str) -> None:
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("tilestream: error: "), done.stderr
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["generate", "serve", "bench", "plan", "info", "tilestream generate"]),
        (["generate"], ["--max-tokens", "default: smollm2-135m-instruct", "Examples", "--raw"]),
        (
            ["serve"],
            [
                "--tensor-parallel-size",
                "--replicas",
                "--kv-cache-tokens",
                "--api-key",
                "--cors-origin",
                "--trace",
                "127.0.0.1",
                "/v1/chat/completions",
                "/metrics",
            ],
        ),
        (["bench"], ["--batch-sizes", "--load-rate", "What is timed"]),
        (["plan"], ["1x512,8x1@4096", "--png"]),
        (["info"], ["Examples"]),
    ],
)
def test_help(run: Callable[..., Done], arguments: list[str], words: list[str]) -> None:
    done = run(*arguments, "--help")
    assert done.returncode == 0, done.stderr
    for word in words:
        assert word in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["generat"], 2, ["generat"]),
        (["generate", "--max-tokens", "0", "x"], 2, ["--max-tokens", "1"]),
        (["generate", "--max-tokens", "many", "x"], 2, ["--max-tokens", "integer"]),
        (["generate", "--wat", "x"], 2, ["--wat"]),
        (["generate"], 2, ["prompt is empty"]),
        (["generate", "--model", "no/such/file.gguf", "x"], 1, ["no/such/file.gguf"]),
        (["serve", "--port", "70000"], 2, ["--port", "65535"]),
        (["serve", "--kv-dtype", "int3"], 2, ["int3", "fp8", "int4"]),
        (["serve", "--host", "203.0.113.1"], 1, ["203.0.113.1"]),
        (["serve", "--api-key", "two words "], 1, ["printable ASCII"]),
        (["serve", "--api-key-file", "no/such"], 2, ["--api-key-file", "no/such"]),
        (["serve", "--port", "0", "--trace", "no/such/t.json"], 1, ["no/such/t.json"]),
        (["serve", "--port", "0", "--trace-kernels", "4"], 2, ["--trace FILE"]),
        (["serve", "--port", "0", "--tensor-parallel-size", "0"], 2, ["--tensor-parallel-size"]),
        (["serve", "--port", "0", "--tensor-parallel-size", "2", "--model", "no/such/file.gguf"], 1, ["no/such/file.gguf"]),
        (["generate", "--tensor-parallel-size", "2", "--device", "cuda:1", "x"], 1, ["cuda:1", "which each rank takes"]),
        (["serve", "--request-timeout", "0"], 2, ["--request-timeout"]),
        (["serve", "--policy", "lifo"], 2, ["lifo", "fcfs", "lpm"]),
        (["serve", "--tbt-ms", "0"], 2, ["--tbt-ms"]),
        (["bench", "--batch-sizes", "1,zero"], 2, ["1,zero", "1,8,32"]),
        (["bench", "--load-tokens", "256x64"], 2, ["256x64", "256/64"]),
        (["plan", "--requests", "3y4", "--png", "x.png"], 2, ["3y4", "COUNTxQ_LEN@KV_LEN"]),
        (["plan", "--png", "x.pdf"], 2, ["x.pdf", ".png"]),
        (["plan"], 2, ["--png"]),
    ],
)
def test_bad_input(run: Callable[..., Done], arguments: list[str], code: int, words: list[str]) -> None:
    check_one_line_error(run(*arguments), code, *words)


@pytest.mark.parametrize("command", ["generate", "serve", "batch"])
def test_what_the_model_is_told(run: Callable[..., Done], command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {}

    def load(*arguments: object, **options: object) -> None:
        told.update(options)
        raise ModelLoadError("enough is known")

    monkeypatch.setattr("tilestream.LLM", load)
    request = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x", "max_tokens": 1}}
    (tmp_path / "in.jsonl").write_text(json.dumps(request))
    of_command = {"generate": ["x"], "serve": ["--port", "0"], "batch": [str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl")]}
    done = run(command, *of_command[command], "--dtype", "bfloat16", "--kv-dtype", "int8", "--act-bits", "16")
    check_one_line_error(done, 1, "enough is known")
    assert (told["dtype"], told["kv_dtype"], told["act_bits"]) == ("bfloat16", "int8", "16")


def test_an_empty_key_opens_no_server(run: Callable[..., Done], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILESTREAM_API_KEY", "")
    check_one_line_error(run("serve", "--port", "0"), 2, "TILESTREAM_API_KEY is set but empty")


def test_torchrun_without_ranks(run: Callable[..., Done], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of its processes would answer with a whole model."""
    torchrun = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in (torchrun | {"TORCHELASTIC_RUN_ID": "none"}).items():
        monkeypatch.setenv(name, value)
    for command in (["generate", "Hi"], ["serve", "--port", "0"], ["bench"]):
        check_one_line_error(run(*command), 1, "tensor_parallel_size is 1, but torchrun has started 2 ranks (WORLD_SIZE)")


def test_as_a_process() -> None:
    """What the tests above see is what a shell sees."""
    check_one_line_error(shell(*MODULE, "generate", "--max-tokens", "0", "x"), 2, "--max-tokens")
    version = shell(*MODULE, "--version")
    assert version.returncode == 0 and version.stdout.startswith("tilestream ")


def test_bare_command_shows_the_help(run: Callable[..., Done]) -> None:
    done = run()
    assert done.returncode == 2 and "generate" in done.stdout and done.stderr == ""


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILESTREAM_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["tilestream", "serve", "--host", "203.0.113.1"])
    with pytest.raises(OSError, match="203.0.113.1"):
        main()


def test_info(run: Callable[..., Done]) -> None:
    facts = json.loads(run("info", "--json").stdout)
    assert facts["torch_built_for"] == facts["torch_running"]
    assert facts["simd_level"] in facts["simd_levels_of_cpu"]
    assert {"attention", "append_kv", "linear", "sample"} <= set(facts["ops"])
    assert facts["simd_level"] in run("info").stdout


def test_plan_draws(run: Callable[..., Done], tmp_path: Path) -> None:
    picture = tmp_path / "plan.png"
    done = run("plan", "--requests", "1x64,3x1@300", "--png", str(picture))
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG") and "4 requests, 67 tokens" in done.stdout


def test_request_lists() -> None:
    assert parse_requests("1x512,2x1@4096, 7") == ([512, 1, 1, 7], [512, 4096, 4096, 7])
    for wrong in ("", "1x", "x5", "2x5@4", "0x5", "1x0", "-1x5"):
        with pytest.raises(typer.BadParameter, match="COUNT"):
            parse_requests(wrong)


def test_batch_sizes() -> None:
    assert _parse_sizes("1, 8,32") == [1, 8, 32]
    for wrong in ("", "0", "1,,2", "1.5"):
        with pytest.raises(typer.BadParameter):
            _parse_sizes(wrong)


def test_commands_import_only_what_they_need() -> None:
    """`generate` must not wait for a web framework or a plotting library."""
    modules = "('fastapi', 'uvicorn', 'matplotlib', 'rich')"
    script = f"import sys, tilestream.cli; print([name for name in {modules} if name in sys.modules])"
    done = shell(sys.executable, "-c", script)
    assert done.stdout.strip() == "[]", done.stderr
