"""Single plans that can be worked out by hand, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tilestream import _C
from tilestream.reference.plan import decode_plan

from .plan_steps import DEFAULTS, Step


MANY_HEADS = dict(num_qo_heads=4096, num_kv_heads=4096, tile_rows=1)


def step(q_lens: list[int], kv_lens: Any, groups: Any = (), **changes: Any) -> Step:
    return Step(DEFAULTS | changes, q_lens, np.array(kv_lens, dtype=np.int32), list(groups))


def test_a_long_decode_is_cut_evenly() -> None:
    plan = step([1], [1600], num_kv_heads=1, num_workers=4).plan()
    assert [(job.kv_begin, job.kv_end) for job in plan.jobs] == [(0, 400), (400, 800), (800, 1200), (1200, 1600)]
    assert plan.worker_begin == (0, 1, 2, 3, 4)
    assert [merge.parts for merge in plan.merges] == [(0, 1, 2, 3)]


def test_a_cut_within_half_a_tile_of_a_unit_border_goes_to_the_border() -> None:
    for tiles in ((10, 10), (10, 11), (11, 10)):
        plan = step([1, 1], [16 * tiles[0], 16 * tiles[1]], num_kv_heads=1, num_workers=2).plan()
        assert plan.worker_begin == (0, 1, 2) and not plan.merges
    plan = step([1, 1], [16 * 10, 16 * 13], num_kv_heads=1, num_workers=2).plan()
    assert [(job.page_list, job.kv_begin) for job in plan.jobs] == [(0, 0), (1, 0), (1, 32)]


def test_work_that_cannot_be_shared_goes_to_the_first_worker() -> None:
    assert step([1], [5], num_kv_heads=1, num_workers=2).plan().worker_begin == (0, 1, 1)


def test_one_job_writes_its_output_itself() -> None:
    plan = step([1], [5], num_workers=4).plan()
    assert all(job.is_final for job in plan.jobs) and not plan.merges and plan.num_partial_rows == 0


def test_tiles_that_nobody_sees_are_skipped() -> None:
    # Rows at positions 100..103 with a window of 20 keys before them: keys 80..103, the tile grid starts at 80.
    (job,) = step([4], [104], num_kv_heads=1, num_workers=1, window_left=20).plan().jobs
    assert (job.kv_begin, job.kv_end, job.q_pos_begin) == (80, 104, 100)
    # Causal, tiles of 2 tokens: each ends at its own last token.
    jobs = step([4], [104], num_kv_heads=1, num_workers=1, tile_rows=8).plan().jobs
    assert [(job.kv_begin, job.kv_end) for job in jobs] == [(0, 102), (0, 104)]


def test_a_shared_prefix_is_read_once_for_its_group() -> None:
    plan = step([1, 1, 1], [100, 50, 90], [(48, [0, 2])], num_kv_heads=1, num_workers=1).plan()
    prefix, *own = plan.jobs
    assert prefix.is_prefix and prefix.tokens == (0, 2) and (prefix.kv_begin, prefix.kv_end) == (0, 48)
    assert prefix.page_list == 0
    assert [(job.page_list, job.kv_begin, job.kv_end) for job in own] == [(0, 48, 100), (1, 0, 50), (2, 48, 90)]
    assert [(merge.token, merge.parts) for merge in plan.merges] == [(0, (0, 2)), (2, (1, 3))]


def test_a_group_of_one_is_no_group() -> None:
    plan = step([1, 0], [100, 80], [(48, [0, 1])], num_kv_heads=1, num_workers=1).plan()
    assert [(job.is_prefix, job.kv_begin, job.kv_end) for job in plan.jobs] == [(False, 0, 100)]


def test_a_row_without_keys_gets_an_empty_merge() -> None:
    plan = step([2, 0], [0, 7], causal=False).plan()
    assert not plan.jobs
    assert [(merge.token, merge.kv_head, merge.parts) for merge in plan.merges] == [
        (0, 0, ()), (1, 0, ()), (0, 1, ()), (1, 1, ()),
    ]  # fmt: skip


def test_lists_per_head_name_their_row_of_the_block_table() -> None:
    plan = step([1, 1], [[40, 8], [16, 32]], num_workers=1).plan()
    assert [(job.page_list, job.kv_head, job.kv_end) for job in plan.jobs] == [
        (0, 0, 40), (1, 1, 8), (2, 0, 16), (3, 1, 32),
    ]  # fmt: skip


def test_narrow_lists_take_the_decodes() -> None:
    plan = step([8, 1, 1], [8, 64, 32], num_kv_heads=1, tile_rows=32, num_workers=2, narrow_rows=4).plan()
    assert plan.num_workers == 4 and plan.num_narrow_workers == 2
    assert plan.worker_begin == (0, 1, 1, 2, 4)
    assert [(job.page_list, job.kv_begin, job.kv_end) for job in plan.jobs] == [
        (0, 0, 8), (1, 0, 48), (1, 48, 64), (2, 0, 32),
    ]  # fmt: skip


def test_a_prefix_may_be_wide_where_its_group_is_narrow() -> None:
    # The group's rows are two tiles of 4 and 1 tokens; the members' own parts are all narrow.
    changes = dict(num_kv_heads=1, tile_rows=16, num_workers=1, narrow_rows=4)
    plan = step([1] * 5, [50] * 5, [(48, list(range(5)))], **changes).plan()
    assert plan.worker_begin == (0, 1, 7)
    assert [(job.is_prefix, len(job.tokens)) for job in plan.jobs] == [(True, 4), (True, 1)] + [(False, 1)] * 5
    assert [merge.parts for merge in plan.merges] == [(0, 5), (1, 6), (2, 7), (3, 8), (4, 9)]


def test_batch_invariant_plans_have_no_narrow_lists() -> None:
    want = step([8, 1], [8, 100], batch_invariant=True).plan()
    assert step([8, 1], [8, 100], batch_invariant=True, narrow_rows=16).plan() == want


def test_a_partial_row_names_its_merge() -> None:
    # A window of 0 keys: each token sees its own key, in one of the two jobs of its unit.
    config = dict(num_kv_heads=1, num_workers=2, tile_rows=128, window_left=0, merge_inside=True)
    plan = step([32], [32], **config).plan()
    assert [(job.kv_begin, job.kv_end) for job in plan.jobs] == [(0, 16), (16, 32)]
    assert plan.merge_of_row == (*range(16), *[-1] * 16, *[-1] * 16, *range(16, 32))
    assert plan.merge_counters == (0,) * (32 * 4)


def test_a_plan_without_merge_information_is_the_same_but_for_it() -> None:
    plain, full = (step([1], [1600], merge_inside=inside).plan() for inside in (False, True))
    assert plain.merge_of_row is None and plain.merge_counters is None
    assert replace(full, merge_of_row=None, merge_counters=None) == plain


def test_an_empty_step_has_an_empty_plan() -> None:
    plan = step([], []).plan()
    assert not plan.jobs and not plan.merges and plan.worker_begin == (0,) * 5


def test_lists_and_tensors_of_any_integer_type_are_the_same_step() -> None:
    planner = _C.Planner(**DEFAULTS)
    want = planner.plan([0, 1, 3], [40, 50]).copy()
    for dtype in (torch.int32, torch.int64):
        np.testing.assert_array_equal(planner.plan(torch.tensor([0, 1, 3], dtype=dtype), torch.tensor([40, 50])), want)


def test_a_plan_outlives_the_planner_and_its_growth() -> None:
    planner = _C.Planner(**DEFAULTS)
    small = planner.plan([0, 1], [40])
    kept = small.copy()
    planner.plan(np.arange(2001), np.full(2000, 500))
    del planner
    np.testing.assert_array_equal(small, kept)


def test_the_buffer_is_reused() -> None:
    planner = _C.Planner(**DEFAULTS)
    first, second = planner.plan([0, 1], [40]), planner.plan([0, 1], [41])
    assert first.ctypes.data == second.ctypes.data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(num_qo_heads=5), "num_qo_heads = 5 must be a multiple of num_kv_heads = 2"),
        (dict(num_kv_heads=0), "num_kv_heads = 0 is out of range"),
        (dict(page_size=8), "page_size = 8 is not supported: allowed are 16, 32 and 64"),
        (dict(num_workers=0), "num_workers = 0 is out of range: allowed are 1 to"),
        (dict(tile_rows=1), "tile_rows = 1 is out of range: allowed are 2 to"),
        (dict(tile_keys=24), "tile_keys = 24 must be a multiple of page_size = 16"),
        (dict(tile_keys=0), "tile_keys = 0 must be a multiple"),
        (dict(batch_invariant=True, split_tokens=72), "split_tokens = 72 must be a multiple of tile_keys = 16"),
        (dict(batch_invariant=True, split_tokens=0), "split_tokens = 0 is out of range"),
        (dict(window_left=-2), "window_left = -2 is out of range: allowed are -1 to"),
        (dict(narrow_rows=-1), "narrow_rows = -1 is out of range: allowed are 0 to 65536"),
        (dict(cost_tile=-1), "cost_tile = -1 is out of range"),
        (dict(cost_tile=0, cost_row=0), "a tile must cost something"),
    ],
)
def test_a_bad_configuration_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        _C.Planner(**DEFAULTS | change)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("args", "change", "message"),
    [
        (([1, 2], [5]), {}, "cu_seqlens_q[0] = 1 must be 0"),
        (([0, 3, 2], [5, 5]), {}, "cu_seqlens_q[1] = 3 and cu_seqlens_q[2] = 2"),
        (([0, 1], [-1]), {}, "kv_lens[0] = -1 is out of range"),
        (([0, 1, 5], [9, 3]), {}, "kv_lens[1] = 3 is less than the request's 4 query tokens"),
        (([0, 4], [[9, 3]]), {}, "kv_lens[0, 1] = 3 is less than"),
        (([0, 1], [1 << 30]), {}, "kv_lens[0] = 1073741824 is out of range"),
        (([0, 1], [1 << 40]), {}, "does not fit int32"),
        (([0, 1], [[9, 9]]), dict(window_left=4), "window_left = 4 cannot be used with a page list per kv head"),
        (([0, 1], [9, 9]), {}, "kv_lens must have shape [1] or [1, 2]"),
        (([0, 1], [[9]]), {}, "got (1, 1)"),
        (([], []), {}, "cu_seqlens_q must have shape [batch_size + 1]"),
        (([0, 1], [99], [(24, [0])]), {}, "prefix_tokens = 24 of group 0 must be a non-negative multiple"),
        (([0, 1], [99], [(16, [1])]), {}, "group 0 names request 1, but the batch has requests 0 to 0"),
        (([0, 1], [99], [(16, [0]), (32, [0])]), {}, "request 0 is named in group 0 and again in group 1"),
        (([0, 4], [99], [(96, [0])]), {}, "prefix_tokens = 96 of group 0 is more than the 95 tokens"),
        (([0, 1], [99], [(16, [0])]), dict(window_left=9), "causal on and window_left = 9"),
        (([0, 1], [99], [(16, [0])]), dict(causal=False), "got causal off"),
        ((np.arange(70000), [1000000] * 69999), dict(cost_tile=65536, cost_row=65536, num_workers=65536), "2^60"),
        (([0, 1 << 17], [1 << 17]), MANY_HEADS, "int32, more than the 2147483647"),
    ],
)
def test_a_bad_step_is_refused(args: tuple[Any, ...], change: dict[str, Any], message: str) -> None:
    planner = _C.Planner(**DEFAULTS | change)
    with pytest.raises(ValueError) as error:
        planner.plan(*args)
    assert message in str(error.value)
    assert decode_plan(planner.plan([0, 1], [1])).num_tokens == 1  # the planner is none the worse for it


def test_lengths_that_are_no_integers_are_refused() -> None:
    with pytest.raises(TypeError, match="kv_lens must hold integers, got float64"):
        _C.Planner(**DEFAULTS).plan([0, 1], [3.5])
