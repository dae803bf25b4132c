"""`tilestream quantize`: FMPQ of a model on a text."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from tilestream.cli import options
from tilestream.cli.console import stage_bar

EPILOG = """[bold]Examples[/]

# the model that comes with the package, calibrated on a text of yours
tilestream quantize smollm2-135m-instruct --calib wiki.txt -o smollm2-w4ax

# talk to it, with a 4-bit KV cache and 4-bit activations where the directory says so
tilestream generate --model smollm2-w4ax --kv-dtype int4 --act-bits 4 "Why is the sky blue?" """


class Method(str, Enum):
    """How weights are rounded."""

    fmpq = "fmpq"
    rtn = "rtn"


class GroupSize(str, Enum):
    """Input channels with one scale."""

    g32 = "32"
    g128 = "128"


def command(
    model: Annotated[str, typer.Argument(help="A GGUF file, a Hugging Face directory, a hub id or an alias.")],
    calib: Annotated[Path, typer.Option(help="A text file like what will be served.", exists=True, dir_okay=False)],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="The directory to make.")],
    int4_share: Annotated[
        float,
        typer.Option(metavar="SHARE", min=0.0, max=1.0, help="Least share of the multiply-adds that has 4-bit activations."),
    ] = 0.84,
    group_size: Annotated[
        GroupSize, typer.Option(help="Input channels of a weight with one scale and zero; on a GPU INT4 activations need 128.")
    ] = GroupSize.g128,
    rotate: Annotated[
        bool,
        typer.Option(
            "--rotate/--no-rotate", help="Turn the residual stream, the values and the inside of MLPs, or only sort channels."
        ),
    ] = True,
    method: Annotated[Method, typer.Option(help="rtn: round to nearest and nothing else, for comparison.")] = Method.fmpq,
    tune: Annotated[
        bool, typer.Option("--tune/--no-tune", help="Let scales learn the model's distribution, after all is rounded.")
    ] = True,
    calib_windows: Annotated[int, typer.Option(metavar="N", min=1, help="Windows of 512 tokens to calibrate on.")] = 64,
    num_threads: options.NumThreads = None,
) -> None:
    """Quantise a model to 4-bit weights, and find where its activations may have 4 bits too."""
    if out.exists():
        raise typer.BadParameter(f"-o is {str(out)!r}, which exists; give a name that is not taken.")
    try:
        text = calib.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"--calib is {str(calib)!r}, which is no UTF-8 text: {error}") from error
    import torch

    from tilestream._native import _C
    from tilestream.quantize import Recipe, quantize

    torch.set_num_threads(num_threads or _C.num_threads())  # here torch computes, not our kernels
    recipe = Recipe(
        method=method.value, group_size=int(group_size.value), int4_share=int4_share, rotate=rotate, num_windows=calib_windows,
        tune=tune,
    )  # fmt: skip
    with stage_bar(model) as progress:
        share = quantize(model, text, out, recipe, progress)
    print(f"{out}: {share:.1%} of the multiply-adds have INT4 activations; see {out / 'report.md'}")
