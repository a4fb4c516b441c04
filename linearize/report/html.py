"""`report.html`: one self-contained page of a run. It asks for nothing from outside and runs no script."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from linearize.report.evaluation import evaluation_cells, speed_cells, verdicts
from linearize.report.figures import draw_svg
from linearize.report.metrics import Record
from linearize.report.style import CSS
from linearize.report.table import (
    Cells,
    Results,
    cache_cells,
    duration,
    final_row,
    number,
    quality_cells,
    small,
    teacher_row,
    times,
)

CAPTIONS = {
    "quality": "Every bar is one evaluation on the same held-out rows; grey: teacher and controls. Lower is better.",
    "positions": "On the run's own held-out rows. A mixer that forgets shows it at the later positions.",
    "transfer": "Attention transfer trains each layer alone against the teacher's attention output. Left: running "
    "means. Right: each layer's mean loss in the first and in the last tenth of the stage, which read other text: "
    "with few steps that moves it more than training does.",
    "loss": "The loss that each stage minimises; stages do not share a unit.",
    "cache": "What one sequence keeps in memory while it generates, worked out from the shapes of the caches.",
    "perplexity": "Perplexity by position in the document; grey: the teacher, dashed: controls made from the model.",
    "recall": "Answers found, by the length of the text and how deep in it the answer stands.",
    "cost": "Measured in eager mode, the same loop for all.",
}


def html_table(cells: Cells, marked: int | None = None) -> str:
    """Return the table as HTML; the row of index `marked` stands out."""
    head = "".join(f"<th>{escape(name)}</th>" for name in cells.header)
    body = ""
    for index, row in enumerate(cells.rows):
        cell_text = "".join(f"<td>{escape(cell)}</td>" for cell in row)
        body += f'<tr class="final">{cell_text}</tr>' if index == marked else f"<tr>{cell_text}</tr>"
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def section(title: str, *content: str | None) -> str:
    """Return a titled section, or nothing where it has no content."""
    inside = "".join(part for part in content if part)
    return f"<section><h2>{escape(title)}</h2>{inside}</section>" if inside else ""


def figure(kind: str, content: Any) -> str | None:
    """Return a figure with its caption, or None where there is nothing to draw."""
    image = draw_svg(kind, content)
    return f"<figure>{image}<figcaption>{escape(CAPTIONS[kind])}</figcaption></figure>" if image else None


def tiles(results: Results) -> str:
    """Return the headline numbers: final perplexity against the teacher's, divergence, cache, cost."""
    shown: list[tuple[str, str]] = []
    teacher, last = teacher_row(results), final_row(results) or {}
    if teacher and "perplexity" in last and "perplexity" in teacher:
        ratio = last["perplexity"] / teacher["perplexity"]
        words = f"held-out perplexity, {number(ratio)}× the teacher's {number(teacher['perplexity'])}"
        shown.append((number(last["perplexity"]), words))
    if last.get("kl") is not None:
        shown.append((small(last["kl"]), "nats a token from the teacher (KL)"))
    if cache := results.get("cache"):
        longest = max(cache, key=lambda row: int(row["context"]))
        ratio = longest["teacher_bytes"] / longest["student_bytes"]
        shown.append((times(ratio), f"smaller cache at {longest['context']:,} tokens"))
    if last.get("seconds") and last.get("tokens"):
        shown.append((duration(last["seconds"]), f"for {last['tokens']:,} trained tokens"))
    inside = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(words)}</span></div>' for value, words in shown
    )
    return f'<div class="tiles">{inside}</div>' if inside else ""


def sample_section(results: Results) -> str:
    """Return the continuations of one prompt by teacher and student."""
    sample = results.get("samples")
    if not sample:
        return ""
    cards = "".join(
        f'<div class="sample"><h3>{who.capitalize()}</h3><p><span class="prompt">{escape(sample["prompt"])}</span>'
        f"{escape(sample[who])}</p></div>"
        for who in ("teacher", "student")
        if who in sample
    )
    return section("Sample", f'<div class="samples">{cards}</div>', "<p class=hint>Greedy; the prompt is grey.</p>")


def evaluation_section(evaluation: Results | None) -> str:
    """Return what `linearize eval` measured: teacher, model and controls side by side, by position, recall, cost."""
    if evaluation is None:
        return ""
    about = evaluation["provenance"]
    words = f"Suite {evaluation['suite']['name']}, {about['dtype']} on {about['device']}, seed {about['seed']}."
    speed = speed_cells(evaluation)
    return section(
        "Evaluation beside teacher and controls",
        "".join(f"<p>{escape(sentence)}</p>" for sentence in verdicts(evaluation)),
        html_table(evaluation_cells(evaluation)),
        f"<p class=hint>{escape(words)}</p>",
        figure("perplexity", evaluation),
        figure("recall", evaluation),
        f"<h3>Latency and memory against context</h3>{html_table(speed)}" if speed.rows else None,
        figure("cost", evaluation),
    )


def definitions(values: Mapping[str, Any], prefix: str = "") -> str:
    """Return nested values as rows of a two-column table."""
    rows = ""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            rows += definitions(value, f"{name}.")
        else:
            rows += f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>"
    return rows


def provenance_section(results: Results) -> str:
    """Return what is needed to run it again."""
    values = results.get("provenance")
    return section("Provenance", f'<table class="pairs">{definitions(values)}</table>') if values else ""


def recipe_section(results: Results) -> str:
    """Return the recipe as it ran."""
    text = results.get("recipe_yaml")
    return section("Recipe", f"<pre>{escape(text.strip())}</pre>") if text else ""


def render_html(results: Results, records: list[Record] | None = None, evaluation: Results | None = None) -> str:
    """Return the report as one HTML page.

    Args:
        results: what `results.json` holds; sections whose keys are absent are left out.
        records: of `metrics.jsonl`, for the training curves.
        evaluation: what `eval.json` holds; None where there is none.
    """
    records = records or []
    title = " → ".join(str(results[key]) for key in ("model", "recipe") if results.get(key)) or "linearize"
    curves = [figure(kind, records) for kind in ("transfer", "loss")]
    main, final = quality_cells(results), final_row(results)
    marked = next((index for index, row in enumerate(results.get("rows", [])) if row is final), None)
    sections = [
        section(
            "Quality",
            html_table(main, marked) if main.rows else None,
            figure("quality", results),
            figure("positions", results),
        ),
        evaluation_section(evaluation),
        section("Training", *curves),
        sample_section(results),
        section("Memory", html_table(cache_cells(results)) if results.get("cache") else None, figure("cache", results)),
        recipe_section(results),
        provenance_section(results),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head>\n<body><header><p>linearize report</p>"
        f"<h1>{escape(title)}</h1>{tiles(results)}</header>\n<main>{''.join(sections)}</main></body></html>\n"
    )
