"""`tilestream batch`: a file of requests in, a file of answers out."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Annotated

import typer

from tilestream.cli import options
from tilestream.cli.console import loading_bar, note, progress_bars

EPILOG = """[bold]Examples[/]

tilestream batch requests.jsonl answers.jsonl
tilestream batch requests.jsonl answers.jsonl --model ./model.gguf --kv-cache-tokens 65536

[bold]A line of the input[/]

{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [{"role": "user", "content": "Hi!"}]}}

[bold]A line of the output[/]

{"id": "batch_req_...", "custom_id": "a", "response": {"status_code": 200, "request_id": "...", "body": {...}}, "error": null}

[bold]After a stop, a crash or a kill[/]

Give the same command again: lines that are answered stay, the others are answered now."""


def command(
    input_file: Annotated[
        Path,
        typer.Argument(metavar="IN.jsonl", exists=True, dir_okay=False, help="Requests, in OpenAI's batch format."),
    ],
    output_file: Annotated[
        Path, typer.Argument(metavar="OUT.jsonl", dir_okay=False, help="Where the answers go, as each ends.")
    ],
    model: options.Model = options.DEFAULT_MODEL,
    served_model_name: options.ServedModelName = None,
    token_budget: options.TokenBudget = 1024,
    max_model_len: options.MaxModelLen = None,
    dtype: options.WeightDtypeOption = options.WeightDtype.auto,
    kv_dtype: options.KvDtypeOption = options.KvDtype.auto,
    act_bits: options.ActBitsOption = options.ActBits.auto,
    kv_cache_tokens: options.KvCacheTokens = None,
    batch_invariant: options.BatchInvariant = False,
    device: options.Device = "cpu",
    tensor_parallel_size: options.TensorParallelSize = 1,
    num_threads: options.NumThreads = None,
) -> None:
    """Answer a file of requests, each as `tilestream serve` would, in the order that shares the most.

    A line that is no request gets a line that says so, and stops nothing.
    """
    options.leave_to_rank_0(tensor_parallel_size)
    from tilestream.batch.journal import Journal
    from tilestream.batch.lines import read_lines

    if output_file.exists() and output_file.samefile(input_file):
        raise typer.BadParameter(f"{output_file} is the input; the answers need a file of their own.")
    if not output_file.parent.is_dir():
        raise typer.BadParameter(f"{output_file.parent} is no directory; make it first.")
    lines = read_lines(input_file)
    journal = Journal(output_file)
    done = journal.resume(lines)
    left = [line for line in lines if line.id not in done]
    if done:
        note(f"{len(done)} of {len(lines)} lines are answered already")
    if not left:
        journal.close()
        note(f"{output_file}: nothing to do")
        return

    from tilestream import LLM
    from tilestream.batch.job import BatchJob, Progress

    with loading_bar(model) as progress:
        llm = LLM(
            model,
            dtype=dtype.value,
            kv_dtype=kv_dtype.value,
            act_bits=act_bits.value,
            kv_cache_tokens=kv_cache_tokens,
            max_num_seqs=token_budget,  # the KV memory decides how many run
            max_queued_requests=_NO_LIMIT,
            token_budget=token_budget,
            max_model_len=max_model_len,
            batch_invariant=batch_invariant,
            device=device,
            tensor_parallel_size=tensor_parallel_size,
            num_threads=num_threads,
            progress=progress,
        )
    name = served_model_name or llm.name
    journal.resume(lines, name)
    begin_s = time.monotonic()
    try:
        num_requests = sum(line.fault is None for line in left)
        with progress_bars({"Planning": num_requests, "Answering": len(left)}) as (planned, answered):
            progress = Progress(planned, answered)
            job = BatchJob(llm.async_engine, llm.tokenizer, name, llm.engine.config, journal, progress)
            counts = asyncio.run(job.run(left))
    except KeyboardInterrupt:
        note("stopped; the same command goes on from here")
        raise typer.Exit(130) from None
    finally:
        journal.close()
        llm.close()
    hits, asked = llm.engine.metrics.prefix_cache_hits, llm.engine.metrics.prefix_cache_queries
    shared = f", {hits / asked:.0%} of the prompt tokens shared" if asked else ""
    failed = f", {counts.num_failed} with an error" if counts.num_failed else ""
    note(f"{output_file}: {counts.num_good} answers{failed} in {time.monotonic() - begin_s:.1f} s{shared}")


_NO_LIMIT = 2**31 - 1
