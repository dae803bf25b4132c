"""`tilestream serve`: the OpenAI-compatible server."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from tilestream.cli import options
from tilestream.cli.console import loading_bar, note

EPILOG = """[bold]Examples[/]

tilestream serve
tilestream serve --model ./model.gguf --host 0.0.0.0 --port 9000 --kv-dtype int8 --kv-cache-tokens 65536

# ask it
curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "Once upon a time"}'

# the same from Python
client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="unused")

# with a key, and a trace of every step and request for ui.perfetto.dev
TILESTREAM_API_KEY=secret tilestream serve --trace trace.json

[bold]Endpoints[/]

/ (a page to chat and watch the batch) /v1/chat/completions /v1/completions /v1/models /v1/engine/steps
/tokenize /detokenize /health /ready /metrics /docs"""


def command(
    model: options.Model = options.DEFAULT_MODEL,
    served_model_name: options.ServedModelName = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every network of the machine.")] = (
        "127.0.0.1"
    ),
    port: Annotated[
        int, typer.Option(metavar="N", min=0, max=65535, help="TCP port; 0 takes a free one and prints it.")
    ] = 8000,
    max_num_seqs: options.MaxNumSeqs = 256,
    max_queued_requests: options.MaxQueuedRequests = 1024,
    max_queued_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Most prompt tokens that wait; a request that would make them more gets a 503.",
            rich_help_panel="Engine",
        ),
    ] = None,
    token_budget: options.TokenBudget = 512,
    tbt_ms: options.TbtMs = None,
    policy: options.PolicyOption = options.Policy.fcfs,
    max_model_len: options.MaxModelLen = None,
    dtype: options.WeightDtypeOption = options.WeightDtype.auto,
    kv_dtype: options.KvDtypeOption = options.KvDtype.auto,
    act_bits: options.ActBitsOption = options.ActBits.auto,
    kv_cache_tokens: options.KvCacheTokens = None,
    prefix_caching: Annotated[
        bool,
        typer.Option(
            "--prefix-caching/--no-prefix-caching",
            help="Keep the KV pages of finished requests, for prompts that begin the same.",
            rich_help_panel="Engine",
        ),
    ] = True,
    batch_invariant: options.BatchInvariant = False,
    device: options.Device = "cpu",
    softmax_ranges: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Ranges of the layers' softmax maxima (tilestream.calibrate): decodes on CUDA then do not look for them.",
            rich_help_panel="Engine",
        ),
    ] = None,
    tensor_parallel_size: options.TensorParallelSize = 1,
    num_threads: options.NumThreads = None,
    replicas: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Serve from so many engines on a Ray cluster, or on this machine; a request goes to the one that has the "
            "beginning of its prompt cached. Needs the extra 'ray'.",
            show_default=False,
            rich_help_panel="Server",
        ),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY",
            envvar="TILESTREAM_API_KEY",
            help="Whoever sends this key may use the API; may be given several times. Default: everybody may.",
            show_default=False,
            rich_help_panel="Server",
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="More keys, one on each line.", rich_help_panel="Server"),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            help="Let web pages of this origin (https://example.org, or * for all) use the API; may be given several "
            "times.",
            show_default=False,
            rich_help_panel="Server",
        ),
    ] = None,
    request_timeout: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS", min=0.001, help="A request that takes longer gets a 504.", rich_help_panel="Server"
        ),
    ] = None,
    drain_timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            min=0,
            help="What running answers get to end after SIGTERM or Ctrl-C.",
            rich_help_panel="Server",
        ),
    ] = 30,
    access_log: Annotated[
        bool, typer.Option("--access-log/--no-access-log", help="One line per request.", rich_help_panel="Server")
    ] = True,
    trace: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            help="Write every step and request to this file, for chrome://tracing and ui.perfetto.dev.",
            rich_help_panel="Server",
        ),
    ] = None,
    trace_kernels: Annotated[
        int,
        typer.Option(
            metavar="STEPS",
            min=0,
            help="With --trace: once a minute, so many steps with each op and kernel in them, by torch's profiler.",
            rich_help_panel="Server",
        ),
    ] = 0,
) -> None:
    """Serve a model over HTTP with OpenAI's API, streaming, and Prometheus metrics.

    Ctrl-C or SIGTERM stops it: no new requests, and running answers may end. A second one: at once.
    """
    if replicas is None:
        options.leave_to_rank_0(tensor_parallel_size)
    from tilestream.engine.errors import EngineDeadError
    from tilestream.engine.trace import Trace
    from tilestream.server.run import bind, log_to_stderr, serve
    from tilestream.server.settings import ServerSettings, read_api_keys
    from tilestream.server.telemetry import exporter_class

    if os.environ.get("TILESTREAM_API_KEY") == "":  # a secret that did not load must not open the server to all
        raise typer.BadParameter("TILESTREAM_API_KEY is set but empty; unset it to serve without keys.")
    settings = ServerSettings(
        api_keys=read_api_keys(api_key or (), api_key_file),
        cors_origins=tuple(cors_origin or ()),
        request_timeout_s=request_timeout,
        drain_timeout_s=drain_timeout,
        access_log=access_log,
    )

    llm_options = {
        "model": model,
        "dtype": dtype.value,
        "kv_dtype": kv_dtype.value,
        "act_bits": act_bits.value,
        "kv_cache_tokens": kv_cache_tokens,
        "max_num_seqs": max_num_seqs,
        "max_queued_requests": max_queued_requests,
        "max_queued_tokens": max_queued_tokens,
        "tbt_ms": tbt_ms,
        "policy": policy.value,
        "token_budget": token_budget,
        "max_model_len": max_model_len,
        "enable_prefix_caching": prefix_caching,
        "batch_invariant": batch_invariant,
        "device": device,
        "softmax_ranges": softmax_ranges,
        "tensor_parallel_size": tensor_parallel_size,
        "num_threads": num_threads,
    }

    # What cannot be is told now, not after the model is loaded.
    exporter_class()
    if replicas is not None:
        if trace is not None:
            raise typer.BadParameter("--trace is of one engine; it cannot be had with --replicas.")
        from tilestream.replicas.deployment import ReplicaOptions, serve_replicas

        one = ReplicaOptions(llm=llm_options, model_name=served_model_name, settings=settings)
        serve_replicas(one, replicas, host=host, port=port)
        return
    listener = bind(host, port)
    if trace_kernels and trace is None:
        raise typer.BadParameter(f"--trace-kernels {trace_kernels} needs --trace FILE")
    trace_file = None if trace is None else Trace(trace)
    from tilestream import LLM
    from tilestream.kernel_trace import KernelProfiler

    log_to_stderr()
    with loading_bar(model) as progress:
        llm = LLM(**llm_options, progress=progress)
    name = served_model_name or llm.name
    limits = llm.engine.config
    note(f"{name}: up to {limits.max_model_len} tokens a request, {limits.capacity_tokens} in the KV cache")
    if trace_kernels:
        trace_file.kernels = KernelProfiler(trace_kernels)
    llm.engine.watch.trace = trace_file
    try:
        serve(
            llm.async_engine, llm.tokenizer, listener, model_name=name, max_model_len=limits.max_model_len, settings=settings
        )
        failed = False
    except EngineDeadError:  # the log says why
        failed = True
    if trace_file is not None:
        trace_file.close()
    if failed:
        sys.stderr.flush()
        os._exit(1)  # at once: the engine's thread may be in a kernel that waits for a rank that is gone
    llm.close()
