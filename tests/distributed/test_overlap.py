"""The simulator of the two-stream schedule: dealing of SMs by hand-made kernels, then whole steps against what was measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread
from tilestream.distributed.overlap_costs import BUILT_IN, OverlapCosts, Work
from tilestream.distributed.overlap_report import compare, table
from tilestream.distributed.overlap_simulator import (
    Kernel,
    Span,
    split_kernels,
    split_step_s,
    timeline,
    whole_kernels,
    whole_step_s,
)
from tilestream.overlap_picture import draw_overlap

from tests.server.test_cli import check_one_line_error, run  # noqa: F401

COSTS = OverlapCosts.load("h100x8-llama3-70b")


def computes(name: str, half: int, num_blocks: int, block_s: float) -> Kernel:
    return Kernel(name, half, False, Work(num_blocks, block_s))


def communicates(name: str, half: int, num_blocks: int, block_s: float) -> Kernel:
    return Kernel(name, half, True, Work(num_blocks, block_s))


def times(spans: list[Span]) -> dict[str, tuple[float, float]]:
    return {span.kernel.name: (span.begin_s, span.end_s) for span in spans}


def test_tiles_take_waves() -> None:
    spans = times(timeline([computes("a", 0, 9, 1.0), computes("b", 0, 4, 1.0)], num_sms=4, launch_s=0.5))
    assert spans == {"a": (0.5, 3.5), "b": (4.0, 5.0)}  # 9 tiles on 4 SMs: 3 waves


def test_communication_takes_its_sms_first() -> None:
    spans = times(timeline([communicates("c", 1, 2, 1.5), computes("a", 0, 8, 1.0)], num_sms=4, launch_s=0.0))
    assert spans["c"] == (0.0, 1.5)
    assert spans["a"] == (0.0, 3.0)  # 2 tiles at 0 and 1, 2 more at 1.5, the last two at 2


def test_communication_begins_when_all_its_blocks_have_an_sm() -> None:
    kernels = [communicates("c", 1, 1, 0.5), computes("a", 0, 6, 1.0), communicates("d", 1, 3, 1.0)]
    spans = times(timeline(kernels, num_sms=4, launch_s=0.0))
    assert spans["c"] == (0.0, 0.5)
    assert spans["d"] == (0.5, 2.0)  # one block waits from 0.5 on for two more
    assert spans["a"] == (0.0, 3.0)  # 3 tiles at 0, one at 1, where d has taken two SMs of three, 2 at 2


@given(
    sizes=st.lists(st.tuples(st.integers(0, 1), st.booleans(), st.integers(1, 9), st.floats(0.01, 2)), min_size=1, max_size=20),
    num_sms=st.integers(9, 20),
)
def test_no_sm_is_dealt_twice_and_nothing_is_lost(sizes: list, num_sms: int) -> None:
    kernels = [Kernel(str(i), half, stream, Work(*work)) for i, (half, stream, *work) in enumerate(sizes)]
    spans = timeline(kernels, num_sms, launch_s=0.001)
    assert sorted(int(span.kernel.name) for span in spans) == list(range(len(kernels)))
    ends = {int(span.kernel.name): span.end_s for span in spans}
    for span in spans:
        place, work = int(span.kernel.name), span.kernel.work
        assert span.end_s - span.begin_s >= work.block_s * (1 - 1e-9)
        for earlier in range(place):
            other = kernels[earlier]
            if other.half == span.kernel.half or other.communicates == span.kernel.communicates:
                assert span.begin_s > ends[earlier]
    work_s = sum(kernel.work.num_blocks * kernel.work.block_s for kernel in kernels)
    assert work_s <= max(ends.values()) * num_sms * (1 + 1e-9)


def test_the_halves_of_a_split_step_compute_the_step() -> None:
    """Attention is cut along its triangle; GEMMs have no fewer tiles than whole."""
    costs = replace(COSTS, tiles=((128, 256, 1.0),))
    whole = whole_kernels(costs, 8192, "fused", 1)
    halves = split_kernels(costs, 8192, 3072, (8, 4), 1)

    def work(kernels: list[Kernel], name: str) -> float:
        return sum(k.work.num_blocks * k.work.block_s for k in kernels if k.name == name)

    assert work(halves, "attention") == pytest.approx(work(whole, "attention"))
    for name in ("qkv", "o", "gate_up", "down"):
        assert work(whole, name) * (1 - 1e-9) <= work(halves, name) <= work(whole, name) * 1.05
    beside = [(k.half, k.work.num_blocks) for k in halves if k.communicates]
    assert beside == [(0, 4), (1, 8), (0, 8), (1, 4)]


MEASURED = {kind: dict(points) for kind, points in COSTS.measured_step.items()}


@pytest.mark.parametrize("num_tokens", MEASURED["split"])
def test_steps_are_near_those_that_were_measured(num_tokens: int) -> None:
    """TokenWeave's figure 11a. The rate of GEMMs is fitted to "none" at 8192; the rest follows."""
    assert whole_step_s(COSTS, num_tokens, "none") == pytest.approx(MEASURED["none"][num_tokens], rel=0.07)
    assert whole_step_s(COSTS, num_tokens, "multimem") == pytest.approx(MEASURED["multimem"][num_tokens], rel=0.08)
    assert compare(COSTS, num_tokens).split.step_s == pytest.approx(MEASURED["split"][num_tokens], rel=0.06)


def test_what_pays() -> None:
    """As measured: at 8192 tokens a split is faster than the model without communication, and far below 1024 it loses."""
    steps = {num_tokens: compare(COSTS, num_tokens) for num_tokens in (256, 512, 1024, 8192)}
    assert steps[8192].split.step_s < steps[8192].whole_s["none"] < steps[8192].whole_s["fused"]
    assert steps[1024].split.step_s < steps[1024].whole_s["fused"] < steps[1024].whole_s["multimem"]
    for num_tokens in (256, 512):
        assert steps[num_tokens].split.step_s > steps[num_tokens].whole_s["fused"]
    assert "8192" in table(list(steps.values()))
    assert split_step_s(COSTS, 8192, 4096, (2, 2)) > split_step_s(COSTS, 8192, 4096, (8, 8))  # too few to be hidden


def test_profiled_times_stand_for_the_formula(tmp_path: Path) -> None:
    values = json.loads(BUILT_IN["h100x8-llama3-70b"].read_text())
    alone_us = {"gate_up": 1000.0, "down": 500.0, "qkv": 100.0, "o": 80.0, "append": 10.0, "act": 40.0, "attention": 200.0}
    values["profiled_us"] = {name: {"4096": us, "8192": 2 * us} for name, us in alone_us.items()}
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(values))
    costs = replace(OverlapCosts.load(str(path)), launch_s=0.0, step_s=0.0)
    without_norm = replace(costs, norm=((1, 0.0),))
    assert whole_step_s(without_norm, 8192, "none") == pytest.approx(80 * 2 * sum(alone_us.values()) / 1e6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"nccl_us": {}}, "empty table"),
        ({"num_sms": None, "more": 1}, "more"),
        ({"fused_us": {"x": {"1": 1}}}, "invalid literal"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, change: dict, words: str) -> None:
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(json.loads(BUILT_IN["h100x8-llama3-70b"].read_text()) | change))
    with pytest.raises(ValueError, match=f"is no file of costs .*{words}"):
        OverlapCosts.load(str(path))


def test_the_command(tmp_path: Path, run) -> None:  # noqa: F811
    picture = tmp_path / "overlap.png"
    done = run("overlap", "--tokens", "1024,4096", "--plot", str(picture))
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[1:3]] == ["1024", "4096"]
    assert "estimate" in done.stderr
    assert imread(picture).std() > 0.05


def test_a_picture_of_other_costs(tmp_path: Path) -> None:
    costs = replace(COSTS, measured_step={})
    draw_overlap(costs, [compare(costs, 3000)], tmp_path / "overlap.png")
    assert (imread(tmp_path / "overlap.png").std()) > 0.05


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tokens", "1024,x"], ["--tokens", "'1024,x'"]),
        (["--tokens", "1"], ["--tokens", "at least 2"]),
        (["--plot", "overlap.jpg"], ["--plot", "end in .png"]),
    ],
)
def test_wrong_options(options: list[str], words: list[str], run) -> None:  # noqa: F811
    check_one_line_error(run("overlap", *options), 2, *words)
