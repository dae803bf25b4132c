"""What the documentation tells people to run, runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/ops.md", "docs/api.md")


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


def test_the_api_page_names_every_field() -> None:
    from tilestream.server import fields, protocol, structured

    page = (ROOT / "docs/api.md").read_text()
    kinds = (protocol.CompletionRequest, protocol.ChatCompletionRequest, fields.StreamOptions, structured.StructuredOutputs)
    names = {info.alias or name for kind in kinds for name, info in kind.model_fields.items()}
    names |= protocol._IGNORED_FIELDS | protocol._REFUSED_FIELDS.keys()
    assert {name for name in names if f"`{name}`" not in page} == set()


def test_the_api_page_knows_the_limits() -> None:
    from tilestream.engine import constraints
    from tilestream.server import tools

    page = (ROOT / "docs/api.md").read_text()
    limits = constraints._MAX_CHARACTERS
    assert limits["json_schema"] == limits["choice"] and limits["regex"] == limits["grammar"]
    assert f"at most {limits['choice']:,} characters" in page and f"{limits['regex']:,}, with at most" in page
    assert f"{constraints._MAX_REFERENCES:,} references" in page
    assert f"last {constraints._MAX_CACHED_GRAMMARS} stay compiled" in page
    assert all(f"| {form.name} |" in page for form in tools.FORMATS)
