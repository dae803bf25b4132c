"""`tilestream simulate`: a trace through the scheduler in virtual time."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tilestream.cli import options
from tilestream.cli.console import loading_bar, note

if TYPE_CHECKING:
    from tilestream.engine.cost_model import CostModel

EPILOG = """[bold]Examples[/]

# what this machine would make of a trace, with a target of 50 ms between tokens
tilestream simulate trace.csv --tbt-ms 50 --save-cost-model here.json --plot trace.png

# a thousand replicas of an H200, estimated by formula, at 500 times the trace's rate
tilestream simulate trace.csv --cost-model estimate-h200-llama3-8b --replicas 1000 --rate-scale 500

[bold]A trace[/]

A CSV with the columns TIMESTAMP,ContextTokens,GeneratedTokens, and if wanted Tenant,Priority,PrefixId,PrefixTokens."""


class Route(str, Enum):
    """Which replica gets a request."""

    round_robin = "round-robin"
    least_loaded = "least-loaded"
    prefix_affinity = "prefix-affinity"


def command(
    trace: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="CSV file of requests.")],
    cost_model: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|NAME",
            help="What a step costs: a file of --save-cost-model, or estimate-h200-llama3-8b (by formula, nothing measured). "
            "Default: --model is measured on this machine.",
        ),
    ] = None,
    model: options.Model = options.DEFAULT_MODEL,
    save_cost_model: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keep the cost model that was used, as JSON.")
    ] = None,
    replicas: Annotated[int, typer.Option(metavar="N", min=1, help="Engines, each with a KV cache of its own.")] = 1,
    route: Annotated[
        Route,
        typer.Option(
            help="Which replica gets a request; prefix-affinity: the one that had its prefix first, unless it is loaded."
        ),
    ] = Route.least_loaded,
    policy: options.PolicyOption = options.Policy.fcfs,
    token_budget: options.TokenBudget = 512,
    tbt_ms: options.TbtMs = None,
    max_num_seqs: options.MaxNumSeqs = 256,
    max_queued_requests: options.MaxQueuedRequests = 1024,
    kv_cache_tokens: Annotated[
        int, typer.Option(metavar="N", min=64, help="Tokens that a KV cache holds.", rich_help_panel="Engine")
    ] = 400_000,
    rate_scale: Annotated[
        float, typer.Option(metavar="X", min=1e-6, help="Requests come so many times as fast as in the trace.")
    ] = 1.0,
    max_requests: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Take the first so many. Default: all.", show_default=False)
    ] = None,
    ttft_limit: Annotated[
        float, typer.Option(metavar="S", min=0, help="Time to first token, for the goodput.", rich_help_panel="Limits")
    ] = 2.0,
    tpot_limit: Annotated[
        float, typer.Option(metavar="MS", min=0, help="Time per output token, for the goodput.", rich_help_panel="Limits")
    ] = 100.0,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="A picture of it, as PNG.")] = None,
) -> None:
    """Replay a trace in virtual time through the engine's own scheduler; nothing is computed but the schedule."""
    if plot is not None and plot.suffix.lower() != ".png":
        raise typer.BadParameter(f"--plot is {str(plot)!r}; the name must end in .png.")
    from tilestream.engine.config import EngineConfig
    from tilestream.engine.simulation_report import summarise, table
    from tilestream.engine.simulator import simulate
    from tilestream.engine.workload import read_trace

    requests = read_trace(trace, rate_scale=rate_scale, max_requests=max_requests)
    costs = _cost_model(cost_model, model, token_budget)
    if save_cost_model is not None:
        costs.save(save_cost_model)
    config = EngineConfig(
        kv_cache_tokens=kv_cache_tokens,
        max_model_len=max(request.prompt_tokens + request.output_tokens for request in requests) + 1,
        max_num_seqs=max_num_seqs,
        token_budget=token_budget,
        tbt_ms=tbt_ms,
        policy=policy.value,
        max_queued_requests=max_queued_requests,
        enable_prefix_caching=any(request.prefix_id for request in requests),
    )
    note(f"{len(requests)} requests, {replicas} replicas; steps: {costs.source}")
    result = simulate(requests, config, costs, num_replicas=replicas, route=route.value)
    limits = {"ttft_limit_s": ttft_limit, "tpot_limit_s": tpot_limit / 1e3}
    print(table(summarise(result, **limits), **limits))
    if plot is not None:
        from tilestream.simulation_picture import draw_simulation

        draw_simulation(result, plot, title=f"{trace.name} x {rate_scale:g}, {replicas} replicas, {policy.value}", tbt_ms=tbt_ms)


def _cost_model(name: str | None, model: str, token_budget: int) -> CostModel:
    from tilestream.engine.cost_model import BUILT_IN, CostModel

    if name is None:
        from tilestream import LLM
        from tilestream.engine.profiler import measure_cost_model

        with loading_bar(model) as progress:
            llm = LLM(model, token_budget=token_budget, progress=progress)
        return measure_cost_model(llm.engine.runner, llm.tokenizer, llm.engine.config)
    if name in BUILT_IN:
        return BUILT_IN[name]
    if not Path(name).is_file():
        raise typer.BadParameter(f"--cost-model is {name!r}; it must be a file, or one of {', '.join(BUILT_IN)}.")
    return CostModel.load(name)
