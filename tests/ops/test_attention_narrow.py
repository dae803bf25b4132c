"""The narrow lane of the Hopper attention: decodes and other jobs of few rows, alone and beside wide jobs (plan.h)."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.ops.attention_case import Case, check, make_plan, make_tensors, run
from tilestream import testing
from tilestream.reference.plan import Job, decode_plan

pytestmark = pytest.mark.simt(archs=(90,))

PLANNER = (("narrow_rows", 16), ("merge_inside", True))
DECODES = Case(q_lens=(1,) * 5, kv_lens=(1, 63, 64, 65, 1000), heads=(8, 2), head_dim=128, dtype="bfloat16", kv_dtype="bfloat16",
               planner=PLANNER)
# Several tokens a job, a decode, and a chunk of a prompt, which is wide.
MIXED = Case(
    q_lens=(3, 5, 1, 70), kv_lens=(3, 100, 260, 130), heads=(6, 2), dtype="bfloat16", kv_dtype="bfloat16", planner=PLANNER
)
NUM_NARROW_WORKERS = 28  # position of PlanHeader::num_narrow_workers (plan.h), in int32


def narrow_jobs(case: Case) -> list[Job]:
    words = make_plan(case, make_tensors(case)).host_plan
    plan = decode_plan(words)
    first = plan.num_workers - int(words[NUM_NARROW_WORKERS])
    return [job for worker in range(first, plan.num_workers) for job in plan.worker_jobs(worker)]


@pytest.mark.parametrize("head_dims", [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)], ids=str)
@pytest.mark.parametrize("case", [DECODES, MIXED], ids=["decodes", "mixed"])
def test_head_dims(backend: testing.Backend, case: Case, head_dims: tuple[int, int]) -> None:
    """Of 256, the wide lane takes the narrow jobs too."""
    check(dataclasses.replace(case, head_dim=head_dims[0], head_dim_vo=head_dims[1], num_workers=3))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kv_dtype", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("case", [DECODES, MIXED], ids=["decode", "mix"])
def test_converted_caches(backend: testing.Backend, case: Case, head_dim: int, kv_dtype: str, dtype: str) -> None:
    check(dataclasses.replace(case, head_dim=head_dim, kv_dtype=kv_dtype, dtype=dtype, num_workers=3))


@pytest.mark.parametrize("group_size", [1, 3, 7, 8, 9, 16])
def test_group_sizes(backend: testing.Backend, group_size: int) -> None:
    """Of up to eight rows, and of more; a narrow job here is a token, or several."""
    case = dataclasses.replace(DECODES, q_lens=(1, 1, 16 // group_size), kv_lens=(65, 200, 90), heads=(group_size, 1))
    assert len(narrow_jobs(case)) >= 3
    check(case)


def test_jobs_of_more_rows_than_a_row_tile(backend: testing.Backend) -> None:
    """A plan may call more rows narrow than the lane takes at once."""
    case = dataclasses.replace(MIXED, planner=(("narrow_rows", 64), ("merge_inside", True)))
    assert max(len(job.tokens) for job in narrow_jobs(case)) * 3 > 16
    check(case)


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8", "int4", "fp8"])
@pytest.mark.parametrize("page_size", [16, 32, 64])
@pytest.mark.parametrize("layout", ["hnd", "nhd"])
def test_layouts(backend: testing.Backend, layout: str, page_size: int, kv_dtype: str) -> None:
    """Each length of DECODES leaves another part of its last page to nobody: NaN, there."""
    check(dataclasses.replace(DECODES, layout=layout, page_size=page_size, kv_dtype=kv_dtype, num_workers=2))


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8", "fp8"])
@pytest.mark.parametrize("merge_inside", [False, True])
@pytest.mark.parametrize("tile_keys", [16, 64])
@pytest.mark.parametrize("case", [DECODES, MIXED], ids=["decodes", "mixed"])
def test_cut_along_kv(backend: testing.Backend, case: Case, tile_keys: int, merge_inside: bool, kv_dtype: str) -> None:
    planner = (("narrow_rows", 16), ("merge_inside", merge_inside), ("tile_keys", tile_keys))
    case = dataclasses.replace(case, num_workers=7, planner=planner, kv_dtype=kv_dtype, head_dim=128)
    assert any(not job.is_final for job in narrow_jobs(case))
    check(case)


VARIANTS = [
    {"causal": False},
    {"window_left": 0},
    {"window_left": 70},
    {"soft_cap": 5.0},
    {"alibi": True},
    {"sinks": True},
    {"sm_scale": -0.3},
    {"sm_scale": 2.0},  # rows' maxima move again and again
    {"dtype": "float16", "kv_dtype": "float16", "sm_scale": 2.0},
    {"dtype": "float32"},
    {"soft_cap": 3.0, "window_left": 50, "sinks": True, "alibi": True, "dtype": "float16", "kv_dtype": "float16"},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_variants(backend: testing.Backend, variant: dict) -> None:
    check(dataclasses.replace(MIXED, num_workers=3, **variant))


def test_shared_prefix(backend: testing.Backend) -> None:
    """The group's job, of all its requests' rows, masks nothing; each request's own rest is a job of its own."""
    case = dataclasses.replace(
        DECODES, q_lens=(1, 2, 1, 1), kv_lens=(100, 90, 66, 130), heads=(4, 2), prefix_groups=((64, (0, 1, 3)),)
    )
    t = make_tensors(case)
    assert torch.equal(t.kv.block_table[0, :4], t.kv.block_table[3, :4])
    check(case, t)


@pytest.mark.parametrize("num_rows", [8, 16])
def test_a_row_does_not_depend_on_its_neighbours(backend: testing.Backend, num_rows: int) -> None:
    """A row with small logits has the same bits beside rows whose maxima move with nearly every tile."""
    case = dataclasses.replace(DECODES, q_lens=(1,), kv_lens=(700,), heads=(num_rows, 1), sm_scale=0.1)
    t = make_tensors(case)
    calm = run(case, t)
    t.q[:, 1:] *= 30
    wild = run(case, t)
    assert all(torch.equal(a[:, 0], b[:, 0]) for a, b in zip(calm, wild, strict=True))
    assert not torch.equal(calm[0][:, 1], wild[0][:, 1])


def test_a_second_launch_of_a_plan(backend: testing.Backend) -> None:
    """The counters of parts are zero again."""
    case = dataclasses.replace(DECODES, num_workers=7)
    t = make_tensors(case)
    plan = make_plan(case, t)
    first = run(case, t, plan)
    assert all(torch.equal(a, b) for a, b in zip(run(case, t, plan), first, strict=True))
