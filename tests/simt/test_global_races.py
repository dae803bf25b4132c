"""Races between blocks in global memory, which the emulator looks for when asked to."""

from __future__ import annotations

import pytest

from tests.simt.test_simt import RIGHT, SEEDS, run

WRONG = {
    "blocks_write_the_same_place": "race in global memory: .* writes .*, written by block .* at wrong_global.cu",
    "flag_without_release": "race in global memory: .* reads .*, written by block .* at wrong_global.cu",
    "last_block_without_fence": "race in global memory: .* reads .*, written by block .* at wrong_global.cu",
}


@pytest.fixture(autouse=True)
def races(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILESTREAM_SIMT_GLOBAL_RACES", "1")


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", WRONG)
def test_races_are_named(name: str, seed: int) -> None:
    with pytest.raises(RuntimeError, match=WRONG[name]):
        report, _ = run(name, seed)
        raise RuntimeError(report)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", RIGHT)
def test_right_kernels_have_none(name: str, seed: int) -> None:
    assert run(name, seed)[0] == ""
