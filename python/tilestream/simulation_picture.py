"""A picture of a simulation: latencies as distributions, and what ran and waited over time."""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike
from typing import TYPE_CHECKING

from tilestream.engine.simulation_report import tpot, ttft
from tilestream.engine.simulator import Simulation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _PAPER, _GRID = "#22262b", "#fbfaf7", "#d9d6cf"
_BLUE, _ORANGE, _RED = "#3b6ea8", "#d9822b", "#b23b3b"
_MOST_POINTS = 2000  # of a curve


def draw_simulation(simulation: Simulation, path: str | PathLike[str], *, title: str, tbt_ms: float | None = None) -> None:
    """Draw a simulation as a PNG.

    Args:
        path: where the PNG goes.
        title: above the picture.
        tbt_ms: the target for the time between tokens, if there was one.
    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing a simulation needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(11, 7), dpi=150, facecolor=_PAPER, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, color=_INK)
    (first, between), (batch, tokens) = figure.subplots(2, 2)
    _draw_share(first, "time to first token, s", {"": [(ttft(request), 1) for request in simulation.finished]})
    first.set_xscale("log")
    gaps_ms = [(gap_s * 1e3, count) for gap_s, count in simulation.gaps_s]
    means_ms = [(value * 1e3, 1) for value in map(tpot, simulation.finished) if value is not None]
    _draw_share(between, "milliseconds", {"between two tokens": gaps_ms, "per output token, mean of a request": means_ms})
    if tbt_ms is not None:
        between.axvline(tbt_ms, color=_RED, linestyle="--", linewidth=1, label="target")
    between.legend(frameon=False, fontsize=8)
    _draw_time(simulation, batch, tokens)
    for axes in (first, between, batch, tokens):
        axes.set_facecolor(_PAPER)
        axes.grid(color=_GRID, linewidth=0.6)
        axes.tick_params(colors=_INK, labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def _draw_share(axes: Axes, label: str, curves: dict[str, Iterable[tuple[float, int]]]) -> None:
    """Which share of the weight lies at or below a value, from 0 to 1."""
    for colour, (name, weighted) in zip((_BLUE, _ORANGE), curves.items()):
        values = sorted(weighted)
        total = sum(weight for _, weight in values)
        points, below = [], 0
        for value, weight in values:
            below += weight
            points.append((value, below / total))
        shown = points[:: max(1, len(points) // _MOST_POINTS)] + points[-1:]
        axes.plot([x for x, _ in shown], [y for _, y in shown], color=colour, linewidth=1.4, label=name)
    axes.set_xlabel(label, fontsize=8)
    axes.set_ylabel("share at or below", fontsize=8)
    axes.set_ylim(0, 1.02)


def _draw_time(simulation: Simulation, batch: Axes, tokens: Axes) -> None:
    slot_s = simulation.slot_s
    slots = range(max(simulation.timeline, default=0) + 1)
    rows = [simulation.timeline.get(slot, (0.0,) * 5) for slot in slots]
    times_s = [slot * slot_s for slot in slots]
    for name, column, colour in (("running", 1, _BLUE), ("waiting", 2, _ORANGE)):
        batch.plot(times_s, [row[column] / slot_s for row in rows], color=colour, linewidth=1.0, label=name)
    batch.set_ylabel("requests, all replicas", fontsize=8)
    tokens.stackplot(
        times_s,
        [row[3] / slot_s for row in rows],
        [row[4] / slot_s for row in rows],
        colors=(_BLUE, _ORANGE),
        labels=("decode", "prefill"),
        linewidth=0,
    )
    tokens.set_ylabel("tokens per second", fontsize=8)
    for axes in (batch, tokens):
        axes.set_xlabel("virtual seconds", fontsize=8)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=8)
