"""Opens pages in Chromium; console messages, dialogs and requests fail the test."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from msf_faiss.neighbors.page_content import Explorer
from msf_faiss.neighbors.page_html import write_page

Visit = Callable[..., Page]


@pytest.fixture
def visit(browser: Browser, tmp_path: Path) -> Iterator[Visit]:
    """Write a page and open it from disk; fail at the end if it reported anything."""
    problems: list[str] = []
    contexts = []

    def visit(explorer: Explorer, place: str = "", *, script: str | None = None, **options: Any) -> Page:
        path = tmp_path / f"page-{len(contexts)}.html"
        write_page(explorer, path)
        defaults = {"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce"}  # no animations to wait for
        context = browser.new_context(**defaults | options)
        context.set_default_timeout(20_000)  # for busy machines
        contexts.append(context)
        if script is not None:
            context.add_init_script(script)
        page = context.new_page()
        page.on("console", lambda message: problems.append(f"console: {message.type}: {message.text}"))
        page.on("pageerror", lambda error: problems.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (problems.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: note_request(request.url, path.as_uri()))
        page.goto(path.as_uri() + place)
        return page

    def note_request(url: str, own: str) -> None:
        if url.partition("#")[0] != own and not url.startswith(("data:", "blob:")):
            problems.append(f"request: {url[:200]}")

    yield visit
    for context in contexts:
        context.close()
    assert problems == []
