"""The picture of a plan: it is drawn for every kind of plan, and refuses names that do not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from tilestream import _C
from tilestream.plan_picture import draw_plan

from .plan_steps import DEFAULTS

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def draw(
    path: Path, q_lens: list[int], kv_lens: list[int], groups: list, num_workers: int, narrow_rows: int = 0
) -> np.ndarray:
    planner = _C.Planner(**DEFAULTS | dict(num_workers=num_workers, narrow_rows=narrow_rows))
    draw_plan(planner.plan(np.cumsum([0, *q_lens]), kv_lens, groups), path)
    assert path.read_bytes().startswith(PNG_SIGNATURE)
    return imread(path)


def test_a_mixed_step_is_drawn(tmp_path: Path) -> None:
    mixed = draw(tmp_path / "mixed.png", [40, 1, 1], [90, 700, 600], [(512, [1, 2])], 8)
    empty = draw(tmp_path / "empty.png", [], [], [], 8)
    background = empty[0, 0]
    filled = (np.abs(mixed - background).max(axis=2) > 0.1).mean()
    assert filled > 0.3  # eight full columns
    assert (np.abs(empty - background).max(axis=2) > 0.1).mean() < 0.05


def test_a_gpu_sized_plan_is_drawn(tmp_path: Path) -> None:
    draw(tmp_path / "many.png", [1] * 40, [1000] * 40, [], 132)


def test_narrow_lists_are_drawn_beside_the_wide_ones(tmp_path: Path) -> None:
    step = ([40, 1, 1], [90, 700, 600], [], 4)
    alone, beside = draw(tmp_path / "alone.png", *step), draw(tmp_path / "beside.png", *step, narrow_rows=4)
    assert beside.shape[1] > alone.shape[1]  # eight columns instead of four


def test_names_must_fit_the_batch(tmp_path: Path) -> None:
    plan = _C.Planner(**DEFAULTS).plan([0, 1], [40])
    draw_plan(plan, tmp_path / "named.png", ["the only one"])
    with pytest.raises(ValueError, match="requests has 2 names, but the plan has 1 requests"):
        draw_plan(plan, tmp_path / "named.png", ["one", "two"])
