"""The page at "/", in a real browser where there is one: it chats, stops, shows figures, makes no markup of text."""

import shutil
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.server import patient
from tests.server.conftest import Running

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

FIGURE = "(name => Number(document.querySelector(`[data-metric='${name}']`)?.textContent.replaceAll(',', '')))"


def test_the_page_needs_nothing_from_elsewhere_and_no_key(server: Running) -> None:
    answer = patient.get(f"{server.url}/")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "http://" not in answer.text and "https://" not in answer.text and "innerHTML" not in answer.text


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def wait(page: Any, expression: str) -> None:
    """Playwright's own way of waiting is what the page's policy forbids: text as a program."""
    deadline = time.monotonic() + 60
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, (expression, page.text_content("body"))
        page.wait_for_timeout(20)


@pytest.mark.integrations
def test_a_chat_in_a_browser(browser: Any, server: Running) -> None:
    page = browser.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.set_default_timeout(60_000)
    page.goto(f"{server.url}/")
    wait(page, "document.getElementById('model').textContent === 'tiny'")
    page.fill("#temperature", "0")
    page.fill("#max_tokens", "20")
    page.fill("#prompt", "<img src=x onerror=alert(1)>")
    page.press("#prompt", "Enter")
    wait(page, "document.getElementById('state').textContent.includes('20 tokens')")
    assert page.text_content("#chat .user") == "<img src=x onerror=alert(1)>" and page.query_selector("img") is None
    assert page.text_content("#chat .assistant") == ("abcdefgh" * 3)[:20]
    wait(page, f"{FIGURE}('vllm:generation_tokens_total') >= 20")
    page.fill("#max_tokens", "15000")
    page.fill("#prompt", "more")
    page.click("#send")
    wait(page, "document.querySelectorAll('#chat .assistant')[1]?.textContent.length > 5")
    wait(page, f"{FIGURE}('vllm:num_requests_running') == 1")
    page.click("#send")  # it says "Stop" now
    wait(page, "document.getElementById('send').textContent === 'Send'")
    wait(page, f"{FIGURE}('vllm:num_requests_running') == 0")
    page.click("#reset")
    assert page.text_content("#chat") == ""
    page.fill("#prompt", "x" * 25_000)
    page.click("#send")
    page.wait_for_selector("#chat .error")
    assert "25" in page.text_content("#chat .error")
    assert [problem for problem in problems if "400" not in problem] == []
