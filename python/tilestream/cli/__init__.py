"""The `tilestream` command: generate | serve | batch | bench | plan | simulate | overlap | quantize | info.

Each command is a module that imports what it needs when it runs, so that `generate` never waits for a
web framework, and `--help` for torch.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import tilestream
import typer
from tilestream.cli import batch, bench, generate, info, overlap, plan, quantize, serve, simulate

app = typer.Typer(
    name="tilestream",
    help="Run language models with Tilestream's own kernels and scheduler.",
    epilog="""[bold]Start here[/]

# a model that comes with the package answers
tilestream generate "Why is the sky blue?"

# the same model as an OpenAI-compatible server, then a client
tilestream serve --port 8000
curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
  -d '{"messages": [{"role": "user", "content": "Hi!"}]}'

# what was built, and what this machine can do
tilestream info""",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
)
for module in (generate, serve, batch, bench, plan, simulate, overlap, quantize, info):
    app.command(name=module.__name__.rpartition(".")[2], epilog=module.EPILOG)(module.command)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"tilestream {tilestream.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point. An error is one line on stderr: exit code 2 for a wrong command line, 1 for the rest."""
    debug = os.environ.get("TILESTREAM_DEBUG") == "1"
    # torch's own threads have next to nothing to do here, and their waiting takes the cores from our workers.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        sys.exit(app(prog_name="tilestream", standalone_mode=False))
    except Exception as error:
        if debug:
            raise
        is_usage_error = hasattr(error, "format_message")  # typer's, with the option and what it takes
        message = error.format_message() if is_usage_error else _one_line(error)
        if message:  # a bare `tilestream` has shown its help
            print(f"tilestream: error: {message}", file=sys.stderr)
        sys.exit(2 if is_usage_error else 1)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    is_ours = type(error).__module__.startswith("tilestream.")
    if text and (is_ours or isinstance(error, (ValueError, OSError, ImportError))):
        return text
    return f"{type(error).__name__}: {text} (TILESTREAM_DEBUG=1 shows where)"
