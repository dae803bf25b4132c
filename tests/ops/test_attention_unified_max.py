"""attention with a unified maximum (FlashDecoding++): within its range, out of it, and where it may not be used."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from tests.ops.attention_case import Case, Tensors, check, make_tensors, run
from tilestream import testing

pytestmark = pytest.mark.simt(archs=(80, 90))
KV_DTYPES = [("float16", "float16"), ("bfloat16", "bfloat16"), ("float16", "int8"), ("bfloat16", "int4")]
each_dtype = pytest.mark.parametrize(("dtype", "kv_dtype"), KV_DTYPES, ids=lambda d: d)

# Decodes over 1 to 300 keys, one verification of 3 tokens, and a prefill, which keeps the online softmax.
STEP = Case(q_lens=(1, 3, 1, 48), kv_lens=(300, 70, 1, 48), num_workers=3)


def with_and_without(case: Case, unified_max: float, t: Tensors | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The results with a unified maximum, held to the error rule; whether they are those of the online softmax, by token."""
    t = make_tensors(case) if t is None else t
    out, lse = check(dataclasses.replace(case, unified_max=unified_max), t)
    online_out, online_lse = run(case, t)
    same = (out == online_out).flatten(1).all(1) & (lse == online_lse).flatten(1).all(1)
    return out, same


def is_cuda(backend: testing.Backend) -> bool:
    return backend.name != "cpu"


@each_dtype
@pytest.mark.parametrize("variant", [{}, {"soft_cap": 5.0}, {"alibi": True}, {"sinks": True}, {"window_left": 40}], ids=str)
def test_within_the_range(backend: testing.Backend, variant: dict, dtype: str, kv_dtype: str) -> None:
    case = dataclasses.replace(STEP, dtype=dtype, kv_dtype=kv_dtype, **variant)
    t = make_tensors(case)
    if t.alibi_slopes is not None:
        t.alibi_slopes *= 0.01  # 300 keys back, 3
    _, same = with_and_without(case, 1.5, t)
    assert bool(same[5:].all())  # the prefill
    assert bool(same[0]) != is_cuda(backend)  # the long decode was weighed otherwise


@each_dtype
@pytest.mark.parametrize("unified_max", [-1e6, -60.0, 60.0, 1e6])
def test_out_of_the_range(backend: testing.Backend, unified_max: float, dtype: str, kv_dtype: str) -> None:
    """What does not suit is done again, bit for bit as without."""
    _, same = with_and_without(dataclasses.replace(STEP, dtype=dtype, kv_dtype=kv_dtype), unified_max)
    assert bool(same.all())


@each_dtype
@pytest.mark.parametrize("unified_max", [-1e4, 0.0, 1e4])
def test_extreme_logits(backend: testing.Backend, unified_max: float, dtype: str, kv_dtype: str) -> None:
    """Logits up to +-1e4: no weight is lost and none overflows."""
    case = Case(q_lens=(1, 1, 1), kv_lens=(90, 33, 2), dtype=dtype, kv_dtype=kv_dtype, sm_scale=250.0)
    out, same = with_and_without(case, unified_max)
    assert bool(out.isfinite().all()) and bool(same.all())


@each_dtype
def test_one_request_out_of_the_range(backend: testing.Backend, dtype: str, kv_dtype: str) -> None:
    """A job is done again alone: its neighbours keep what they have."""
    case = Case(q_lens=(1, 1, 1), kv_lens=(100, 100, 100), dtype=dtype, kv_dtype=kv_dtype, num_workers=1)
    t = make_tensors(case)
    t.q[1] *= 100.0
    out, same = with_and_without(case, 1.5, t)
    assert bool(same[1]) and bool(same[[0, 2]].any()) != is_cuda(backend)
    assert bool(out.isfinite().all())


@each_dtype
def test_rows_without_keys(backend: testing.Backend, dtype: str, kv_dtype: str) -> None:
    case = Case(q_lens=(2, 1, 2), kv_lens=(0, 3, 20), dtype=dtype, kv_dtype=kv_dtype, causal=False)
    out, _ = with_and_without(case, 1.0)
    assert torch.equal(out[:2], torch.zeros_like(out[:2]))


@each_dtype
def test_not_in_a_batch_invariant_plan(backend: testing.Backend, dtype: str, kv_dtype: str) -> None:
    """A prefill would not give a decode's bits."""
    _, same = with_and_without(dataclasses.replace(STEP, dtype=dtype, kv_dtype=kv_dtype, batch_invariant=True), 1.5)
    assert bool(same.all())


def test_a_nan_stays_in_its_token(backend: testing.Backend) -> None:
    case = Case(q_lens=(1, 1), kv_lens=(40, 50), dtype="bfloat16", kv_dtype="bfloat16", unified_max=1.0)
    t = make_tensors(case)
    clean, _ = run(case, t)
    t.q[1] = math.nan
    out, lse = run(case, t)
    assert torch.equal(out[0], clean[0]) and bool(out[1].isnan().all()) and bool(lse[1].isnan().all())


@pytest.mark.parametrize("unified_max", [math.inf, -math.inf, math.nan])
def test_it_is_a_number(unified_max: float) -> None:
    case = Case(unified_max=unified_max)
    with pytest.raises(ValueError, match="unified_max is .*; allowed: a finite number, or None"):
        run(case, make_tensors(case))
