"""The documentation site builds without warnings, is complete, and works without a network."""

import html
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import click
import pytest
from documents import ROOT
from msf_faiss_cli.main import cli
from playwright.sync_api import Browser

from msf_faiss.config.load import load_config

LOADED = {"src", "srcset", "poster", "data"}  # attributes whose URL a browser loads; it loads href of LINKED elements
LINKED = {"link", "use", "image"}

NEED_PATH = ("folder", "parquet", "webdataset", "huggingface")  # sources that need data.path
KINDS = [
    *(f"data.kind={kind}" for kind in ("demo", *NEED_PATH, "cifar10", "cifar100", "stl10")),
    *(f"bank.kind={kind}" for kind in ("flat", "scan", "ivf", "reference")),
    *(f"model.backbone.kind={kind}" for kind in ("torchvision", "narrow")),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class Loads(HTMLParser):
    """Collects the URLs that a browser loads for a page."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in LOADED or (name == "href" and tag in LINKED):
                self.urls.append(value or "")
            elif name == "style":
                self.urls += styles(value or "")


def styles(css: str) -> list[str]:
    """Return the URLs in a style sheet."""
    return [url or imported for url, imported in re.findall(r"""url\(\s*['"]?([^'")]+)|@import\s+['"]([^'"]+)""", css)]


def external(url: str) -> bool:
    return bool(re.match(r"\s*(?:[a-z][a-z0-9+.-]*:)?//", url, flags=re.IGNORECASE))


def test_pages_load_nothing_from_other_sites(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        loads = Loads()
        loads.feed(page.read_text(encoding="utf-8"))
        assert loads.urls
        assert not [url for url in loads.urls if external(url)], page
    for sheet in site.rglob("*.css"):
        assert not [url for url in styles(sheet.read_text(encoding="utf-8")) if external(url)], sheet


def test_external_urls_are_detected() -> None:
    loads = Loads()
    loads.feed('<link href="//a"><img src="https://b"><i style="background: url(http://c)"></i><a href="https://d">')
    assert loads.urls == ["//a", "https://b", "http://c"]
    assert all(external(url) for url in loads.urls)
    assert not any(
        external(url) for url in ("assets/a.css", "../b", "#c", "data:image/svg+xml;utf8,<svg xmlns='http://d'")
    )


def test_reference_is_complete(site: Path) -> None:
    """It has every command with its options, every setting by its name for `--set`, and every package."""
    commands = html.unescape((site / "reference" / "commands.html").read_text(encoding="utf-8"))
    context = click.Context(cli)
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        assert f'id="{name}"' in commands
        for option in command.params:
            if isinstance(option, click.Option):
                assert max(option.opts, key=len) in commands, (name, option)
    settings = html.unescape((site / "reference" / "configuration.html").read_text(encoding="utf-8"))
    for kind in KINDS:
        choice, _, name = kind.partition("=")
        assert re.search(rf">{choice}: ([a-z0-9]+ or )*{name}\b", settings), kind
        path = ["data.path=anywhere"] if name in NEED_PATH else []
        for key in keys(load_config("demo", [kind, *path]).model_dump(mode="json")):
            assert f">{key}<" in settings, key
    for package in (ROOT / "msf_faiss").rglob("__init__.py"):
        name = ".".join(package.parent.relative_to(ROOT).parts)
        assert (site / "reference" / "python" / f"{name}.html").is_file()


def keys(values: dict[str, Any], above: str = "") -> Iterator[str]:
    """Yield the dotted names of all settings."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from keys(value, f"{above}{name}.")
        else:
            yield above + name


@pytest.mark.browser
def test_search_works_from_disk(site: Path, browser: Browser) -> None:
    """In light and dark mode, without console messages and without requests for anything but files."""
    messages: list[str] = []
    for scheme in ("light", "dark"):
        page = browser.new_page(color_scheme=scheme)
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda request: messages.append(request.url))
        page.goto((site / "bank.html").as_uri())
        page.keyboard.press("/")
        page.keyboard.type("min_recall")
        page.locator(".md-search-result__link", has_text="Configuration").first.click()
        page.wait_for_url("**/reference/configuration.html?h=*")
        brightness = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]")
        assert (int(brightness) > 200) == (scheme == "light")
        page.close()
    assert [line for line in messages if not line.startswith(("file:", "data:"))] == []
