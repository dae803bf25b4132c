"""The GPU's attention benches on the CPU, small, with a stand-in for FlashInfer: all of them but times and CUDA graphs."""

from __future__ import annotations

import importlib.machinery
import sys
import types

import pytest

from bench.cuda import attention_batch, bench_decode, bench_mixed, bench_prefill, timing
from bench.harness import Report
from bench.roofs import Machine
from bench.sm90_loads import Heads
from tests.benches import fake_flashinfer

HEADS = (4, 2, 64)
PAGED = {"FlashInfer fa2", "FlashInfer fa3", "FlashInfer fa3, no pages"}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("flashinfer")
    module.__dict__.update({name: value for name, value in vars(fake_flashinfer).items() if not name.startswith("_")})
    module.__spec__ = importlib.machinery.ModuleSpec("flashinfer", loader=None)
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr(attention_batch, "DEVICE", "cpu")
    monkeypatch.setattr(attention_batch, "APPENDED_TOKENS", 100)
    monkeypatch.setattr(timing, "capture", lambda run, num_sets, num_calls: None)
    for bench in (bench_prefill, bench_decode, bench_mixed):
        monkeypatch.setattr(bench, "interleave", run_each)
    for bench in (bench_decode, bench_mixed):
        monkeypatch.setattr(bench, "num_sets", lambda num_bytes: 2)
    monkeypatch.setattr(bench_prefill, "TOKENS", 150)
    monkeypatch.setattr(bench_prefill, "prefill_heads", lambda head_dim: Heads(*HEADS[:2], head_dim, head_dim))
    monkeypatch.setattr(bench_decode, "GQA_4", HEADS)
    monkeypatch.setattr(bench_mixed, "HEADS", HEADS)


def run_each(candidates: dict, num_sets: int) -> dict[str, list[float]]:
    """Instead of their times: the n-th candidate takes n ms."""
    for run in candidates.values():
        for i in range(num_sets):
            run(i)
    return {name: [n * 1e-3] * 3 for n, name in enumerate(candidates, 1)}


@pytest.fixture
def report() -> Report:
    rates = {"memory_rate": lambda kind, _: 1e12, "arithmetic_rate": lambda kind: 1e15}
    return Report("dry run", Machine("m", "a machine", ("read", "copy"), ("bf16", "int8"), **rates))


def only_row(report: Report):
    assert len(report.rows) == 1
    assert report.rows[0].op in report.text()
    return report.rows[0]


@pytest.mark.parametrize("length", [75, 150])
def test_prefill(length: int, report: Report) -> None:
    bench_prefill.test_bfloat16(64, length, report)
    row = only_row(report)
    assert row.case == f"{150 // length} x {length}, heads (4, 2, 64)"
    assert set(row.peers) >= PAGED
    assert row.work.num_ops == 150 // length * 4 * 64 * 4 * length * (length + 1) // 2


def test_fp8_prefill(report: Report) -> None:
    bench_prefill.test_fp8(64, 150, report)
    assert set(only_row(report).peers) >= {"FlashInfer fa2", "FlashInfer fa3, fp8 products"}


def test_decode(report: Report) -> None:
    bench_decode.test_bfloat16(3, 130, report)
    row = only_row(report)
    assert set(row.peers) >= {"FlashInfer", "XQA"}
    assert row.work.num_bytes == 3 * 130 * 2 * 2 * 64 * 2


@pytest.mark.parametrize("kv_dtype", attention_batch.ROW_BYTES)
def test_quantised_decode(kv_dtype: str, report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_decode, "LENGTH_QUANTISED", 130)
    bench_decode.test_quantised(kv_dtype, 2, report)
    assert ("XQA" in only_row(report).peers) == (kv_dtype == "fp8")


def test_skewed_lengths(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    kv_lens = bench_decode.skewed_lengths()
    assert kv_lens == bench_decode.skewed_lengths() and len(kv_lens) == 64
    assert sum(sorted(kv_lens)[-16:]) > sum(kv_lens) / 2, "a quarter of the requests holds most of the tokens"
    monkeypatch.setattr(bench_decode, "skewed_lengths", lambda: [1, 64, 200, 65])
    bench_decode.test_skewed_lengths(report)
    assert set(only_row(report).peers) >= {"FlashInfer", "XQA", "best: FlashInfer"}


def test_shared_prefix(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PREFIX": 128, "OWN": 70, "NUM_SHARING": 3}.items():
        monkeypatch.setattr(bench_decode, name, value)
    bench_decode.test_shared_prefix(report)
    row = only_row(report)
    assert set(row.peers) == {"ours, unshared", "FlashInfer cascade"}
    assert row.work.num_bytes == (128 + 3 * 70) * 2 * 2 * 64 * 2


def test_mixed(report: Report) -> None:
    ratios: list[float] = []
    for chunk, num_decodes, kv_len in ((24, 3, 100), (130, 2, 70)):
        bench_mixed.test_mixed(chunk, num_decodes, kv_len, ratios, report)
    for row in report.rows:
        assert {"FlashInfer BatchAttention", "FlashInfer POD", "ours, two launches"} < set(row.peers)
        assert any(name.startswith("serial pair: ") for name in row.peers)
    assert len(ratios) == 2 and min(ratios) > 1
    bench_mixed.test_mean(ratios, report)
    assert f"geometric mean of 2 | {(ratios[0] * ratios[1]) ** 0.5:.2f} x" in report.text()


def test_a_peer_with_a_wrong_result_is_left_out(report: Report, capsys: pytest.CaptureFixture) -> None:
    batch = bench_decode.Decodes([70, 70], HEADS).batch
    right = bench_decode.flashinfer.decode(batch.paged)["FlashInfer"]
    peers = {"right": right, "wrong": lambda i: right(i) * 1.1, "none": lambda i: 1 // 0}
    assert set(batch.working(peers)) == {"right"}
    output = capsys.readouterr().out
    assert "left out: wrong: its result is 0.1 from ours" in output and "left out: none: integer division" in output


def test_nothing_of_flashinfer_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    batch = bench_decode.Decodes([70], HEADS).batch.paged
    peers = bench_decode.flashinfer
    for all_of_them in (peers.prefill, peers.fp8_prefill, peers.decode, peers.mixed, lambda batch: peers.cascade(batch, 64)):
        assert all_of_them(batch) == {}


def test_the_fastest_peer_is_named() -> None:
    times = {"ours": [1.0], "a": [3.0], "ours, twice": [1.5], "b": [2.0, 2.0, 9.0]}
    assert attention_batch.with_best(times) == times | {"best: b": times["b"]}
    assert attention_batch.with_best({"ours": [1.0], "a": [3.0]}) == {"ours": [1.0], "a": [3.0]}
