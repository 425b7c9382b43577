"""A report in Chromium: crosshair, toggles, themes and phones, without console messages or requests."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from msf_faiss.config import Config, DemoData
from msf_faiss.config.load import dump_config, override_config
from msf_faiss.report.build import write_report
from msf_faiss.run.metrics_file import HEADER

pytestmark = pytest.mark.browser
HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)<∕script>"


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`one`: of one run. `three`: of runs of different lengths, one with a hostile name."""
    folder = tmp_path_factory.mktemp("reports")
    runs = [
        write_run(folder / "first", range(10, 1001, 10)),
        write_run(folder / HOSTILE, range(10, 501, 10), "optimizer.learning_rate=0.5", name=HOSTILE),
        write_run(folder / "short", [100]),
    ]
    return {
        "one": write_report(runs[:1], neighbors=False),
        "three": write_report(runs, folder / "report.html", neighbors=False),
    }


def loss(step: int) -> float:
    return round(2 / (1 + step / 50), 4)


def write_run(path: Path, steps: Any, *settings: str, name: str = "a bank") -> Path:
    path.mkdir()
    lines: list[dict[str, Any]] = [
        {"step": step, "epoch": step / 100, "loss": loss(step), "purity": step / 1000, "learning_rate": 0.1}
        for step in steps
    ]
    lines += [{"step": steps[-1], "epoch": steps[-1] / 100, "bank_adjusted": name}]
    (path / "metrics.jsonl").write_text(HEADER + "".join(json.dumps(line) + "\n" for line in lines))
    (path / "config.yaml").write_text(dump_config(override_config(Config(data=DemoData()), settings)))
    return path


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Any]:
    """Opens a report; console messages, dialogs and requests fail the test."""
    contexts, problems = [], []

    def open_(path: Path, *, width: int = 1280, **options: Any) -> Page:
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, **options))
        page = contexts[-1].new_page()
        page.set_default_timeout(5_000)
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: (problems.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: None if request.url == path.as_uri() else problems.append(request.url))
        page.goto(path.as_uri())
        return page

    yield open_
    for context in contexts:
        context.close()
    assert problems == []


def values(page: Page, chart: str) -> list[str]:
    return page.locator(f'[data-name="{chart}"] .values b').all_text_contents()


def test_crosshair_by_pointer_and_keyboard(open_page: Any, reports: dict[str, Path]) -> None:
    page: Page = open_page(reports["three"])
    assert page.text_content("#position") == "latest value"
    assert values(page, "loss") == [f"{loss(1000):.4g}", f"{loss(500):.4g}", f"{loss(100):.4g}"]
    canvas = page.locator('[data-name="purity"] .canvas')
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 50)
    page.wait_for_function("document.getElementById('position').textContent === 'step 300, epoch 3'")
    assert values(page, "loss") == [f"{loss(300):.4g}", f"{loss(300):.4g}", "–"]
    assert values(page, "purity") == ["30.0%", "30.0%", "–"]
    dot = page.locator('[data-name="purity"] .cursor circle').first.bounding_box()
    assert dot is not None
    assert dot["x"] + dot["width"] / 2 == pytest.approx(box["x"] + 0.3 * box["width"], abs=1)  # pixel
    assert dot["y"] + dot["height"] / 2 == pytest.approx(box["y"] + 0.7 * box["height"], abs=1)
    page.mouse.down()
    page.mouse.up()
    page.mouse.move(0, 0)
    page.keyboard.press("ArrowLeft")
    assert page.text_content("#position") == "step 290, epoch 2.9"
    assert page.get_attribute("#step", "aria-valuetext") == "step 290, epoch 2.9"
    page.keyboard.press("Home")
    assert values(page, "loss") == [f"{loss(10):.4g}", f"{loss(10):.4g}", "–"]
    page.keyboard.press("End")
    assert values(page, "loss") == [f"{loss(1000):.4g}", "–", "–"]
    page.keyboard.press("Escape")
    assert values(page, "loss")[1] == f"{loss(500):.4g}"
    assert not page.locator(".cursor").first.is_visible()


def test_page_without_javascript_lacks_only_the_crosshair(open_page: Any, reports: dict[str, Path]) -> None:
    page: Page = open_page(reports["three"], java_script_enabled=False)
    assert values(page, "loss")[0] == f"{loss(1000):.4g}"
    assert not page.locator("#step").is_visible()
    figure = page.locator('[data-name="loss"]')
    assert figure.locator(".plot.linear").is_visible()
    figure.locator("input.log").check()
    assert not figure.locator(".plot.linear").is_visible()
    assert figure.locator(".plot.log").is_visible()
    assert not figure.locator(".plot.log .smooth").first.is_visible()
    page.check("#smooth")
    assert figure.locator(".plot.log .smooth").first.is_visible()
    lines = page.locator('[data-name="purity"] g')
    displays = "found => found.map(lines => getComputedStyle(lines).display)"
    assert lines.evaluate_all(displays) == ["inline", "inline", "inline"]
    page.uncheck("#show-1")
    assert lines.evaluate_all(displays) == ["inline", "none", "inline"]
    assert page.locator(".run-1:visible").count() == 0
    page.locator("#config summary", has_text="optimizer").click()
    assert page.get_by_role("cell", name="0.5", exact=True).last.is_visible()


def test_phone_in_light_and_dark(open_page: Any, reports: dict[str, Path]) -> None:
    backgrounds = set()
    for name in ("one", "three"):
        for scheme in ("light", "dark"):
            page: Page = open_page(reports[name], width=360, color_scheme=scheme)
            assert page.evaluate("document.documentElement.scrollWidth") == 360
            backgrounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
            narrow = page.locator(".canvas:visible").evaluate_all("found => Math.min(...found.map(c => c.clientWidth))")
            assert narrow > 200
    assert len(backgrounds) == 2


def test_script_formats_values_like_python(open_page: Any, reports: dict[str, Path]) -> None:
    page: Page = open_page(reports["one"])
    names = page.locator(".chart").evaluate_all("found => found.map(chart => chart.dataset.name)")
    before = {name: values(page, name) for name in names}
    page.focus("#step")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowRight")
    assert page.text_content("#position") == "step 1,000, epoch 10"
    assert {name: values(page, name) for name in names} == before
    page.emulate_media(media="print")
    assert not page.locator(".controls").is_visible()
