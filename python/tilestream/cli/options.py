"""Options that more than one command takes, and what they mean to `LLM`."""

from __future__ import annotations

import os
from enum import Enum
from typing import Annotated

import typer

DEFAULT_MODEL = "smollm2-135m-instruct"


def leave_to_rank_0(tensor_parallel_size: int) -> None:
    """What follows is rank 0's; where torchrun has made this process another rank, it works for that one, and ends here.

    Raises:
        ValueError: torchrun has started another number of ranks: without the option each would load a model of its own.
    """
    if tensor_parallel_size > 1 or "TORCHELASTIC_RUN_ID" in os.environ:
        from tilestream.distributed.worker import work_if_not_first

        work_if_not_first(tensor_parallel_size)


Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="A GGUF file, a Hugging Face directory, a hub id, or the alias of the model that comes with the package.",
    ),
]
Device = Annotated[
    str,
    typer.Option(
        metavar="DEVICE",
        help="Where the model runs: cpu, cuda, or cuda:<index>.",
        rich_help_panel="Engine",
    ),
]
NumThreads = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help="Threads that compute, of each rank. Default: TILESTREAM_NUM_THREADS, or one for every core this process may use, "
        "shared by the ranks.",
        rich_help_panel="Engine",
    ),
]
TensorParallelSize = Annotated[
    int,
    typer.Option(
        metavar="N",
        min=1,
        help="Ranks that have a part of the model each: processes on as many GPUs, or that share the CPU's cores. Under torchrun "
        "those that it has started.",
        rich_help_panel="Engine",
    ),
]


class WeightDtype(str, Enum):
    """Types of the weights."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


WeightDtypeOption = Annotated[
    WeightDtype,
    typer.Option(
        "--dtype",
        help="Type of the weights; auto: quantised ones as they are, bfloat16 for others.",
        rich_help_panel="Engine",
    ),
]


class KvDtype(str, Enum):
    """Types of the KV cache."""

    auto = "auto"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"
    fp8 = "fp8"
    int8 = "int8"
    int4 = "int4"


KvDtypeOption = Annotated[
    KvDtype,
    typer.Option("--kv-dtype", help="Type of the KV cache; auto: bfloat16.", rich_help_panel="Engine"),
]


class ActBits(str, Enum):
    """Bits of the activations that meet quantised weights."""

    auto = "auto"
    four = "4"
    eight = "8"
    sixteen = "16"


ActBitsOption = Annotated[
    ActBits,
    typer.Option(
        "--act-bits",
        help="Bits of the activations that meet quantised weights; 4: in the INT4 blocks of a directory of "
        "`tilestream quantize`; auto: 4 for such a directory where the device multiplies INT4 natively (sm_80 to sm_89), else 8.",
        rich_help_panel="Engine",
    ),
]
KvCacheTokens = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help="Tokens that the KV cache holds, over all requests. Default: a quarter of the free memory, at most 16 "
        "contexts.",
        rich_help_panel="Engine",
    ),
]
TokenBudget = Annotated[
    int,
    typer.Option(
        metavar="N",
        min=1,
        help="Most tokens of one engine step: long prompts are cut into chunks of this, so that running "
        "answers keep flowing.",
        rich_help_panel="Engine",
    ),
]
BatchInvariant = Annotated[
    bool,
    typer.Option(
        "--batch-invariant",
        help="Give a request the same bits whatever else is in the batch; costs some speed.",
        rich_help_panel="Engine",
    ),
]
MaxModelLen = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help="Most tokens of one prompt and its answer. Default: what the model was trained for, or the whole KV cache if "
        "that is smaller.",
        rich_help_panel="Engine",
    ),
]
MaxNumSeqs = Annotated[
    int, typer.Option(metavar="N", min=1, help="Most requests that run at once.", rich_help_panel="Engine")
]
MaxQueuedRequests = Annotated[
    int,
    typer.Option(
        metavar="N", min=1, help="Most requests that wait; one more is refused (503).", rich_help_panel="Engine"
    ),
]
TbtMs = Annotated[
    float | None,
    typer.Option(
        metavar="MS",
        min=0.001,
        help="Target for the time between two tokens of an answer: prompts are cut so that steps take no longer, by what "
        "steps cost here. Default: by the token budget alone.",
        rich_help_panel="Engine",
    ),
]


class Policy(str, Enum):
    """Orders of the queue."""

    fcfs = "fcfs"
    priority = "priority"
    lpm = "lpm"


PolicyOption = Annotated[
    Policy,
    typer.Option(
        "--policy",
        help="Who comes next out of the queue: first come first served, by priority, or by longest cached prefix.",
        rich_help_panel="Engine",
    ),
]
ServedModelName = Annotated[
    str | None, typer.Option(help="Name that requests ask for. Default: the model's own.", show_default=False)
]
