"""`tilestream bench`: how fast a model reads prompts and writes answers here."""

from __future__ import annotations

import json
import random
import re
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tilestream.cli import options
from tilestream.cli.console import loading_bar, note
from tilestream.cli.load import LoadResult, checked, run_load, summarise

if TYPE_CHECKING:
    from tilestream import LLM
    from tilestream.engine import Engine

EPILOG = """[bold]Examples[/]

tilestream bench
tilestream bench --model ./model.gguf --num-threads 8 --batch-sizes 1,4,16 --json result.json

# 100 requests, two a second, each of 1000 tokens in and 200 out
tilestream bench --load 100 --load-tokens 1000/200 --load-rate 2

[bold]What is timed[/]

prompt: one prompt of --prompt-tokens random tokens, from add_request to its first token; nothing cached.
decode: a batch of answers of --decode-tokens, from the last first token to the end; sampling included.
load: --load requests on the engine as the server runs it, from the first one sent to the last answer's end."""


@dataclass(frozen=True)
class Case:
    """One line of the table; tokens per second, over the repeats."""

    name: str
    batch_size: int
    num_tokens: int
    median_tok_s: float
    min_tok_s: float
    max_tok_s: float


def command(
    model: options.Model = options.DEFAULT_MODEL,
    prompt_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Length of the prompt that is timed, in tokens.")
    ] = 512,
    decode_tokens: Annotated[
        int, typer.Option(metavar="N", min=2, help="Length of the answers that are timed, in tokens.")
    ] = 64,
    batch_sizes: Annotated[
        str, typer.Option(metavar="LIST", help="How many answers at once: numbers with commas.")
    ] = "1,8,32",
    load: Annotated[
        int, typer.Option(metavar="N", min=0, help="Requests of the load; 0 leaves it out.", rich_help_panel="Load")
    ] = 32,
    load_tokens: Annotated[
        str, typer.Option(metavar="IN/OUT", help="Tokens of each prompt and answer.", rich_help_panel="Load")
    ] = "256/64",
    load_rate: Annotated[
        float | None,
        typer.Option(
            metavar="R", min=1e-3, help="Requests sent per second. Default: all at once.", show_default=False,
            rich_help_panel="Load",
        ),
    ] = None,
    repeats: Annotated[
        int, typer.Option(metavar="N", min=1, help="Times each case is measured; the median is shown.")
    ] = 3,
    dtype: options.WeightDtypeOption = options.WeightDtype.auto,
    kv_dtype: options.KvDtypeOption = options.KvDtype.auto,
    act_bits: options.ActBitsOption = options.ActBits.auto,
    token_budget: options.TokenBudget = 512,
    batch_invariant: options.BatchInvariant = False,
    device: options.Device = "cpu",
    tensor_parallel_size: options.TensorParallelSize = 1,
    num_threads: options.NumThreads = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Also write the result to this file.", show_default=False)
    ] = None,
) -> None:
    """Measure the whole engine: reading a prompt, writing answers in batches, and a load of requests."""
    options.leave_to_rank_0(tensor_parallel_size)
    sizes = _parse_sizes(batch_sizes)
    load_in, load_out = _parse_load_tokens(load_tokens)
    from tilestream import LLM
    from tilestream._native import _C

    decode_cache_tokens = max(sizes) * (_DECODE_PROMPT_TOKENS + decode_tokens)
    load_cache_tokens = min(load, _SERVER_NUM_SEQS) * (load_in + load_out)
    with loading_bar(model) as progress:
        llm = LLM(
            model,
            dtype=dtype.value,
            kv_dtype=kv_dtype.value,
            act_bits=act_bits.value,
            kv_cache_tokens=max(prompt_tokens, decode_cache_tokens, load_cache_tokens) + _SPARE_TOKENS,
            max_num_seqs=max(*sizes, _SERVER_NUM_SEQS),
            max_queued_requests=max(*sizes, load, 1),
            token_budget=token_budget,
            enable_prefix_caching=False,
            batch_invariant=batch_invariant,
            device=device,
            tensor_parallel_size=tensor_parallel_size,
            num_threads=num_threads,
            progress=progress,
        )
    cases = [_measure_prompt(llm, prompt_tokens, repeats)]
    cases += [_measure_decode(llm, size, decode_tokens, repeats) for size in sizes]
    load_result = _measure_load(llm, load, load_in, load_out, load_rate, repeats) if load else None
    memory = f"weights {llm.weight_bytes / 1e6:.1f} MB, KV cache {llm.kv_token_bytes} bytes a token"
    _print_tables(f"{model}, {_C.num_threads()} threads; {memory}", cases, load_result)
    if json_path is not None:
        facts = {
            "model": model,
            "num_threads": _C.num_threads(),
            "dtype": dtype.value,
            "kv_dtype": kv_dtype.value,
            "act_bits": act_bits.value,
        }
        facts |= {"weight_bytes": llm.weight_bytes, "kv_token_bytes": llm.kv_token_bytes}
        result = facts | {
            "cases": [asdict(case) for case in cases],
            "load": None if load_result is None else asdict(load_result),
        }
        json_path.write_text(json.dumps(result, indent=2) + "\n")


_DECODE_PROMPT_TOKENS = 16  # short, as in llama-bench's tg tests: decode starts at a nearly empty context
_SPARE_TOKENS = 4096  # whole pages and the tokens of the next step
_SERVER_NUM_SEQS = 256  # requests that `tilestream serve` runs at once


def _parse_sizes(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise typer.BadParameter(f"--batch-sizes is {text!r}; the form is 1,8,32, each at least 1.")
    return [int(part) for part in parts]


def _parse_load_tokens(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or int(match[1]) < 1 or int(match[2]) < 2:
        raise typer.BadParameter(f"--load-tokens is {text!r}; the form is 256/64: at least 1 in and 2 out.")
    return int(match[1]), int(match[2])


def _prompt(llm: LLM, name: str, num_tokens: int) -> list[int]:
    return random.Random(name).choices(range(llm.tokenizer.vocab_size), k=num_tokens)


def _add(engine: Engine, llm: LLM, name: str, num_prompt_tokens: int, max_tokens: int) -> None:
    from tilestream import SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    engine.add_request(name, _prompt(llm, name, num_prompt_tokens), params)


def _measure_prompt(llm: LLM, num_tokens: int, repeats: int) -> Case:
    rates = []
    for repeat in range(repeats + 1):  # the first one warms up
        start_s = time.perf_counter()
        _add(llm.engine, llm, f"prompt-{repeat}", num_tokens, 1)
        while llm.engine.has_work():
            checked(llm.engine.step())
        rates.append(num_tokens / (time.perf_counter() - start_s))
    return _case("prompt", 1, num_tokens, rates[1:])


def _measure_decode(llm: LLM, batch_size: int, num_tokens: int, repeats: int) -> Case:
    rates = []
    for repeat in range(repeats + 1):
        for i in range(batch_size):
            _add(llm.engine, llm, f"decode-{repeat}-{i}", _DECODE_PROMPT_TOKENS, num_tokens)
        waiting = batch_size
        while waiting:
            waiting -= sum(delta.num_output_tokens == 1 for delta in checked(llm.engine.step()))
        start_s = time.perf_counter()
        num_decoded = 0
        while llm.engine.has_work():
            num_decoded += sum(len(delta.token_ids) for delta in checked(llm.engine.step()))
        rates.append(num_decoded / (time.perf_counter() - start_s))
    return _case("decode", batch_size, num_tokens, rates[1:])


def _measure_load(
    llm: LLM, num_requests: int, prompt_tokens: int, output_tokens: int, rate: float | None, repeats: int
) -> LoadResult:
    """The repeat of median length; the first one warms up."""
    results = []
    for repeat in range(repeats + 1):
        prompts = [_prompt(llm, f"load-{repeat}-{i}", prompt_tokens) for i in range(num_requests)]
        times = run_load(llm.engine, prompts, output_tokens, requests_per_s=rate)
        results.append(summarise(times, num_requests * prompt_tokens))
    return sorted(results[1:], key=lambda result: result.seconds)[repeats // 2]


def _case(name: str, batch_size: int, num_tokens: int, rates: list[float]) -> Case:
    return Case(name, batch_size, num_tokens, statistics.median(rates), min(rates), max(rates))


def _print_tables(title: str, cases: list[Case], load: LoadResult | None) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("case", "batch", "tokens", "tok/s", "min - max", title=title)
    for case in cases:
        spread = f"{case.min_tok_s:.1f} - {case.max_tok_s:.1f}"
        table.add_row(case.name, str(case.batch_size), str(case.num_tokens), f"{case.median_tok_s:.1f}", spread)
    console.print(table)
    if load is not None:
        each = f"{load.prompt_tokens // load.num_requests}/{load.output_tokens // load.num_requests}"
        columns = ("seconds", "out tok/s", "in all", "TTFT", "TTFT p99", "TPOT")
        table = Table(*columns, title=f"load: {load.num_requests} requests of {each} tokens; TTFT, TPOT: medians")
        latencies = [f"{s * 1e3:.1f} ms" for s in (load.ttft_median_s, load.ttft_p99_s, load.tpot_median_s)]
        table.add_row(f"{load.seconds:.2f}", f"{load.output_tok_s:.1f}", f"{load.total_tok_s:.1f}", *latencies)
        console.print(table)
    if not sys.stdout.isatty():
        note("other programs on this machine change these figures; compare within one run")
