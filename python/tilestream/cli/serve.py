"""`tilestream serve`: the OpenAI-compatible server."""

from __future__ import annotations

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

[bold]Endpoints[/]

/v1/chat/completions /v1/completions /v1/models /health /metrics /docs"""


def command(
    model: options.Model = options.DEFAULT_MODEL,
    served_model_name: Annotated[
        str | None, typer.Option(help="Name that clients ask for. Default: the model's own.", show_default=False)
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every network of the machine.")] = (
        "127.0.0.1"
    ),
    port: Annotated[
        int, typer.Option(metavar="N", min=0, max=65535, help="TCP port; 0 takes a free one and prints it.")
    ] = 8000,
    max_num_seqs: Annotated[
        int, typer.Option(metavar="N", min=1, help="Most requests that run at once.", rich_help_panel="Engine")
    ] = 256,
    max_queued_requests: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, help="Most requests that wait; one more gets a 503.", rich_help_panel="Engine"
        ),
    ] = 1024,
    token_budget: options.TokenBudget = 512,
    max_model_len: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Most tokens of one prompt and its answer. Default: what the model was trained for, or the "
            "whole KV cache if that is smaller.",
            rich_help_panel="Engine",
        ),
    ] = None,
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
    num_threads: options.NumThreads = None,
) -> None:
    """Serve a model over HTTP with OpenAI's API, streaming, and Prometheus metrics.

    Ctrl-C or SIGTERM stops it: no new requests, and running answers get 10 seconds to end.
    """
    from tilestream.server.run import bind, serve

    listener = bind(host, port)  # a taken port is told now, not after the model is loaded
    from tilestream import LLM
    from tilestream.engine.async_engine import AsyncEngine

    with loading_bar(model) as progress:
        llm = LLM(
            model,
            kv_dtype=kv_dtype.value,
            act_bits=act_bits.value,
            kv_cache_tokens=kv_cache_tokens,
            max_num_seqs=max_num_seqs,
            max_queued_requests=max_queued_requests,
            token_budget=token_budget,
            max_model_len=max_model_len,
            enable_prefix_caching=prefix_caching,
            batch_invariant=batch_invariant,
            device=device,
            softmax_ranges=softmax_ranges,
            num_threads=num_threads,
            progress=progress,
        )
    name = served_model_name or llm.name
    limits = llm.engine.config
    note(f"{name}: up to {limits.max_model_len} tokens a request, {limits.capacity_tokens} in the KV cache")
    serve(AsyncEngine(llm.engine), llm.tokenizer, listener, model_name=name, max_model_len=limits.max_model_len)
