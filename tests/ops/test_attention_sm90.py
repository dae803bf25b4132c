"""attention's kernel for Hopper: what its lanes, rings and tiles make delicate. The narrow lane: test_attention_narrow.py.

Other tests of attention run as sm_90 too, with one schedule; here are the sizes at which tiles, pages and jobs end, with all.
"""

from __future__ import annotations

import dataclasses

import pytest

from tests.ops.attention_case import Case, check
from tilestream import testing
from tilestream._native import _C
from tilestream.ops.plan import sm90_shares

pytestmark = pytest.mark.simt(archs=(90,))
# (q and out, cache)
CACHES = [("bfloat16", "bfloat16"), ("bfloat16", "int8"), ("float16", "int4"), ("bfloat16", "fp8"), ("fp8", "fp8")]
OTHERS = [("float16", "float16"), ("float32", "bfloat16"), ("float16", "int8"), ("bfloat16", "int4"), ("float16", "fp8"),
          ("float32", "fp8")]  # fmt: skip
each_cache = pytest.mark.parametrize(("dtype", "kv_dtype"), CACHES + OTHERS, ids=lambda d: d)
some_caches = pytest.mark.parametrize(("dtype", "kv_dtype"), CACHES, ids=lambda d: d)

CHUNKS = Case(q_lens=(1, 70, 3), kv_lens=(130, 70, 75), layout="hnd")


@each_cache
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
def test_head_dims(backend: testing.Backend, head_dim: int, dtype: str, kv_dtype: str) -> None:
    check(dataclasses.replace(CHUNKS, head_dim=head_dim, dtype=dtype, kv_dtype=kv_dtype))


@some_caches
@pytest.mark.parametrize("layout", ["hnd", "nhd"])
@pytest.mark.parametrize("page_size", [16, 32, 64])
def test_pages(backend: testing.Backend, page_size: int, layout: str, dtype: str, kv_dtype: str) -> None:
    case = Case(page_size=page_size, layout=layout, dtype=dtype, kv_dtype=kv_dtype)
    lengths = (1, page_size - 1, page_size, page_size + 1, 63, 64, 65, 129)
    check(dataclasses.replace(case, q_lens=tuple(min(5, n) for n in lengths), kv_lens=lengths))
    check(dataclasses.replace(case, q_lens=(70,), kv_lens=(200,), head_dim=128, num_workers=7, planner=(("merge_inside", True),)))


@some_caches
@pytest.mark.parametrize("q_len", [1, 2, 64, 65, 150])
def test_chunks(backend: testing.Backend, q_len: int, dtype: str, kv_dtype: str) -> None:
    """Rows that fill no warpgroup, all, and more than one row tile, so that rings go round several times."""
    check(
        Case(
            q_lens=(q_len, 1),
            kv_lens=(q_len + 180, 40),
            head_dim=128,
            layout="nhd",
            dtype=dtype,
            kv_dtype=kv_dtype,
            num_workers=2,
        )
    )


VARIANTS = [
    {"heads": (6, 2)},
    {"heads": (4, 4), "causal": False},
    {"window_left": 0},
    {"window_left": 40},
    {"soft_cap": 5.0},
    {"alibi": True},
    {"sinks": True},
    {"window_left": 33, "soft_cap": 2.0, "sinks": True, "heads": (3, 1)},
    {"head_dim": 128, "head_dim_vo": 64},
]


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(
    "variant", [{}, {"soft_cap": 3.0}, {"alibi": True, "heads": (6, 3)}, {"sm_scale": -0.2}, {"sm_scale": 3.0}], ids=str
)
def test_descales(backend: testing.Backend, variant: dict, head_dim: int) -> None:
    """Those of q and K join sm_scale, that of V the output; head by head, and beside the cache's own."""
    case = dataclasses.replace(CHUNKS, dtype="fp8", kv_dtype="fp8", head_dim=head_dim, k_scale=0.5, v_scale=2.0, **variant)
    check(dataclasses.replace(case, descales=True))
    check(dataclasses.replace(case, descales=True, num_workers=5, planner=(("merge_inside", True),)))


@some_caches
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(v))
def test_variants(backend: testing.Backend, variant: dict, dtype: str, kv_dtype: str) -> None:
    check(dataclasses.replace(CHUNKS, dtype=dtype, kv_dtype=kv_dtype, **variant))


@some_caches
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_as_a_gpu_plans_it(backend: testing.Backend, head_dim: int, dtype: str, kv_dtype: str) -> None:
    """Chunks beside decodes, dealt as AttentionPlanner does on Hopper."""
    shares = sm90_shares(3, _C.attention_tile(kv_dtype, head_dim, head_dim))._asdict()
    case = Case(q_lens=(70, 1, 1), kv_lens=(150, 330, 65), head_dim=head_dim, layout="hnd", dtype=dtype, kv_dtype=kv_dtype)
    check(dataclasses.replace(case, num_workers=shares.pop("num_workers"), planner=tuple(shares.items())))
