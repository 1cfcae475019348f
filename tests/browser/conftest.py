"""A headless Chromium for the tests of the page, and a watch over what it complains about."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.browser.mock_server import Mock, Running
from tests.browser.pictures import Sight

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WHY = "no chromium on PATH: sh tests/browser/install.sh (Debian, as root), or install it"


@pytest.fixture(scope="module")  # playwright's event loop runs until it ends: none of the other tests may meet it
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")
    if CHROMIUM is None:
        pytest.skip(WHY)
    with sync_api.sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments, headless=True)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Sight]]:
    """visit(url, **context options) -> a page of its own context; at the end none may have complained."""
    contexts = []
    sights: list[Sight] = []

    def open_page(url: str, *, context: Any = None, **options: Any) -> Sight:
        if context is None:
            context = browser.new_context(viewport={"width": 1280, "height": 900}, **options)
            contexts.append(context)
        sight = Sight(context.new_page())
        sights.append(sight)
        sight.page.goto(url)
        return sight

    yield open_page
    complaints = [line for sight in sights for line in sight.complaints]
    for context in contexts:
        context.close()
    assert not complaints


@pytest.fixture
def mock() -> Iterator[Running]:
    running = Running(Mock())
    yield running
    running.stop()
