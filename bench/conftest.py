"""The table of a bench file: `pytest bench -s` prints it, `--write-results` keeps it under bench/results/<device>/."""

from __future__ import annotations

import ctypes

import pytest
import torch

from bench.harness import Report, this_cpu
from bench.roofs import Machine
from tilestream._native import _C
from tilestream.testing import Ranks


# glibc's mallopt(). Left alone, malloc gives large buffers back to the system as soon as they are free, and torch pays for
# their pages again in every call: a rms_norm of 64 x 4096 then takes 700 us instead of 100.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 1 << 30


def pytest_configure() -> None:
    if hasattr(ctypes.CDLL(None), "mallopt"):
        for option in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
            ctypes.CDLL(None).mallopt(option, _KEPT_BYTES)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-results", action="store_true", help="keep the tables under bench/results/")
    parser.addoption("--text", help="bench_perplexity.py, bench_quantised.py: the text to score")
    parser.addoption("--lengths", help="bench_goodput.py: a CSV of requests (Azure's LLM inference dataset) to draw lengths from")
    parser.addoption(
        "--quantised",
        action="append",
        help="bench_quantised.py, bench_precision.py: a directory of `tilestream quantize`; repeatable",
    )


@pytest.fixture(scope="session")
def machine() -> Machine:
    """What is measured; cuda/ has its own."""
    return this_cpu()


@pytest.fixture(scope="module")
def report(request: pytest.FixtureRequest, machine: Machine):
    """The module's table: printed at the end, and written with --write-results."""
    result = Report(request.module.__doc__.strip().splitlines()[0], machine)
    yield result
    print("\n" + result.text())
    if request.config.getoption("--write-results"):
        result.write(request.module.__name__.rpartition(".")[2].removeprefix("bench_"))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory):
    """Two processes (bench.two_ranks)."""
    started = Ranks(2, tmp_path_factory.mktemp("ranks"))
    yield started
    started.close()


@pytest.fixture(autouse=True)
def _same_threads() -> None:
    torch.set_num_threads(_C.num_threads())
