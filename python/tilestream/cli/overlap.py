"""`tilestream overlap`: when it pays that half of a step's communication runs under the other half's computation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tilestream.cli.console import note

EPILOG = """[bold]Examples[/]

# Llama 3 70B on 8 H100: what a step takes, and where it is best cut
tilestream overlap --plot overlap.png

# times of your own, as in overlap_h100x8_llama3_70b.json; two step sizes
tilestream overlap --costs mine.json --tokens 2048,8192"""


def command(
    costs: Annotated[
        str,
        typer.Option(
            metavar="FILE|NAME",
            help="What a rank's kernels take: a JSON file, or h100x8-llama3-70b (communication measured by others, the rest "
            "an estimate).",
        ),
    ] = "h100x8-llama3-70b",
    tokens: Annotated[str, typer.Option(metavar="LIST", help="Sizes of steps, each one prompt.")] = (
        "512,1024,2048,4096,8192,16384,32768"
    ),
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="A picture of it, as PNG.")] = None,
) -> None:
    """Simulate a tensor-parallel model's steps: communication fused and not, and hidden under computation by token splitting."""
    sizes = _sizes(tokens)
    if plot is not None and plot.suffix.lower() != ".png":
        raise typer.BadParameter(f"--plot is {str(plot)!r}; the name must end in .png.")
    from tilestream.distributed.overlap_costs import OverlapCosts
    from tilestream.distributed.overlap_report import compare, table

    measured = OverlapCosts.load(costs)
    note(measured.source)
    steps = [compare(measured, num_tokens) for num_tokens in sizes]
    print(table(steps))
    if plot is not None:
        from tilestream.overlap_picture import draw_overlap

        draw_overlap(measured, steps, plot)


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(size) for size in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 2:
        raise typer.BadParameter(f"--tokens is {text!r}; it must be numbers of at least 2, as in 1024,8192.")
    return sizes
