"""`tilestream quantize` as a shell sees it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tilestream.cli import main


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def run_main(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()  # what fixtures printed
        monkeypatch.setattr(sys, "argv", ["tilestream", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return int(stopped.value.code or 0), *capsys.readouterr()

    return run_main


@pytest.fixture
def calib(tmp_path: Path) -> Path:
    path = tmp_path / "calib.txt"
    path.write_text("All work and no play makes a dull text. " * 40)
    return path


def test_a_directory_and_what_is_in_it(run, hf_model, calib: Path, tmp_path: Path) -> None:
    _, path = hf_model("llama")
    out = tmp_path / "out"
    options = ("--calib-windows", "2", "--method", "rtn", "--group-size", "32")
    code, stdout, stderr = run("quantize", path, "--calib", calib, "-o", out, *options)
    assert (code, stderr) == (0, "")
    assert "of the multiply-adds have INT4 activations" in stdout and "report.md" in stdout
    facts = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (facts["quant_method"], facts["method"], facts["group_size"]) == ("tilestream", "rtn", 32)
    assert "![INT8 share per layer](int8_share.png)" in (out / "report.md").read_text()
    assert (out / "int8_share.png").read_bytes().startswith(b"\x89PNG")


def test_errors_are_one_line(run, hf_model, calib: Path, tmp_path: Path) -> None:
    _, path = hf_model("llama")
    out, foreign = tmp_path / "out", tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text('{"model_type": "mamba"}')
    (tmp_path / "latin.txt").write_bytes(b"\xe9\xe8 caf\xe9")
    (tmp_path / "short.txt").write_text("Too short.")
    cases = [
        ([path, "--calib", tmp_path / "none.txt", "-o", out], 2, "none.txt"),
        ([path, "--calib", calib, "-o", tmp_path], 2, "which exists"),
        ([path, "--calib", tmp_path / "latin.txt", "-o", out], 2, "no UTF-8 text"),
        ([path, "--calib", tmp_path / "short.txt", "-o", out], 1, "windows of 512 need"),
        ([path, "--calib", calib, "-o", out, "--int4-share", "2"], 2, "int4-share"),
        ([foreign, "--calib", calib, "-o", out], 1, "model_type is 'mamba'; supported:"),
    ]
    for arguments, expected, words in cases:
        code, stdout, stderr = run("quantize", *arguments)
        assert (code, stdout) == (expected, ""), stderr
        assert stderr.startswith("tilestream: error: ") and len(stderr.splitlines()) == 1 and words in stderr
        assert not out.exists()
