"""`tilestream generate`: one prompt, streamed to stdout."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from tilestream.cli import options
from tilestream.cli.console import loading_bar, note

if TYPE_CHECKING:
    from tilestream import LLM, SamplingParams

EPILOG = """[bold]Examples[/]

tilestream generate "Write a haiku about rain."

# continue a text as it stands, with sampling that can be repeated
tilestream generate --raw "Once upon a time" --temperature 0.8 --top-p 0.95 --seed 7

# a prompt from a pipe; only the answer goes to stdout
cat report.txt | tilestream generate --max-tokens 200 > summary.txt

# your own model
tilestream generate --model ./model.gguf "Hello" """


def command(
    prompt: Annotated[str | None, typer.Argument(help="What to say to the model. Default: read from stdin.")] = None,
    model: options.Model = options.DEFAULT_MODEL,
    max_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Most tokens to generate.")] = 256,
    temperature: Annotated[
        float, typer.Option(metavar="T", min=0.0, help="0: always the likeliest token; 1: the model's own odds.")
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(metavar="P", min=0.0, max=1.0, help="Draw from the likeliest tokens with this share of the odds."),
    ] = 1.0,
    top_k: Annotated[
        int, typer.Option(metavar="N", min=0, help="Draw from this many likeliest tokens; 0: from all.")
    ] = 0,
    seed: Annotated[
        int | None,
        typer.Option(metavar="N", help="Same seed, same answer. Default: a new one each time.", show_default=False),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw",
            help="Wrap the prompt in the model's chat template, or take it as it stands. Default: chat if it has one.",
            show_default=False,
        ),
    ] = None,
    stats: Annotated[bool, typer.Option("--stats/--no-stats", help="A line of timings on stderr at the end.")] = True,
    dtype: options.WeightDtypeOption = options.WeightDtype.auto,
    kv_dtype: options.KvDtypeOption = options.KvDtype.auto,
    act_bits: options.ActBitsOption = options.ActBits.auto,
    device: options.Device = "cpu",
    tensor_parallel_size: options.TensorParallelSize = 1,
    num_threads: options.NumThreads = None,
) -> None:
    """Answer one prompt; the text streams to stdout as it is generated."""
    options.leave_to_rank_0(tensor_parallel_size)
    text = _prompt_text(prompt)
    from tilestream import LLM, SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    start_s = time.perf_counter()
    with loading_bar(model) as progress:
        llm = LLM(
            model, device=device, dtype=dtype.value, kv_dtype=kv_dtype.value, act_bits=act_bits.value,
            tensor_parallel_size=tensor_parallel_size, num_threads=num_threads, progress=progress,
        )  # fmt: skip
    load_s = time.perf_counter() - start_s
    prompt_ids = _encode(llm, text, chat)
    timings = _stream(llm, prompt_ids, params)
    if stats:
        note(f"{timings} | loaded in {load_s:.2f} s")


def _prompt_text(prompt: str | None) -> str:
    if prompt is None:
        if sys.stdin.isatty():
            raise typer.BadParameter('no prompt: give one, as in `tilestream generate "Hello"`, or pipe one in.')
        prompt = sys.stdin.read().strip()
    if not prompt:
        raise typer.BadParameter("the prompt is empty; at least one character is needed.")
    return prompt


def _encode(llm: LLM, text: str, chat: bool | None) -> list[int]:
    if chat is None:
        chat = llm.tokenizer.has_chat_template
    if not chat:
        return llm.tokenizer.encode(text)
    templated = llm.tokenizer.apply_chat_template([{"role": "user", "content": text}])
    return llm.tokenizer.encode(templated, add_special_tokens=False)


def _stream(llm: LLM, prompt_ids: list[int], params: SamplingParams) -> str:
    """Prints the answer as it comes. Returns its timings in words."""
    start_s = time.perf_counter()
    first_s = last_s = start_s
    num_tokens = num_cached = 0
    for delta in llm.stream(prompt_ids, params):
        last_s = time.perf_counter()
        if num_tokens == 0:
            first_s, num_cached = last_s, delta.num_cached_tokens
        num_tokens = delta.num_output_tokens
        if delta.finish_reason == "error":
            raise RuntimeError(delta.error or "the engine failed on this prompt")
        sys.stdout.write(delta.text)
        sys.stdout.flush()
    print(flush=True)
    ttft_s, decode_s = first_s - start_s, last_s - first_s
    parts = [f"first token after {ttft_s:.3f} s"]
    num_prompt = len(prompt_ids) - num_cached
    parts.append(f"prompt {num_prompt} tokens, {num_prompt / ttft_s:.1f} tok/s")
    rate = f", {(num_tokens - 1) / decode_s:.1f} tok/s" if num_tokens > 1 else ""
    parts.append(f"answer {num_tokens} tokens{rate}")
    return " | ".join(parts)
