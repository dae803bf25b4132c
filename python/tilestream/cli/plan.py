"""`tilestream plan`: a picture of how one step's attention is cut into tiles and dealt to workers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

EPILOG = """[bold]Examples[/]

# one prompt chunk of 512 tokens beside 8 answers with 4096 tokens behind them
tilestream plan --requests 1x512,8x1@4096 --png plan.png

# 16 answers that share a prompt of 2048 tokens; a GPU's worth of workers
tilestream plan --requests 16x1@2304 --shared-prefix 2048 --workers 132 --png shared.png"""

_ITEM = re.compile(r"(?:(\d+)x)?(\d+)(?:@(\d+))?")
_FORM = "COUNTxQ_LEN@KV_LEN, as in 1x512,8x1@4096"


def command(
    png: Annotated[Path, typer.Option(help="Where to write the picture.")],
    requests: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help=f"The step's requests: {_FORM}. Q_LEN: tokens computed in this step. KV_LEN: tokens attended to, "
            "those included; default Q_LEN.",
        ),
    ] = "1x512,8x1@4096",
    workers: Annotated[int, typer.Option(metavar="N", min=1, help="Threads or SMs that share the work.")] = 8,
    shared_prefix: Annotated[
        int, typer.Option(metavar="N", min=0, help="Tokens that all requests' KV begins with; computed once for all.")
    ] = 0,
    batch_invariant: Annotated[
        bool, typer.Option("--batch-invariant", help="Cut only where a request's own length says, never by the batch.")
    ] = False,
    num_qo_heads: Annotated[int, typer.Option(metavar="N", help="Query heads.", rich_help_panel="Model")] = 9,
    num_kv_heads: Annotated[int, typer.Option(metavar="N", help="KV heads.", rich_help_panel="Model")] = 3,
    window_left: Annotated[
        int, typer.Option(metavar="N", help="Keys further back are masked; -1: none.", rich_help_panel="Model")
    ] = -1,
    page_size: Annotated[
        int, typer.Option(metavar="N", help="Tokens of a KV page: 16, 32 or 64.", rich_help_panel="Model")
    ] = 32,
) -> None:
    """Draw the plan of one engine step: workers across, tiles down, coloured by request and by kind."""
    q_lens, kv_lens = parse_requests(requests)
    if png.suffix.lower() != ".png":
        raise typer.BadParameter(f"--png is {str(png)!r}; the name must end in .png.")
    import torch

    from tilestream.ops.plan import AttentionPlanner
    from tilestream.plan_picture import draw_plan

    planner = AttentionPlanner(
        num_qo_heads,
        num_kv_heads,
        head_dim_vo=64,  # sizes a workspace that no kernel will use here
        page_size=page_size,
        num_workers=workers,
        window_left=window_left,
        batch_invariant=batch_invariant,
    )
    cu_seqlens_q = torch.tensor([0, *q_lens]).cumsum(0).to(torch.int32)
    groups = [(shared_prefix, list(range(len(q_lens))))] if shared_prefix else []
    plan = planner.plan(cu_seqlens_q, torch.tensor(kv_lens, dtype=torch.int32), groups).plan
    draw_plan(plan, png, [f"{q_len}@{kv_len}" for q_len, kv_len in zip(q_lens, kv_lens, strict=True)])
    print(f"{len(q_lens)} requests, {sum(q_lens)} tokens, {workers} workers: {png}")


def parse_requests(text: str) -> tuple[list[int], list[int]]:
    """`1x512,8x1@4096` -> (q_lens, kv_lens), one of each per request.

    Raises:
        typer.BadParameter: which part is wrong, and the form.
    """
    q_lens: list[int] = []
    kv_lens: list[int] = []
    for item in text.split(","):
        match = _ITEM.fullmatch(item.strip())
        if match is None:
            raise typer.BadParameter(f"--requests has {item!r}; the form is {_FORM}.")
        count, q_len = int(match[1] or 1), int(match[2])
        kv_len = int(match[3] or q_len)
        if not 1 <= q_len <= kv_len or count < 1:
            raise typer.BadParameter(f"--requests has {item!r}; COUNT and Q_LEN are at least 1, KV_LEN at least Q_LEN.")
        q_lens += [q_len] * count
        kv_lens += [kv_len] * count
    return q_lens, kv_lens
