"""The table of a bench file: `pytest bench -s` prints it, `--write-results` keeps it under bench/results/<device>/."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.harness import Report
from tilestream._native import _C


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-results", action="store_true", help="keep the tables under bench/results/")
    parser.addoption("--text", help="bench_perplexity.py: the text to score")


@pytest.fixture(scope="module")
def report(request: pytest.FixtureRequest):
    """The module's table: printed at the end, and written with --write-results."""
    result = Report(request.module.__doc__.strip().splitlines()[0])
    yield result
    print("\n" + result.text())
    if request.config.getoption("--write-results"):
        directory = Path(__file__).parent / "results" / f"cpu-{_C.simd_level()}-{_C.num_threads()}t"
        directory.mkdir(parents=True, exist_ok=True)
        name = request.module.__name__.rpartition(".")[2].removeprefix("bench_")
        (directory / f"{name}.md").write_text(result.text())


@pytest.fixture(autouse=True)
def _same_threads() -> None:
    torch.set_num_threads(_C.num_threads())
