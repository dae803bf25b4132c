"""`tilestream bench`: how fast a model reads prompts and writes answers here."""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tilestream.cli import options
from tilestream.cli.console import loading_bar, note

if TYPE_CHECKING:
    from tilestream import LLM
    from tilestream.engine import Engine

EPILOG = """[bold]Examples[/]

tilestream bench
tilestream bench --model ./model.gguf --num-threads 8 --batch-sizes 1,4,16 --json result.json

[bold]What is timed[/]

prompt: one prompt of --prompt-tokens random tokens, from add_request to its first token; nothing cached.
decode: a batch of answers of --decode-tokens, from the last first token to the end; sampling included."""


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
    repeats: Annotated[
        int, typer.Option(metavar="N", min=1, help="Times each case is measured; the median is shown.")
    ] = 3,
    kv_dtype: options.KvDtypeOption = options.KvDtype.auto,
    token_budget: options.TokenBudget = 512,
    batch_invariant: options.BatchInvariant = False,
    num_threads: options.NumThreads = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Also write the result to this file.", show_default=False)
    ] = None,
) -> None:
    """Measure prompt and decode tokens per second of the whole engine, step by step."""
    sizes = _parse_sizes(batch_sizes)
    from tilestream import LLM

    with loading_bar(model) as progress:
        llm = LLM(
            model,
            kv_dtype=kv_dtype.value,
            kv_cache_tokens=max(prompt_tokens, max(sizes) * (_DECODE_PROMPT_TOKENS + decode_tokens)) + _SPARE_TOKENS,
            max_num_seqs=max(sizes),
            token_budget=token_budget,
            enable_prefix_caching=False,
            batch_invariant=batch_invariant,
            num_threads=num_threads,
            progress=progress,
        )
    cases = [_measure_prompt(llm, prompt_tokens, repeats)]
    cases += [_measure_decode(llm, size, decode_tokens, repeats) for size in sizes]
    _print_table(model, cases)
    if json_path is not None:
        result = {"model": model, "kv_dtype": kv_dtype.value, "cases": [asdict(case) for case in cases]}
        json_path.write_text(json.dumps(result, indent=2) + "\n")


_DECODE_PROMPT_TOKENS = 16  # short, as in llama-bench's tg tests: decode starts at a nearly empty context
_SPARE_TOKENS = 4096  # whole pages and the tokens of the next step


def _parse_sizes(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise typer.BadParameter(f"--batch-sizes is {text!r}; the form is 1,8,32, each at least 1.")
    return [int(part) for part in parts]


def _add(engine: Engine, llm: LLM, name: str, num_prompt_tokens: int, max_tokens: int) -> None:
    from tilestream import SamplingParams

    prompt = random.Random(name).choices(range(llm.tokenizer.vocab_size), k=num_prompt_tokens)
    engine.add_request(name, prompt, SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True))


def _measure_prompt(llm: LLM, num_tokens: int, repeats: int) -> Case:
    rates = []
    for repeat in range(repeats + 1):  # the first one warms up
        start_s = time.perf_counter()
        _add(llm.engine, llm, f"prompt-{repeat}", num_tokens, 1)
        while llm.engine.has_work():
            _step(llm.engine)
        rates.append(num_tokens / (time.perf_counter() - start_s))
    return _case("prompt", 1, num_tokens, rates[1:])


def _measure_decode(llm: LLM, batch_size: int, num_tokens: int, repeats: int) -> Case:
    rates = []
    for repeat in range(repeats + 1):
        for i in range(batch_size):
            _add(llm.engine, llm, f"decode-{repeat}-{i}", _DECODE_PROMPT_TOKENS, num_tokens)
        waiting = batch_size
        while waiting:
            waiting -= sum(delta.num_output_tokens == 1 for delta in _step(llm.engine))
        start_s = time.perf_counter()
        num_decoded = 0
        while llm.engine.has_work():
            num_decoded += sum(len(delta.token_ids) for delta in _step(llm.engine))
        rates.append(num_decoded / (time.perf_counter() - start_s))
    return _case("decode", batch_size, num_tokens, rates[1:])


def _step(engine: Engine) -> list:
    deltas = engine.step()
    for delta in deltas:
        if delta.finish_reason in ("error", "abort"):
            raise RuntimeError(f"{delta.request_id}: {delta.error or delta.finish_reason}")
    return deltas


def _case(name: str, batch_size: int, num_tokens: int, rates: list[float]) -> Case:
    return Case(name, batch_size, num_tokens, statistics.median(rates), min(rates), max(rates))


def _print_table(model: str, cases: list[Case]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("case", "batch", "tokens", "tok/s", "min - max", title=f"{model}, tokens per second")
    for case in cases:
        spread = f"{case.min_tok_s:.1f} - {case.max_tok_s:.1f}"
        table.add_row(case.name, str(case.batch_size), str(case.num_tokens), f"{case.median_tok_s:.1f}", spread)
    Console().print(table)
    if not sys.stdout.isatty():
        note("other programs on this machine change these figures; compare within one run")
