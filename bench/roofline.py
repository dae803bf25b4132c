"""Draws docs/roofline.png from this machine's results: `python -m bench.roofline`.

Left: each case with arithmetic in it, at its operations per byte, with a line up to its own limit of that run. Right:
every case's share of its limit. The limits are measured (roofs.py), at the time and the working set of each case.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bench.harness import results_directory, this_cpu

PICTURE = Path(__file__).parents[1] / "docs" / "roofline.png"
SHORTEST_LIMIT_S = 2e-6  # cases that could be over sooner time the call, not the kernel: they are left out
COLOURS = {"linear": "#c2532d", "attention": "#2f6fa7", "norm": "#4d8a4a", "sample": "#8a5aa3"}  # by bench file
INK, PAPER, GRID, FAINT = "#22262b", "#fbfaf7", "#e4e1da", "#8b8f94"
ARITHMETIC = {"int8": "int8", "bf16": "bf16", "fp32": "fp32"}


def read_results(directory: Path) -> tuple[list[dict], dict[str, float], str]:
    """Rows with a limit worth showing, each with its bench's name; the machine's roofs; the machine in words."""
    rows, roofs, machine = [], {}, ""
    for name in COLOURS:
        path = directory / f"{name}.json"
        if path.exists():
            content = json.loads(path.read_text())
            rows += [row | {"bench": name} for row in content["rows"] if (row["limit_seconds"] or 0) > SHORTEST_LIMIT_S]
            roofs = {kind: max(rate, roofs.get(kind, 0.0)) for kind, rate in content["roofs"].items()}
            machine = content["machine"]
    if not rows:
        raise SystemExit(f"{directory} holds no results: run `make results` first")
    return rows, roofs, machine


def share(row: dict) -> float:
    return row["limit_seconds"] / row["seconds"]


def bound_by_memory(row: dict) -> bool:
    return row["limit_kind"] not in ARITHMETIC


def draw_roofline(axes, rows: list[dict], roofs: dict[str, float]) -> None:
    low, high = 0.4, 4000
    for kind in ARITHMETIC:
        ridge = roofs[kind] / roofs["read"]
        axes.plot(
            [low, ridge, high], [low * roofs["read"] / 1e9, roofs[kind] / 1e9, roofs[kind] / 1e9], color=INK, lw=1.2, zorder=1
        )
        text = f"{kind} {roofs[kind] / 1e9:.0f} Gop/s"
        axes.annotate(text, (high, roofs[kind] / 1e9), (-4, 3), textcoords="offset points", ha="right", fontsize=8.5)
    x = 6
    text = f"memory {roofs['read'] / 1e9:.0f} GB/s"
    axes.annotate(text, (x, x * roofs["read"] / 1e9), (-8, 0), textcoords="offset points", ha="right", fontsize=8.5)
    for row in rows:
        work, colour = row["work"], COLOURS[row["bench"]]
        if not work["num_ops"]:
            continue
        intensity, measured, limit = work["num_ops"] / work["num_bytes"], *(
            work["num_ops"] / row[key] / 1e9 for key in ("seconds", "limit_seconds")
        )
        axes.plot([intensity, intensity], [measured, limit], color=colour, lw=0.9, alpha=0.55, zorder=2)
        axes.plot(intensity, limit, marker="_", color=colour, ms=7, zorder=2)
        axes.plot(
            intensity, measured, marker="o" if bound_by_memory(row) else "s", color=colour, ms=5, mec=PAPER, mew=0.5, zorder=3
        )
    axes.set(xscale="log", yscale="log", xlim=(low, high), xlabel="operations per byte", ylabel="Gop/s")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_title("Measured rate, and the line up to its limit", loc="left", fontsize=11, color=INK)


def draw_shares(axes, rows: list[dict]) -> None:
    ops = list(dict.fromkeys(row["op"] for row in rows))
    right = max(1.05, *map(share, rows)) + 0.01  # a limit is a measurement, too: a case may be faster
    for y, op in enumerate(ops):
        cases = [row for row in rows if row["op"] == op]
        middle = statistics.median(map(share, cases))
        colour = COLOURS[cases[0]["bench"]]
        axes.barh(y, middle, height=0.62, color=colour, alpha=0.22, zorder=1)
        for i, row in enumerate(cases):
            offset = 0.44 * (i / max(1, len(cases) - 1) - 0.5)
            marker = "o" if bound_by_memory(row) else "s"
            axes.plot(share(row), y + offset, marker=marker, color=colour, ms=4.5, mec=PAPER, mew=0.5, zorder=3, clip_on=False)
        style = dict(va="center", fontsize=9, color=colour, fontweight="bold", annotation_clip=False)
        axes.annotate(f"{middle:.0%}", (right + 0.01, y), **style)
    axes.axvline(1, color=INK, lw=1.2, zorder=2)
    axes.set(xlim=(0, right), ylim=(len(ops) - 0.4, -0.6), yticks=range(len(ops)), yticklabels=ops)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_title("Share of the limit: each case, and the median", loc="left", fontsize=11, color=INK)
    marks = [("o", "memory is the limit"), ("s", "arithmetic is the limit")]
    handles = [Line2D([], [], ls="", marker=marker, color=FAINT, label=label) for marker, label in marks]
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=2, frameon=False, fontsize=9)


def main() -> None:
    rows, roofs, machine = read_results(results_directory(this_cpu()))
    figure = Figure(figsize=(13, 6.2), dpi=150, facecolor=PAPER, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[1.05, 1])
    draw_roofline(left, rows, roofs)
    draw_shares(right, rows)
    for axes in (left, right):
        axes.set_facecolor(PAPER)
        axes.grid(True, color=GRID, lw=0.7, zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK, labelsize=9)
    right.grid(False, axis="y")
    figure.supxlabel(machine.split(" at ")[0], fontsize=8, color=FAINT)
    figure.savefig(PICTURE)


if __name__ == "__main__":
    main()
