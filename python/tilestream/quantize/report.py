"""What quantising did, for people: report.md and a picture of the INT8 share of every layer."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from tilestream.quantize.select import Input, Key, int4_share
from tilestream.quantize.source import INPUTS

PICTURE = "int8_share.png"
_INK, _PAPER, _GRID = "#22262b", "#fbfaf7", "#d9d6cf"
_COLOURS = {"qkv": "#3d6fa5", "o": "#79a9c9", "gate_up": "#c2703d", "down": "#e0b069"}


def write_report(
    folder: Path, facts: Mapping[str, object], inputs: Mapping[Key, Input], k4: Mapping[Key, int], errors: Mapping[Key, float]
) -> None:
    """report.md and its picture.

    Args:
        facts: name -> value, for the head of the report.
        inputs, k4: what was chosen from, and what was chosen.
        errors: relative squared error that rounding the weights adds to what is read from each input; empty: not measured.
    """
    num_layers = 1 + max(layer for layer, _ in inputs)
    lines = ["# Quantised by tilestream", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += [
        f"- INT4 share of the multiply-adds of the decoder's linears: {int4_share(inputs, k4):.1%}",
        "",
        f"![INT8 share per layer]({PICTURE})",
        "",
        "INT8 channels of all channels that a linear reads"
        + ("; in brackets the relative squared error that rounding its weights adds, in decibels." if errors else "."),
        "",
        "| layer | " + " | ".join(INPUTS) + " |",
        "|---" * (len(INPUTS) + 1) + "|",
    ]
    for layer in range(num_layers):
        cells = [_cell(inputs[layer, name], k4[layer, name], errors.get((layer, name))) for name in INPUTS]
        lines.append(f"| {layer} | " + " | ".join(cells) + " |")
    (folder / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _draw(folder / PICTURE, num_layers, inputs, k4)


def _cell(entry: Input, k4: int, error: float | None) -> str:
    from math import log10

    share = f"{entry.k - k4} of {entry.k}"
    return share if error is None else f"{share} ({10 * log10(max(error, 1e-12)):.1f})"


def check_can_draw() -> None:
    """Raises ImportError, before minutes of work, where the report could not be drawn at their end."""
    if find_spec("matplotlib") is None:
        raise ImportError("drawing the report needs matplotlib: pip install matplotlib")


def _draw(path: Path, num_layers: int, inputs: Mapping[Key, Input], k4: Mapping[Key, int]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.0, 1.5 + 0.28 * num_layers), 4.2), dpi=150, facecolor=_PAPER, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    below = [0.0] * num_layers
    for name in INPUTS:
        # A layer's bar is the share of its multiply-adds that meet INT8, stacked by the linears they belong to.
        share = []
        for layer in range(num_layers):
            whole = sum(inputs[layer, other].k * inputs[layer, other].n for other in INPUTS)
            entry = inputs[layer, name]
            share.append(100 * (entry.k - k4[layer, name]) * entry.n / whole)
        axes.bar(range(num_layers), share, bottom=below, color=_COLOURS[name], width=0.8, label=name)
        below = [a + b for a, b in zip(below, share, strict=True)]
    mean = 100 * (1 - int4_share(inputs, k4))
    axes.axhline(mean, color=_INK, linewidth=0.8, linestyle=(0, (5, 4)), label=f"mean, {mean:.1f} %")
    axes.set(xlim=(-0.6, num_layers - 0.4), ylim=(0, max(100 * 0.05, max(below) * 1.05)), xlabel="layer")
    axes.set_ylabel("multiply-adds with INT8 activations, %", color=_INK)
    axes.set_facecolor(_PAPER)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=_GRID, linewidth=0.6)
    axes.tick_params(colors=_INK, length=0, labelsize=8)
    for spine in axes.spines.values():
        spine.set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9, labelcolor=_INK)
    figure.savefig(path, format="png")
