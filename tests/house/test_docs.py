"""What the documentation tells people to run, runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/ops.md")


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = blocks(page)
    assert found, f"{page} has no python block: take it off this list"
    for code in found:
        exec(compile(code, page, "exec"), {})


def test_readme_names_the_two_commands() -> None:
    makefile, ci = (ROOT / "Makefile").read_text(), (ROOT / ".ci" / "run").read_text()
    for command in ("make run", "make test"):
        assert command in (ROOT / "README.md").read_text() and command in ci
        assert f"\n{command.removeprefix('make ')}:" in makefile
