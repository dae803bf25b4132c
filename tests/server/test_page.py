"""The page at /, in a real browser: it chats, shows the batch, asks for a key, and fits a narrow screen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tilestream.server.settings import ApiKeys

from .browser import NAMES, Tab, browser_tab, find_browser
from .hosts import MODEL, check_idle, make_engine, served

ANSWERED = "document.querySelectorAll('.turn.assistant small').length === 1"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    program = find_browser()
    if program is None:
        pytest.skip(f"needs a browser: one of {', '.join(NAMES)}; Debian's package chromium has one")
    with browser_tab(program, tmp_path_factory.mktemp("browser")) as made:
        yield made


def text_of(tab: Tab, selector: str) -> str:
    return tab.run(f"document.querySelector('{selector}').textContent")


def width_of_content(tab: Tab) -> int:
    return tab.run("document.documentElement.scrollWidth")


def test_the_page_is_one_file_that_asks_nobody_else() -> None:
    with served(make_engine()) as url:
        answer = httpx.get(url)
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "http://" not in answer.text and "https://" not in answer.text


def test_chat_and_batch(tab: Tab) -> None:
    with served(make_engine(step_s=0.01)) as url, tab.page(url):
        tab.wait("document.getElementById('status').textContent === 'serving'")
        assert text_of(tab, "#model") == MODEL and "sleeps" in text_of(tab, "#note")
        tab.run("document.getElementById('max-tokens').value = 60")
        tab.type("#prompt", "<b>Hello</b> there")
        tab.press_enter()
        tab.wait("document.querySelector('.turn.assistant')?.textContent.length > 3")
        assert text_of(tab, "#send") == "Stop"
        tab.wait("document.getElementById('running').textContent === '1'")
        tab.wait(ANSWERED)
        assert text_of(tab, ".turn.user") == "<b>Hello</b> there"  # text, not HTML
        assert "60 tokens" in text_of(tab, ".turn.assistant small")
        assert len(text_of(tab, ".turn.assistant")) > 60
        tab.wait("document.getElementById('running').textContent === '0'")
        tab.wait("document.getElementById('note').textContent.startsWith('Step ')")
        painted = "document.getElementById('tokens').getContext('2d').getImageData(0, 0, 400, 150).data.some(v => v)"
        assert tab.run(painted)
        tab.type("#prompt", "And then?")
        tab.press_enter()
        tab.wait("document.querySelectorAll('.turn.assistant small').length === 2")


def test_stop_ends_the_request_in_the_engine(tab: Tab) -> None:
    engine = make_engine(step_s=0.01)
    with served(engine) as url, tab.page(url):
        tab.run("document.getElementById('max-tokens').value = 1500")
        tab.type("#prompt", "Hello")
        tab.press_enter()
        tab.wait("document.querySelector('.turn.assistant')?.textContent.length > 3")
        tab.run("document.getElementById('send').click()")
        tab.wait("document.getElementById('send').textContent === 'Send'")
        check_idle(engine, limit_s=5)
        assert engine.metrics.finished_requests["abort"] == 1


def test_a_new_chat_knows_nothing_of_the_answer_it_ends(tab: Tab) -> None:
    with served(make_engine(step_s=0.01)) as url, tab.page(url):
        tab.run("document.getElementById('max-tokens').value = 1500")
        tab.type("#prompt", "Hello")
        tab.press_enter()
        tab.wait("document.querySelector('.turn.assistant')?.textContent.length > 3")
        tab.run("document.getElementById('new').click()")
        tab.wait("document.getElementById('send').textContent === 'Send'")
        assert tab.run("messages.length") == 0 and tab.run("document.querySelectorAll('.turn').length") == 0


def test_an_error_is_shown(tab: Tab) -> None:
    with served(make_engine()) as url, tab.page(url, allowed="400"):
        tab.type("#prompt", "x" * 3000)
        tab.press_enter()
        tab.wait("document.querySelectorAll('.turn.error').length === 1")
        assert "at most 2047" in text_of(tab, ".turn.error")


def test_a_key_is_asked_for(tab: Tab) -> None:
    with served(make_engine(), api_keys=ApiKeys(["secret"])) as url, tab.page(url, allowed="401"):
        tab.wait("!document.getElementById('key-row').hidden")
        tab.type("#key", "secret")
        tab.press_enter()
        tab.wait("document.getElementById('status').textContent === 'serving'")
        assert tab.run("document.getElementById('key-row').hidden")
        tab.run("document.getElementById('max-tokens').value = 5")
        tab.type("#prompt", "Hello")
        tab.press_enter()
        tab.wait(ANSWERED)
        tab.run("sessionStorage.clear()")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1280])
def test_it_fits_the_screen(tab: Tab, width: int, dark: bool, tmp_path: Path) -> None:
    with served(make_engine(step_s=0.005)) as url, tab.page(url, width=width, dark=dark):
        tab.run("document.getElementById('max-tokens').value = 40")
        tab.type("#prompt", "A rather long word: " + "m" * 200)
        tab.press_enter()
        tab.wait(ANSWERED)
        assert width_of_content(tab) <= width
        ground = tab.run("getComputedStyle(document.body).backgroundColor")
        brightness = sum(map(int, ground.removeprefix("rgb(").rstrip(")").split(","))) / 3
        assert brightness < 60 if dark else brightness > 200
        assert tab.screenshot().startswith(b"\x89PNG")
