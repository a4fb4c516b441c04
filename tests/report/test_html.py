import re
from html.parser import HTMLParser

import pytest

from linearize.report import draw_png, draw_svg, render_html

VOID = {"meta", "br", "path", "use", "rect"}


class Page(HTMLParser):
    """Collects text, tags and attributes, and checks that tags close in order."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_nothing_is_requested_from_outside(results, records):
    page = Page(render_html(results, records))
    assert page.open == []
    assert not {"script", "link", "img", "iframe", "object", "embed"} & set(page.tags)
    for name, value in page.attributes:
        assert "//" not in (value or ""), (name, value)
        if name in ("src", "href", "xlink:href"):
            assert value.startswith(("#", "data:image/png;base64,"))
    styles = " ".join(text for text in page.texts if "{" in text)
    assert "@import" not in styles
    assert re.findall(r"url\((?!#)", styles) == []


def test_all_sections_and_figures_are_there(results, records):
    text = render_html(results, records)
    titles = re.findall(r"<h2>(.*?)</h2>", text)
    assert titles == ["Quality", "Training", "Sample", "Memory", "Recipe", "Provenance"]
    assert text.count("<svg") == 5
    assert text.count(">Perplexity by position</text>") == 1
    assert "some/teacher → liger" in text
    assert "packages.torch" in text


def test_an_evaluation_has_its_section_with_controls_positions_and_cost(results, records, evaluation):
    text = render_html(results, records, evaluation)
    titles = re.findall(r"<h2>(.*?)</h2>", text)
    assert titles[:3] == ["Quality", "Evaluation beside teacher and controls", "Training"]
    assert text.count("<svg") == 8
    for words in ("memory zeroed", "passkey 1024", "Decode (tokens/s, all rows)", "out of memory", "it helps"):
        assert words in text
    for model in evaluation["models"]:
        model.pop("speed", None)
    assert "Latency" not in render_html(results, records, evaluation)


def test_text_from_models_is_escaped(results):
    text = render_html(results)
    assert "Once &lt;b&gt;" in text
    assert "after &lt;finetune&gt;" in text
    assert "Once <b>" not in text


def test_the_headline_is_the_final_model_not_a_control(results):
    tiles = re.search(r'<div class="tiles">(.*?)</header>', render_html(results), re.DOTALL)[1]
    assert "<b>14.81</b>" in tiles
    assert "1.20× the teacher&#x27;s 12.35" in tiles
    assert "<b>320×</b>" in tiles
    assert "20.50" not in tiles


@pytest.mark.parametrize("key", ["rows", "samples", "cache", "provenance", "recipe_yaml"])
def test_an_absent_key_is_an_absent_section(results, key):
    title = {"rows": "Quality", "samples": "Sample", "cache": "Memory", "recipe_yaml": "Recipe"}.get(key, "Provenance")
    del results[key]
    titles = re.findall(r"<h2>(.*?)</h2>", render_html(results))
    assert title not in titles
    assert len(titles) == 4


def test_an_empty_run_still_has_a_page():
    page = Page(render_html({}))
    assert "section" not in page.tags
    assert page.open == []


def test_figures_of_the_same_run_are_the_same(results, records):
    assert render_html(results, records) == render_html(results, records)


@pytest.mark.parametrize("kind", ["quality", "positions", "cache", "transfer", "loss"])
def test_every_figure_draws_as_svg_and_png_or_not_at_all(results, records, kind):
    content = records if kind in ("transfer", "loss") else results
    svg = draw_svg(kind, content)
    assert svg.startswith("<svg")
    assert "currentColor" in svg
    assert draw_png(kind, content).startswith(b"\x89PNG")
    assert draw_svg(kind, [] if kind in ("transfer", "loss") else {}) is None


def test_figures_bear_numbers_that_are_not_finite(records):
    rows = [
        {"name": "teacher", "perplexity": 3.0, "kl": 0.0},
        {"name": "ruined", "perplexity": float("inf"), "kl": None},
    ]
    assert "not finite" in draw_svg("quality", {"rows": rows})
    records[3]["loss"] = None
    records[4]["layers"]["2"] = None
    assert draw_svg("loss", records)
    assert draw_svg("transfer", records)


def test_the_figure_shows_each_rows_number(results):
    svg = draw_svg("quality", results)
    for label in ("12.35", "14.81", "0.1235", "after surgery"):
        assert label in svg


@pytest.mark.filterwarnings("error")
def test_a_divergence_of_zero_fits_on_a_logarithmic_axis():
    """The teacher's own divergence is 0, which has no place there."""
    rows = [{"name": str(i), "perplexity": 9.0, "kl": kl} for i, kl in enumerate((0.0, 1e-5, 0.5))]
    assert "<svg" in draw_svg("quality", {"rows": rows})
