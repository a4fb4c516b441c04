"""The report in a browser: it renders, says nothing on the console, and asks for nothing outside the file."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from linearize.report import render_html

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)")


@dataclass
class Look:
    """What a browser made of a page."""

    page: Any
    said: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    library = pytest.importorskip("playwright.sync_api")
    with library.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def look(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """Open HTML from a file."""
    opened = []

    def open_page(html: str) -> Look:
        path = tmp_path / "report.html"
        path.write_text(html, encoding="utf-8")
        seen = Look(browser.new_page(viewport={"width": 1100, "height": 800}))
        opened.append(seen.page)
        seen.page.on("console", lambda message: seen.said.append(message.text))
        seen.page.on("pageerror", lambda error: seen.said.append(str(error)))
        seen.page.on("request", lambda request: seen.requests.append(request.url))
        seen.page.goto(path.as_uri(), wait_until="networkidle")
        assert seen.requests.pop(0) == path.as_uri()
        return seen

    yield open_page
    for page in opened:
        page.close()


def test_the_report_renders_and_asks_for_nothing(look, results, records, evaluation) -> None:
    seen = look(render_html(results, records, evaluation))
    for width in (1100, 390):
        seen.page.set_viewport_size({"width": width, "height": 800})
        boxes = [figure.bounding_box() for figure in seen.page.query_selector_all("figure svg")]
        assert len(boxes) == 8
        assert all(box["width"] > 250 and box["height"] > 50 and box["x"] + box["width"] <= width for box in boxes)
        assert seen.page.evaluate("document.documentElement.scrollWidth") <= width
    for words in ("14.81", "memory zeroed", "Transfer loss by layer", "Perplexity by position: book", "Loss: finetune"):
        assert seen.page.get_by_text(words).first.is_visible(), words
    assert seen.page.locator("tr.final").inner_text().startswith("after <finetune>")
    assert (seen.said, seen.requests) == ([], [])


def test_what_the_look_is_for_would_be_seen(look, results) -> None:
    page = render_html(results).replace(
        "</main>", '<img src="http://127.0.0.1:9/x.png"><script>console.log("a"); missing()</script></main>'
    )
    seen = look(page)
    assert seen.requests == ["http://127.0.0.1:9/x.png"]
    assert len(seen.said) == 3  # the log, the script's error, the picture's


def test_an_empty_run_renders(look) -> None:
    seen = look(render_html({}))
    assert (seen.said, seen.requests) == ([], [])
    assert seen.page.title() == "linearize"
