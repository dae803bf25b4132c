"""Fixtures for every test: a seed of the test's own, the backends, SIMD levels and thread counts."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Iterator

import hypothesis
import pytest
import torch

from tests.on_device import OnDevice
from tests.simt import build as simt
from tilestream import testing
from tilestream._native import _C

# How long an example takes says more about the machine's other work than about us.
hypothesis.settings.register_profile("tilestream", deadline=None)
hypothesis.settings.load_profile("tilestream")


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """Random numbers depend on the test's name alone, not on which tests ran before."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def _log_of_its_own() -> Iterator[None]:
    """A command that runs in this process takes the log for itself, and binds it to a stderr that is closed after the test."""
    loggers = [logging.getLogger(name) for name in ("tilestream", "tilestream.access", "uvicorn")]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.fixture(autouse=True, scope="session")
def _one_torch_thread() -> None:
    """References are many small torch calls: a second thread costs more than it gives."""
    torch.set_num_threads(1)


# The emulator's schedules: in order with late effects, backwards with early ones, random.
SIMT_SEEDS = (0, 1, 2)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with a `backend` runs on all that this machine has; the mark `simt` says that its op has a CUDA kernel, and so
    runs on a GPU and on the emulator too, there as each GPU of `archs`: simt(archs=(80, 90)) for an op with a kernel for
    Hopper alone."""
    if "backend" not in metafunc.fixturenames:
        return
    choices = testing.backends()
    mark = metafunc.definition.get_closest_marker("simt")
    if mark is None:
        choices = [choice for choice in choices if choice.name == "cpu"]
    else:
        archs = mark.kwargs.get("archs", (80,))
        # Tests of more than one GPU take a random schedule on all but the first: what is a GPU's own has tests of its own.
        for arch in archs:
            seeds = SIMT_SEEDS if arch == archs[0] else SIMT_SEEDS[-1:]
            choices += [testing.Backend("simt", torch.device("cpu"), seed, arch) for seed in seeds]
    metafunc.parametrize("backend", choices, ids=str, indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[testing.Backend]:
    if request.param.name == "cuda":
        with OnDevice(request.param.device):
            yield request.param
        return
    if request.param.name != "simt":
        yield request.param
        return
    before = _C.simd_level()
    simt.ops().tilestream_simt_set_seed(request.param.seed)
    simt.ops().tilestream_simt_set_arch(request.param.arch)
    _C.set_simd_level("simt")
    yield request.param
    _C.set_simd_level(before)
    simt.ops().tilestream_simt_set_arch(80)


@pytest.fixture(params=testing.simd_levels())
def simd_level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once per SIMD level that this machine has."""
    before = _C.simd_level()
    _C.set_simd_level(request.param)
    yield request.param
    _C.set_simd_level(before)


@pytest.fixture
def set_num_threads() -> Iterator[Callable[[int], None]]:
    """Sets the CPU backend's threads for this test only."""
    before = _C.num_threads()
    yield _C.set_num_threads
    _C.set_num_threads(before)
