"""A picture of token splitting: one layer's two streams, and what a split gains by the size of a step."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING

from tilestream.distributed.overlap_costs import OverlapCosts
from tilestream.distributed.overlap_report import Comparison
from tilestream.distributed.overlap_simulator import Span, split_kernels, timeline, whole_kernels
from tilestream.distributed.weave import COMMUNICATION_BLOCKS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _PAPER, _GRID = "#22262b", "#fbfaf7", "#d9d6cf"
_BLUE, _ORANGE, _GREEN, _RED = "#3b6ea8", "#d9822b", "#5a8f5a", "#b23b3b"
_HALVES = (_BLUE, _ORANGE)
_SHOWN_TOKENS = 8192  # the timeline's step: the size next to it that was simulated
_FIRST_SHOWN, _NUM_LAYERS = 2, 5  # the layer that is drawn is in the middle of others


def draw_overlap(costs: OverlapCosts, steps: Sequence[Comparison], path: str | PathLike[str]) -> None:
    """Draw a comparison as a PNG.

    Args:
        costs, steps: what was simulated, and what came out.
        path: where the PNG goes.
    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing a simulation needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(11, 7.6), dpi=150, facecolor=_PAPER, layout="constrained")
    FigureCanvasAgg(figure)
    layer, gains = figure.subplots(2, 1, height_ratios=[1, 1.15])
    shown = min(steps, key=lambda step: abs(step.num_tokens - _SHOWN_TOKENS))
    _draw_layer(layer, costs, shown)
    _draw_gains(gains, costs, steps)
    for axes in (layer, gains):
        axes.set_facecolor(_PAPER)
        axes.set_axisbelow(True)
        axes.tick_params(colors=_INK, labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def _draw_layer(axes: Axes, costs: OverlapCosts, step: Comparison) -> None:
    """One layer split and whole, from the beginning of its first computation on."""
    split = step.split
    halves = split_kernels(
        costs, step.num_tokens, split.first, (split.attention_blocks, split.mlp_blocks), num_layers=_NUM_LAYERS
    )
    whole = whole_kernels(costs, step.num_tokens, "fused", num_layers=_NUM_LAYERS)
    rows = {(True, True): 3, (True, False): 2, (False, True): 1, (False, False): 0}
    for is_split, kernels in ((True, halves), (False, whole)):
        spans = timeline(kernels, costs.num_sms, costs.launch_s)
        begins = [span.begin_s for span in spans if span.kernel.name == "qkv" and span.kernel.half == 0]
        begin_s, end_s = begins[_FIRST_SHOWN], begins[_FIRST_SHOWN + 1]
        for span in spans:
            if span.end_s > begin_s and span.begin_s < end_s:
                _draw_span(axes, span, rows[is_split, span.kernel.communicates], begin_s, end_s, is_split)
        axes.axvline((end_s - begin_s) * 1e6, color=_INK, linewidth=0.8, linestyle=(0, (5, 4)))
        axes.text(
            (end_s - begin_s) * 1e6, 3.62 if is_split else 1.62, f" {(end_s - begin_s) * 1e6:.0f} us", fontsize=8, color=_INK
        )
    axes.set_yticks([3, 2, 1, 0], ["split: communication", "computation", "whole: communication", "computation"], fontsize=8)
    axes.set_ylim(-0.6, 4.0)
    axes.set_xlabel("microseconds", fontsize=8)
    axes.set_title(
        f"one layer of a step of {step.num_tokens:,} tokens, cut after {split.first:,}: first half blue, second orange",
        loc="left", fontsize=9, color=_INK,
    )  # fmt: skip


def _draw_span(axes: Axes, span: Span, row: int, begin_s: float, end_s: float, is_split: bool) -> None:
    kernel = span.kernel
    left, right = (max(span.begin_s, begin_s) - begin_s) * 1e6, (min(span.end_s, end_s) - begin_s) * 1e6
    colour = _HALVES[kernel.half] if is_split else _GREEN
    axes.barh(
        row, right - left, left=left, height=0.72, color=colour, alpha=0.75 if kernel.communicates else 1.0,
        edgecolor="white", linewidth=0.6,
    )  # fmt: skip
    if right - left > (end_s - begin_s) * 1e6 / 28:
        name = {"allreduce_rmsnorm": "AR + norm", "attention": "attn"}.get(kernel.name, kernel.name)
        axes.text((left + right) / 2, row, name, ha="center", va="center", fontsize=6.5, color="white")


def _draw_gains(axes: Axes, costs: OverlapCosts, steps: Sequence[Comparison]) -> None:
    """How many times as fast as with multimem AllReduce and a norm; what was measured of it as crosses."""
    sizes = [step.num_tokens for step in steps]
    curves = {
        "split, best cut and blocks": (_ORANGE, [step.split.step_s for step in steps]),
        f"split by our rule, {COMMUNICATION_BLOCKS} blocks": (_RED, [step.rule.step_s for step in steps]),
        "fused, whole": (_GREEN, [step.whole_s["fused"] for step in steps]),
        "no communication, but norms": (_INK, [step.whole_s["none"] for step in steps]),
        "NCCL AllReduce + norm": (_BLUE, [step.whole_s["nccl"] for step in steps]),
    }
    for name, (colour, seconds) in curves.items():
        ratios = [step.whole_s["multimem"] / s for step, s in zip(steps, seconds, strict=True)]
        axes.plot(sizes, ratios, color=colour, linewidth=1.4, marker="o", markersize=3, label=name)
    base = dict(costs.measured_step.get("multimem", ()))
    for kind, name, colour in (("split", "split, measured", _ORANGE), ("none", "no communication, measured", _INK)):
        points = [(tokens, base[tokens] / s) for tokens, s in costs.measured_step.get(kind, ()) if tokens in sizes]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, linestyle="", marker="x", markersize=7, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.grid(color=_GRID, linewidth=0.6)
    axes.set_xlabel("tokens of a step", fontsize=8)
    axes.set_ylabel("times as fast as multimem AllReduce + norm", fontsize=8)
    axes.legend(frameon=False, fontsize=8, ncols=2)
