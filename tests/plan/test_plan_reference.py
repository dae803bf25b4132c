"""The coverage check itself: each way of breaking a plan must be noticed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tilestream.reference.plan import Merge, Plan, check_coverage, decode_plan

from .plan_steps import DEFAULTS, Step

STEP = Step(DEFAULTS, [1, 9, 1], np.array([300, 90, 200], dtype=np.int32), [(48, [0, 2])])


def with_job(plan: Plan, index: int, **changes: int) -> Plan:
    jobs = list(plan.jobs)
    jobs[index] = replace(jobs[index], **changes)
    return replace(plan, jobs=tuple(jobs))


def reversed_parts(merge: Merge) -> Merge:
    return replace(merge, parts=merge.parts[::-1])


def test_an_intact_plan_passes() -> None:
    check_coverage(STEP.plan(), STEP.cu_seqlens_q, STEP.kv_lens)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda p: replace(p, jobs=p.jobs[:-1]), "0 times instead of 1|partial rows are written"),
        (lambda p: with_job(p, 1, kv_end=p.jobs[1].kv_end - 1), "key covered 0 times instead of 1"),
        (lambda p: with_job(p, -1, kv_begin=p.jobs[-1].kv_begin - 1), "merged after key|key covered 2 times"),
        (lambda p: with_job(p, -1, page_list=0), "its own is 2"),
        (lambda p: with_job(p, -1, partial_begin=0), "is written twice"),
        (lambda p: with_job(p, -1, partial_begin=-1), "partial rows are written"),
        (lambda p: with_job(p, -1, kv_head=0), "the merge of token"),
        (lambda p: replace(p, merges=p.merges[1:]), "written 0 times instead of 1"),
        (lambda p: replace(p, merges=p.merges + p.merges[:1]), "written 2 times instead of 1"),
        (lambda p: replace(p, merges=(reversed_parts(p.merges[0]), *p.merges[1:])), "after key"),
    ],
)
def test_a_broken_plan_is_noticed(broken: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_coverage(broken(STEP.plan()), STEP.cu_seqlens_q, STEP.kv_lens)


def test_a_buffer_that_is_no_plan_is_refused() -> None:
    words = np.zeros(100, dtype=np.int32)
    with pytest.raises(ValueError, match="not a plan"):
        decode_plan(words)
    words[0], words[1] = 0x54535031, 101
    with pytest.raises(ValueError, match="has 100 int32, but its header says 101"):
        decode_plan(words)
