"""A picture of a plan: workers across, tiles down, coloured by request and marked by kind."""

from __future__ import annotations

import colorsys
from collections import Counter
from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING

from numpy.typing import ArrayLike

from tilestream.reference.plan import Job, Plan, decode_plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _PAPER, _GRID = "#22262b", "#fbfaf7", "#d9d6cf"
_PREFIX_COLOUR = "#4a4f57"
_HATCHES = {"prefill": "", "decode": "////", "shared prefix": "xxxx"}
_COLUMN = 0.86  # width of a worker's column
_FEW_WORKERS = 48  # more than these make columns too narrow for thick lines
_MOST_TILE_EDGES = 150  # tiles in a column, past which their edges would be a blur
_MAX_REQUESTS_IN_LEGEND = 16  # more than fit beside the picture


def draw_plan(plan: ArrayLike, path: str | PathLike[str], requests: Sequence[str] | None = None) -> None:
    """Draw a plan as a PNG.

    Each worker is a column, filled from the top with its jobs in the order in which it runs them; narrow lists come
    last. A job is a stack of KV tiles, each as tall as it costs, so that an even plan has an even bottom edge, of each
    kind of list. A job whose output is merged carries a white dot. The bar below counts the merged outputs of each request.

    Args:
        plan: int32 1-D array or CPU tensor, as tilestream._C.Planner.plan returns it.
        path: where the PNG goes.
        requests: names for the legend, one per request; default "request 0", ...
    Raises:
        ValueError: `plan` is no plan, or `requests` has another length than its batch.
        ImportError: matplotlib is not installed.
    """
    decoded = decode_plan(plan)
    if requests is not None and len(requests) != decoded.batch_size:
        raise ValueError(f"requests has {len(requests)} names, but the plan has {decoded.batch_size} requests")
    names = list(requests) if requests is not None else [f"request {b}" for b in range(decoded.batch_size)]
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing a plan needs matplotlib: pip install matplotlib") from error

    # Hatches take their line width from here when they are made.
    with rc_context({"hatch.linewidth": 0.4 if decoded.num_workers > _FEW_WORKERS else 0.8}):
        width = min(16.0, 6.5 + 0.55 * decoded.num_workers)
        figure = Figure(figsize=(width, 7.5), dpi=150, facecolor=_PAPER, layout="constrained")
        FigureCanvasAgg(figure)
        columns, merges = figure.subplots(2, 1, height_ratios=[12, 1])
        _draw_columns(columns, decoded)
        _draw_merges(merges, decoded)
        figure.suptitle(_title(decoded), x=0.01, ha="left", color=_INK, fontsize=11, linespacing=1.5)
        figure.legend(
            handles=_legend_handles(decoded, names), loc="outside right upper", frameon=False, fontsize=9,
            labelcolor=_INK, handlelength=1.8, handleheight=1.3,
        )  # fmt: skip
        figure.savefig(path, format="png")


def _colour(request: int, num_requests: int) -> tuple[float, float, float]:
    """Neighbouring requests get distant hues; past a dozen, lightness varies too."""
    hue = (0.58 + request * 0.618034) % 1.0 if num_requests > 8 else (0.58 + request / max(num_requests, 1)) % 1.0
    return colorsys.hls_to_rgb(hue, (0.56, 0.68, 0.46)[request % 3 if num_requests > 12 else 0], 0.56)


def _kind_of(plan: Plan) -> dict[Job, str]:
    tokens_of_request: dict[int, set[int]] = {}
    for job in plan.jobs:
        if not job.is_prefix:
            tokens_of_request.setdefault(plan.request_of(job), set()).update(job.tokens)
    return {
        job: "shared prefix" if job.is_prefix
        else "decode" if len(tokens_of_request[plan.request_of(job)]) == 1
        else "prefill"
        for job in plan.jobs
    }  # fmt: skip


def _draw_columns(axes: Axes, plan: Plan) -> None:
    from matplotlib.collections import LineCollection, PatchCollection
    from matplotlib.patches import Rectangle

    kind_of, many = _kind_of(plan), plan.num_workers > _FEW_WORKERS
    boxes: dict[str, list[tuple[Rectangle, object]]] = {kind: [] for kind in _HATCHES}
    dots: list[tuple[float, float]] = []
    tile_edges: list[tuple[tuple[float, float], tuple[float, float]]] = []
    full_tile = plan.cost_tile + plan.cost_row * plan.tile_rows
    deepest = max(_loads(plan)) / full_tile
    for worker in range(plan.num_workers):
        top = 0.0
        for job in plan.worker_jobs(worker):
            tiles, height = plan.num_tiles(job), plan.cost(job) / full_tile
            left, right = worker - 0.5 * _COLUMN, worker + 0.5 * _COLUMN
            if height / tiles > deepest / _MOST_TILE_EDGES:
                edges = (top + height * tile / tiles for tile in range(1, tiles))
                tile_edges += [((left, edge), (right, edge)) for edge in edges]
            colour = _PREFIX_COLOUR if job.is_prefix else _colour(plan.request_of(job), plan.batch_size)
            boxes[kind_of[job]].append((Rectangle((left, top), _COLUMN, height), colour))
            if not job.is_final:
                dots.append((worker, top + height / 2))
            top += height
    axes.add_collection(LineCollection(tile_edges, colors="white", linewidths=0.5, alpha=0.35))
    for kind, found in boxes.items():
        collection = PatchCollection([box for box, _ in found], linewidth=0.4 if many else 1.2)
        collection.set(facecolor=[colour for _, colour in found], edgecolor="white", hatch=_HATCHES[kind])
        axes.add_collection(collection)
    if dots:
        size = 5 if many else 22
        axes.scatter(*zip(*dots, strict=True), s=size, color="white", edgecolor=_INK, linewidth=0.5, zorder=3)
    for workers in plan.kinds:
        ends = (workers.start - 0.6, workers.stop - 0.4)
        axes.hlines(_even_share(plan, workers) / full_tile, *ends, color=_INK, linewidth=0.8, linestyle=(0, (5, 4)))
    axes.set(xlim=(-0.6, plan.num_workers - 0.4), ylim=(max(deepest * 1.02, 1), 0))
    axes.set_xlabel("worker", color=_INK)
    axes.xaxis.set_label_position("top")
    axes.set_ylabel(f"KV tiles of {plan.tile_keys} tokens, by cost ({plan.tile_rows} rows = 1)", color=_INK)
    axes.xaxis.tick_top()
    axes.xaxis.get_major_locator().set_params(integer=True)
    _plain_axes(axes)
    axes.grid(axis="y", color=_GRID, linewidth=0.6)


def _draw_merges(axes: Axes, plan: Plan) -> None:
    page_list_of_token = {t: plan.request_of(job) for job in plan.jobs if not job.is_prefix for t in job.tokens}
    num_of_request = Counter(page_list_of_token[merge.token] for merge in plan.merges if merge.parts)
    left = 0
    for request, num in sorted(num_of_request.items()):
        colour = _colour(request, plan.batch_size)
        axes.barh(0, num, left=left, color=colour, edgecolor="white", linewidth=0.5, hatch="..")
        left += num
    num_parts = sum(len(merge.parts) for merge in plan.merges)
    axes.set(xlim=(0, max(left, 1)), yticks=[])
    title = f"merge: {left} outputs (token x kv head) from {num_parts} parts"
    axes.set_title(title, loc="left", color=_INK, fontsize=9)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _plain_axes(axes)


def _loads(plan: Plan) -> list[int]:
    return [sum(map(plan.cost, plan.worker_jobs(worker))) for worker in range(plan.num_workers)]


def _even_share(plan: Plan, workers: range) -> float:
    return sum(_loads(plan)[workers.start : workers.stop]) / len(workers)


def _plain_axes(axes: Axes) -> None:
    axes.set_facecolor(_PAPER)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK, length=0, labelsize=8)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _title(plan: Plan) -> str:
    tiles = [sum(map(plan.num_tiles, plan.worker_jobs(worker))) for worker in range(plan.num_workers)]
    loads = _loads(plan)
    over = max(
        (max(loads[w.start : w.stop]) / share - 1 for w in plan.kinds if (share := _even_share(plan, w))), default=0.0
    )
    parts = Counter((job.tokens, job.kv_head, job.is_prefix) for job in plan.jobs)
    num_split = sum(num > 1 for num in parts.values())
    mode = "batch-invariant" if plan.batch_invariant else "balanced"
    return (
        f"{plan.batch_size} requests, {plan.num_tokens} tokens, {plan.num_qo_heads}/{plan.num_kv_heads} heads, "
        f"up to {plan.max_kv_len} keys, {mode}\n"
        f"{len(plan.jobs)} jobs, {min(tiles)} to {max(tiles)} tiles per worker, "
        f"at most {over:.1%} above the even share, {num_split} of {len(parts)} units split"
    )


def _legend_handles(plan: Plan, names: list[str]) -> list[object]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    shown = names if len(names) <= _MAX_REQUESTS_IN_LEGEND else names[: _MAX_REQUESTS_IN_LEGEND - 1]
    handles: list[object] = [Patch(color=_colour(b, plan.batch_size), label=name) for b, name in enumerate(shown)]
    if len(shown) < len(names):
        handles.append(Patch(alpha=0, label=f"... and {len(names) - len(shown)} more"))
    handles.append(Patch(alpha=0, label=""))
    kinds = set(_kind_of(plan).values())
    for kind, hatch in _HATCHES.items():
        if kind in kinds:
            colour = _PREFIX_COLOUR if kind == "shared prefix" else "#9aa3ad"
            handles.append(Patch(facecolor=colour, edgecolor="white", hatch=hatch, linewidth=0, label=kind))
    if any(not job.is_final for job in plan.jobs):
        handles.append(
            Line2D([], [], linestyle="", marker="o", markerfacecolor="white", markeredgecolor=_INK, label="is merged")
        )
    handles.append(Line2D([], [], color=_INK, linewidth=0.8, linestyle=(0, (5, 4)), label="even share"))
    return handles
